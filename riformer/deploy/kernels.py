"""Triton kernels of the collapsed form, each beside its reference in plain PyTorch with the same signature.

A map is [M, C], the rows of all samples one behind the other, so that small maps waste no tile; row r belongs to
sample r // num_tokens. A tile of rows that spans several samples keeps a partial sum for each. Partial sums are summed
in a fixed order by whoever needs them, without atomics: two runs give the same bits.

This module imports triton; on a CPU its kernels run in triton's interpreter (TRITON_INTERPRET=1), for tests.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from riformer.deploy.collapse import BlockWeights, coefficients

INTERPRETED = triton.knobs.runtime.interpret
COEFFICIENTS = 5
"""scale, shift, gain, offset, and the mean by which the block's output is centred: the rows of a sample's table."""


def tile_rows(num_rows: int, num_tokens: int) -> int:
    """Rows of a tile: fewer where there are few, so that every multiprocessor gets one, or many samples' in a tile."""
    fitting = triton.next_power_of_2(triton.cdiv(num_rows, 132)), triton.next_power_of_2(4 * num_tokens) // 2
    return max(16, min(128, *fitting))


def num_spans(rows: int, num_tokens: int) -> int:
    """Samples that a tile of rows can touch."""
    return (rows - 1) // num_tokens + 2


def new_partials(x: Tensor, num_tokens: int) -> Tensor:
    """Room for the partial sums of a map [M, C]: [tiles, spans, 2, C] in float32."""
    rows = tile_rows(len(x), num_tokens)
    return x.new_empty(triton.cdiv(len(x), rows), num_spans(rows, num_tokens), 2, x.shape[1], dtype=torch.float32)


def _configs(*pairs: tuple[dict[str, int], int, int]) -> list[triton.Config]:
    """Configurations from (block sizes, warps, stages); the first alone in the interpreter, which cannot time."""
    configs = [triton.Config(blocks, num_warps=warps, num_stages=stages) for blocks, warps, stages in pairs]
    return configs[:1] if INTERPRETED else configs


@triton.jit
def _gelu(x, PRECISION: tl.constexpr):
    """x * Phi(x); for narrow types within 1e-4, by multiplications and additions alone: benchmarks/fit_gelu.py."""
    if PRECISION == "ieee":
        return x * (0.5 + 0.5 * tl.erf(x * 0.7071067811865476))
    u = tl.minimum(tl.maximum(x, -4.2), 4.2)
    t = u * u * 0.11337868480725624 - 1.0
    p = t * -3.744204546e-03 + 1.117568079e-02
    p = p * t - 1.646726949e-02
    p = p * t + 2.377779943e-02
    p = p * t - 3.792616306e-02
    p = p * t + 5.594869344e-02
    p = p * t - 8.157147676e-02
    p = p * t + 1.678545592e-01
    return x * (u * p + 0.5)


@triton.jit
def _write_sums(
    value, rows, columns, in_rows, in_columns, tile, centre, centre_stride, partials, num_tokens, C,
    SPANS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sums of value - centre and of its square over the tile's rows of each sample that it touches."""
    first_sample = tile * ROWS // num_tokens
    samples = rows // num_tokens
    for span in tl.static_range(SPANS):
        sample = first_sample + span
        mine = (samples == sample) & in_rows
        inside = in_columns & (tl.sum(mine.to(tl.int32), 0) > 0)
        middle = tl.load(centre + sample.to(tl.int64) * centre_stride + columns, mask=inside, other=0.0).to(tl.float32)
        apart = tl.where(mine[:, None], value - middle[None, :], 0.0)
        to = partials + ((tile.to(tl.int64) * SPANS + span) * 2) * C + columns
        tl.store(to, tl.sum(apart, 0), mask=in_columns)
        tl.store(to + C, tl.sum(apart * apart, 0), mask=in_columns)


@triton.jit
def _sums_kernel(
    x, centre, centre_stride, partials, M, num_tokens, C,
    SPANS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    rows = tile * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_rows, in_columns = rows < M, columns < C
    inside = in_rows[:, None] & in_columns[None, :]
    value = tl.load(x + rows.to(tl.int64)[:, None] * C + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    _write_sums(
        value, rows, columns, in_rows, in_columns, tile, centre, centre_stride, partials, num_tokens, C, SPANS, ROWS
    )


def sums(x: Tensor, centre: Tensor, num_tokens: int) -> Tensor:
    """Partial sums of x - centre and its square.

    Shape: x [M, C], centre [N, C] (any stride between samples) -> [tiles, spans, 2, C].
    """
    partials = new_partials(x, num_tokens)
    rows, (m, c) = tile_rows(len(x), num_tokens), x.shape
    spans = num_spans(rows, num_tokens)
    _sums_kernel[(len(partials), triton.cdiv(c, 64))](
        x, centre, centre.stride(0), partials, m, num_tokens, c, SPANS=spans, ROWS=rows, COLUMNS=64
    )
    return partials


def sums_reference(x: Tensor, centre: Tensor, num_tokens: int) -> Tensor:
    """The same in PyTorch."""
    rows, partials = tile_rows(len(x), num_tokens), new_partials(x, num_tokens).zero_()
    samples = torch.arange(len(x), device=x.device) // num_tokens
    for tile in range(len(partials)):
        part = slice(tile * rows, min((tile + 1) * rows, len(x)))
        apart = x[part].float() - centre.float()[samples[part]]
        for sample in range(int(samples[part][0]), int(samples[part][-1]) + 1):
            own = apart[samples[part] == sample]
            partials[tile, sample - tile * rows // num_tokens] = torch.stack([own.sum(0), (own * own).sum(0)])
    return partials


@triton.jit
def _coefficients_kernel(
    partials, centre, centre_stride, norm1_weight, norm1_bias, norm2_weight, norm2_bias, fc2_bias, table, eps,
    num_tokens, C, SPANS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0)
    columns = tl.arange(0, COLUMNS)
    inside = columns < C
    first = tl.zeros([COLUMNS], tl.float32)
    second = tl.zeros([COLUMNS], tl.float32)
    for tile in range(sample * num_tokens // ROWS, ((sample + 1) * num_tokens - 1) // ROWS + 1):
        span = sample - tile * ROWS // num_tokens
        at = partials + ((tile * SPANS + span).to(tl.int64) * 2) * C + columns
        first += tl.load(at, mask=inside, other=0.0)
        second += tl.load(at + C, mask=inside, other=0.0)
    shift = first / num_tokens
    mean = (
        tl.load(centre + sample.to(tl.int64) * centre_stride + columns, mask=inside, other=0.0).to(tl.float32) + shift
    )
    var = tl.maximum(second / num_tokens - shift * shift, 0.0)

    weight = tl.load(norm1_weight + columns, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(norm1_bias + columns, mask=inside, other=0.0).to(tl.float32)
    middle = tl.sum(mean, 0) / C
    apart = tl.where(inside, mean - middle, 0.0)
    rstd = 1.0 / tl.sqrt((tl.sum(var, 0) + tl.sum(apart * apart, 0)) / C + eps)
    gain = 1.0 + rstd * weight
    offset = bias - weight * (rstd * middle)
    mean = mean + apart * rstd * weight + bias

    weight = tl.load(norm2_weight + columns, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(norm2_bias + columns, mask=inside, other=0.0).to(tl.float32)
    last = tl.load(fc2_bias + columns, mask=inside, other=0.0).to(tl.float32)
    middle = tl.sum(mean, 0) / C
    apart = tl.where(inside, mean - middle, 0.0)
    rstd = 1.0 / tl.sqrt((tl.sum(gain * gain * var, 0) + tl.sum(apart * apart, 0)) / C + eps)
    to = table + sample.to(tl.int64) * 5 * C + columns
    tl.store(to, rstd * weight * gain, mask=inside)
    tl.store(to + C, bias + rstd * weight * (offset - middle), mask=inside)
    tl.store(to + 2 * C, gain, mask=inside)
    tl.store(to + 3 * C, offset + last, mask=inside)
    tl.store(to + 4 * C, mean + last, mask=inside)


def coefficient_table(partials: Tensor, centre: Tensor, block: BlockWeights, num_tokens: int, eps: float) -> Tensor:
    """A block's affine maps for each sample, from the partial sums of its input around `centre`.

    Shape: partials [tiles, spans, 2, C], centre [N, C] -> [N, 5, C] in float32; see COEFFICIENTS.
    """
    n, c = centre.shape
    rows = tile_rows(n * num_tokens, num_tokens)
    table = torch.empty(n, COEFFICIENTS, c, device=partials.device)
    norms = (block.norm1_weight, block.norm1_bias, block.norm2_weight, block.norm2_bias, block.fc2_bias)
    _coefficients_kernel[(n,)](
        partials, centre, centre.stride(0), *norms, table, eps, num_tokens, c,
        SPANS=num_spans(rows, num_tokens), ROWS=rows, COLUMNS=triton.next_power_of_2(c),
    )  # fmt: skip
    return table


def coefficient_table_reference(
    partials: Tensor, centre: Tensor, block: BlockWeights, num_tokens: int, eps: float
) -> Tensor:
    """The same in PyTorch."""
    n, c = centre.shape
    rows, total = tile_rows(n * num_tokens, num_tokens), torch.zeros(n, 2, c, device=partials.device)
    for tile in range(len(partials)):
        for span in range(partials.shape[1]):
            if (sample := tile * rows // num_tokens + span) <= (
                min((tile + 1) * rows, n * num_tokens) - 1
            ) // num_tokens:
                total[sample] += partials[tile, span]
    shift = total[:, 0] / num_tokens
    found = coefficients(centre.float() + shift, total[:, 1] / num_tokens - shift * shift, block, eps)
    return torch.stack([*found[:4], found.mean + block.fc2_bias.float()], 1)


@triton.jit
def _of_samples(
    vectors, samples, columns, in_columns, last_sample, C, SPANS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One of the table's vectors for each row: that of its sample. The few there are in a tile are read once each."""
    first_sample = tl.min(samples, 0)
    value = tl.zeros([ROWS, columns.shape[0]], tl.float32)
    for span in tl.static_range(SPANS):
        sample = first_sample + span
        vector = tl.load(
            vectors + sample.to(tl.int64) * 5 * C + columns, mask=in_columns & (sample <= last_sample), other=0.0
        )
        value = tl.where((samples == sample)[:, None], vector[None, :], value)
    return value


@triton.jit
def _prologue(
    x, table, rows, columns, in_rows, in_columns, M, num_tokens, C, SPANS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """scale * x + shift, each row with its sample's, in x's type."""
    samples, last = rows // num_tokens, (M - 1) // num_tokens
    inside = in_rows[:, None] & in_columns[None, :]
    value = tl.load(x + rows.to(tl.int64)[:, None] * C + columns[None, :], mask=inside, other=0.0)
    scale = _of_samples(table, samples, columns, in_columns, last, C, SPANS, ROWS)
    shift = _of_samples(table + C, samples, columns, in_columns, last, C, SPANS, ROWS)
    return (scale * value.to(tl.float32) + shift).to(value.dtype)


@triton.jit
def _epilogue(
    product, x, table, partials, tile, rows, columns, in_rows, in_columns, M, num_tokens, C,
    SPANS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """x = gain * x + offset + product, in place, and the sums of the new x around the table's mean."""
    samples, last = rows // num_tokens, (M - 1) // num_tokens
    here = x + rows.to(tl.int64)[:, None] * C + columns[None, :]
    inside = in_rows[:, None] & in_columns[None, :]
    old = tl.load(here, mask=inside, other=0.0)
    gain = _of_samples(table + 2 * C, samples, columns, in_columns, last, C, SPANS, ROWS)
    offset = _of_samples(table + 3 * C, samples, columns, in_columns, last, C, SPANS, ROWS)
    value = (gain * old.to(tl.float32) + (offset + product)).to(old.dtype)
    tl.store(here, value, mask=inside)
    _write_sums(
        value.to(tl.float32), rows, columns, in_rows, in_columns, tile, table + 4 * C, 5 * C, partials, num_tokens, C,
        SPANS, ROWS,
    )  # fmt: skip


@triton.autotune(
    _configs(
        ({"COLUMNS": 128, "DEPTH": 64}, 8, 3),
        ({"COLUMNS": 128, "DEPTH": 32}, 4, 4),
        ({"COLUMNS": 256, "DEPTH": 64}, 8, 3),
        ({"COLUMNS": 64, "DEPTH": 64}, 4, 4),
    ),
    key=["tiles", "H", "C"],
)
@triton.jit
def _fc1_kernel(
    x, table, weight, bias, hidden, M, tiles, num_tokens, C, H,
    SPANS: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    units = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    in_rows, in_units = rows < M, units < H
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, C, DEPTH):
        columns = start + tl.arange(0, DEPTH)
        in_columns = columns < C
        a = _prologue(x, table, rows, columns, in_rows, in_columns, M, num_tokens, C, SPANS, ROWS)
        w = tl.load(
            weight + units[None, :] * C + columns[:, None], mask=in_units[None, :] & in_columns[:, None], other=0.0
        )
        total = tl.dot(a, w, total, input_precision=PRECISION)
    total += tl.load(bias + units, mask=in_units, other=0.0).to(tl.float32)[None, :]
    to = hidden + rows.to(tl.int64)[:, None] * H + units[None, :]
    tl.store(to, _gelu(total, PRECISION).to(hidden.dtype.element_ty), mask=in_rows[:, None] & in_units[None, :])


def fc1(x: Tensor, table: Tensor, weight: Tensor, bias: Tensor, num_tokens: int) -> Tensor:
    """gelu(fc1(scale * x + shift)).

    Shape: x [M, C], table [N, 5, C], weight [H, C], bias [H] -> [M, H].
    """
    (m, c), h = x.shape, len(bias)
    hidden, rows = x.new_empty(m, h), tile_rows(m, num_tokens)
    tiles = triton.cdiv(m, rows)
    _fc1_kernel[lambda meta: (triton.cdiv(h, meta["COLUMNS"]), tiles)](
        x, table, weight, bias, hidden, m, tiles, num_tokens, c, h,
        SPANS=num_spans(rows, num_tokens), ROWS=rows, PRECISION=_precision(x),
    )  # fmt: skip
    return hidden


def fc1_reference(x: Tensor, table: Tensor, weight: Tensor, bias: Tensor, num_tokens: int) -> Tensor:
    """The same in PyTorch, with GELU itself."""
    scale, shift = (table[:, i].repeat_interleave(num_tokens, 0) for i in (0, 1))
    a = (scale * x.float() + shift).to(x.dtype).float()
    return F.gelu(a @ weight.float().T + bias.float()).to(x.dtype)


@triton.autotune(
    _configs(
        ({"COLUMNS": 64, "DEPTH": 64}, 4, 4),
        ({"COLUMNS": 128, "DEPTH": 64}, 8, 3),
        ({"COLUMNS": 64, "DEPTH": 128}, 4, 3),
        ({"COLUMNS": 32, "DEPTH": 128}, 4, 4),
    ),
    key=["tiles", "H", "C"],
    restore_value=["x"],
)
@triton.jit
def _fc2_kernel(
    hidden, weight, x, table, partials, M, tiles, num_tokens, C, H,
    SPANS: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1)
    rows = tile * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    in_rows, in_columns = rows < M, columns < C
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, H, DEPTH):
        units = start + tl.arange(0, DEPTH)
        in_units = units < H
        at = hidden + rows.to(tl.int64)[:, None] * H + units[None, :]
        a = tl.load(at, mask=in_rows[:, None] & in_units[None, :], other=0.0)
        w = tl.load(
            weight + columns[None, :] * H + units[:, None], mask=in_columns[None, :] & in_units[:, None], other=0.0
        )
        total = tl.dot(a, w, total, input_precision=PRECISION)
    _epilogue(total, x, table, partials, tile, rows, columns, in_rows, in_columns, M, num_tokens, C, SPANS, ROWS)


def fc2(hidden: Tensor, weight: Tensor, x: Tensor, table: Tensor, num_tokens: int) -> Tensor:
    """x = gain * x + offset + fc2(hidden), in place; returns the partial sums of the new x around the table's mean.

    Shape: hidden [M, H], weight [C, H], x [M, C], table [N, 5, C] -> [tiles, spans, 2, C].
    """
    (m, c), rows, partials = x.shape, tile_rows(len(x), num_tokens), new_partials(x, num_tokens)
    _fc2_kernel[lambda meta: (triton.cdiv(c, meta["COLUMNS"]), len(partials))](
        hidden, weight, x, table, partials, m, len(partials), num_tokens, c, hidden.shape[1],
        SPANS=num_spans(rows, num_tokens), ROWS=rows, PRECISION=_precision(x),
    )  # fmt: skip
    return partials


def fc2_reference(hidden: Tensor, weight: Tensor, x: Tensor, table: Tensor, num_tokens: int) -> Tensor:
    """The same in PyTorch."""
    gain, offset = (table[:, i].repeat_interleave(num_tokens, 0) for i in (2, 3))
    x.copy_(gain * x.float() + offset + hidden.float() @ weight.float().T)
    return sums_reference(x, table[:, 4], num_tokens)


@triton.autotune(
    _configs(({"DEPTH": 64}, 8, 2), ({"DEPTH": 64}, 4, 2), ({"DEPTH": 128}, 8, 2), ({"DEPTH": 32}, 4, 3)),
    key=["tiles", "H", "C"],
    restore_value=["x"],
)
@triton.jit
def _mlp_kernel(
    x, table, fc1_weight, fc1_bias, fc2_weight, partials, M, tiles, num_tokens, C, H,
    SPANS: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    rows = tile * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    in_rows, in_columns = rows < M, columns < C
    a = _prologue(x, table, rows, columns, in_rows, in_columns, M, num_tokens, C, SPANS, ROWS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, H, DEPTH):
        units = start + tl.arange(0, DEPTH)
        in_units = units < H
        w = tl.load(
            fc1_weight + units[None, :] * C + columns[:, None], mask=in_units[None, :] & in_columns[:, None], other=0.0
        )
        hidden = tl.dot(a, w, input_precision=PRECISION)
        hidden += tl.load(fc1_bias + units, mask=in_units, other=0.0).to(tl.float32)[None, :]
        w = tl.load(
            fc2_weight + columns[None, :] * H + units[:, None], mask=in_columns[None, :] & in_units[:, None], other=0.0
        )
        total = tl.dot(_gelu(hidden, PRECISION).to(a.dtype), w, total, input_precision=PRECISION)
    _epilogue(total, x, table, partials, tile, rows, columns, in_rows, in_columns, M, num_tokens, C, SPANS, ROWS)


def mlp(x: Tensor, table: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, num_tokens: int) -> Tensor:
    """fc1, GELU and fc2 in one kernel, for narrow maps: x in place as `fc2` leaves it, its partial sums returned.

    Shape: x [M, C], table [N, 5, C], fc1_weight [H, C], fc1_bias [H], fc2_weight [C, H] -> [tiles, spans, 2, C].
    """
    (m, c), rows, partials = x.shape, tile_rows(len(x), num_tokens), new_partials(x, num_tokens)
    _mlp_kernel[(len(partials),)](
        x, table, fc1_weight, fc1_bias, fc2_weight, partials, m, len(partials), num_tokens, c, len(fc1_bias),
        SPANS=num_spans(rows, num_tokens), ROWS=rows, PRECISION=_precision(x),
        COLUMNS=max(16, triton.next_power_of_2(c)),
    )  # fmt: skip
    return partials


def mlp_reference(
    x: Tensor, table: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, num_tokens: int
) -> Tensor:
    """The same in PyTorch."""
    return fc2_reference(fc1_reference(x, table, fc1_weight, fc1_bias, num_tokens), fc2_weight, x, table, num_tokens)


def _precision(x: Tensor) -> str:
    """How products of float32 are computed: in float32, not in TF32. Narrower types have one way only."""
    return "ieee" if x.dtype == torch.float32 else "tf32"
