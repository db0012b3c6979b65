"""Triton kernels of the collapsed form, each beside its reference in plain PyTorch with the same signature.

A map is [M, C], the rows of all samples one behind the other, so that small maps waste no tile; row r belongs to
sample r // num_tokens. Sums are taken in a fixed order, without atomics: two runs give the same bits.

This module imports triton; on a CPU its kernels run in triton's interpreter (TRITON_INTERPRET=1), for tests.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from riformer.runtime import collapse
from riformer.runtime.collapse import BlockWeights, ConvWeights

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
GELU_SCALE = 0.32617215674
"""In 16-bit types the input of GELU is x * GELU_SCALE and its output 2 * GELU_SCALE * gelu(x), so that it takes the
hardware's tanh and three other operations. The error is below 1e-3, half the rounding error of bf16 at 1. Fitted by
tools/fit_gelu.py."""


def tile_rows(num_rows: int, num_tokens: int) -> int:
    """Rows of a tile: fewer for small maps, so that all multiprocessors have work, and tiles span few samples."""
    by_device = triton.next_power_of_2(triton.cdiv(num_rows, 132))  # an H100 has 132 multiprocessors
    by_sample = triton.next_power_of_2(4 * num_tokens) // 2
    return max(16, min(128, by_device, by_sample))


def num_spans(rows: int, num_tokens: int) -> int:
    """Samples that a tile of rows can touch."""
    return (rows - 1) // num_tokens + 2


def _configs(*choices: tuple[dict[str, int], int, int, int | None]) -> list[triton.Config]:
    """From (block sizes, warps, stages, registers at most); in the interpreter, which cannot time, only the first."""
    configs = [
        triton.Config(blocks, num_warps=warps, num_stages=stages, maxnreg=registers)
        for blocks, warps, stages, registers in choices
    ]
    return configs[:1] if INTERPRETED.value else configs


@triton.jit
def _gelu(x, PRECISION: tl.constexpr):
    """x * Phi(x). In 16-bit types input and output are scaled: see GELU_SCALE."""
    if PRECISION == "ieee":
        return x * (0.5 + 0.5 * tl.erf(x * 0.7071067811865476))
    u = x * (x * x + 2.4531740739)
    if INTERPRETED:
        tanh = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * u))
    else:
        tanh = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [u], tl.float32, is_pure=True, pack=1)
    return x * tanh + x


@triton.jit
def _load(at, inside, WHOLE: tl.constexpr):
    """A tile; without a mask if WHOLE, where no part of it can be outside."""
    if WHOLE:
        return tl.load(at)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def _pack_kernel(
    images, packed, pixels, width, sample_stride, channel_stride, row_stride, column_stride,
    CHANNELS: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    channels = tl.arange(0, ROOM)
    y, x = at // width, at % width
    start = images + sample * sample_stride + (y * row_stride + x * column_stride)
    inside = (at < pixels)[:, None] & (channels < CHANNELS)[None, :]
    value = tl.load(start[:, None] + channels[None, :] * channel_stride, mask=inside, other=0.0)
    to = packed + sample * pixels * ROOM + at[:, None] * ROOM + channels[None, :]
    tl.store(to, value.to(packed.dtype.element_ty), mask=(at < pixels)[:, None])


def pack(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Images of any type and strides in the layout of `conv`: channels last, padded with zeros to a power of 2.

    Shape: [N, C, H, W] -> [N, H, W, 2^n].
    """
    n, channels, height, width = images.shape
    packed = images.new_empty(n, height, width, triton.next_power_of_2(channels), dtype=dtype)
    pixels = height * width
    _pack_kernel[(n, triton.cdiv(pixels, 512))](
        images, packed, pixels, width, *images.stride(), CHANNELS=channels, ROOM=packed.shape[3], BLOCK=512
    )
    return packed


def pack_reference(images: Tensor, dtype: torch.dtype) -> Tensor:
    """The same in PyTorch."""
    channels = images.shape[1]
    return F.pad(images.permute(0, 2, 3, 1).to(dtype), (0, triton.next_power_of_2(channels) - channels))


@triton.autotune(
    _configs(
        ({"COLUMNS": 64, "DEPTH": 32}, 4, 3, None),
        ({"COLUMNS": 64, "DEPTH": 32}, 4, 2, 128),
        ({"COLUMNS": 128, "DEPTH": 64}, 8, 3, 128),
    ),
    key=["size", "IN", "C"],
    cache_results=True,
)
@triton.jit
def _conv_kernel(
    images, weight, bias, x, M, size, num_tokens, in_height, in_width, width,
    IN: tl.constexpr, C: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    ROWS: tl.constexpr, PRECISION: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    ACROSS: tl.constexpr = (C + COLUMNS - 1) // COLUMNS  # tiles side by side are neighbours: they share images
    rows = tl.program_id(0) // ACROSS * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) % ACROSS * COLUMNS + tl.arange(0, COLUMNS)
    in_rows, in_columns = rows < M, columns < C
    samples, tokens = rows // num_tokens, rows % num_tokens
    top, left = tokens // width * STRIDE - PADDING, tokens % width * STRIDE - PADDING
    start = images + samples.to(tl.int64) * in_height * in_width * IN
    RUN: tl.constexpr = KERNEL * IN  # a row of the kernel's window, one run of memory
    STEPS: tl.constexpr = (RUN + DEPTH - 1) // DEPTH
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(KERNEL * STEPS):
        window_row = step // STEPS
        run = step % STEPS * DEPTH + tl.arange(0, DEPTH)
        y, across = top + window_row, left[:, None] + (run // IN)[None, :]
        inside = (in_rows & (y >= 0) & (y < in_height))[:, None] & (across >= 0) & (across < in_width)
        at = (start + (y * in_width + left) * IN)[:, None] + run[None, :]
        a = tl.load(at, mask=inside & (run < RUN)[None, :], other=0.0)
        at = weight + columns[None, :] * (KERNEL * RUN) + (window_row * RUN + run)[:, None]
        w = _load(at, in_columns[None, :] & (run < RUN)[:, None], C % COLUMNS == 0 and RUN % DEPTH == 0)
        total = tl.dot(a, w, total, input_precision=PRECISION)
    value = (total + tl.load(bias + columns, mask=in_columns, other=0.0)[None, :]).to(x.dtype.element_ty)
    tl.store(x + rows.to(tl.int64)[:, None] * C + columns[None, :], value, mask=in_rows[:, None] & in_columns[None, :])


def conv(images: Tensor, weights: ConvWeights) -> tuple[Tensor, tuple[int, int]]:
    """The convolution before a stage: a map, and its height and width.

    Shape: images [N, H', W', C'], weight [C, k, k, C'], bias [C] -> [N * H * W, C] and (H, W).
    """
    weight, bias, stride, padding = weights
    (n, *sizes, channels), (c, kernel) = images.shape, weight.shape[:2]
    height, width = ((size + 2 * padding - kernel) // stride + 1 for size in sizes)
    tokens = height * width
    x = images.new_empty(n * tokens, c)
    rows = tile_rows(len(x), tokens)
    _conv_kernel[lambda meta: (triton.cdiv(c, meta["COLUMNS"]) * triton.cdiv(len(x), rows),)](
        images, weight, bias, x, len(x), _size(x), tokens, *sizes, width,
        IN=channels, C=c, KERNEL=kernel, STRIDE=stride, PADDING=padding, ROWS=rows, PRECISION=_precision(x),
    )  # fmt: skip
    return x, (height, width)


def conv_reference(images: Tensor, weights: ConvWeights) -> tuple[Tensor, tuple[int, int]]:
    """The same in PyTorch."""
    weight, bias, stride, padding = weights
    first, second = (tensor.float().permute(0, 3, 1, 2) for tensor in (images, weight))
    x = F.conv2d(first, second, bias.float(), stride, padding)
    height, width = x.shape[2:]
    return x.permute(0, 2, 3, 1).flatten(0, 2).to(weight.dtype), (height, width)


@triton.autotune(
    _configs(
        ({"TOKENS": 64}, 4, 1, None),
        ({"TOKENS": 32}, 4, 1, None),
        ({"TOKENS": 32}, 2, 1, None),
        ({"TOKENS": 128}, 8, 1, None),
    ),
    key=["size", "C"],
    cache_results=True,
)
@triton.jit
def _moments_kernel(x, moments, size, num_tokens, C: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = columns < C
    x += sample * num_tokens * C + columns
    centre = tl.load(x, mask=in_columns, other=0.0).to(tl.float32)
    first = tl.zeros([TOKENS, COLUMNS], tl.float32)
    second = tl.zeros([TOKENS, COLUMNS], tl.float32)
    for start in range(0, num_tokens, TOKENS):
        tokens = start + tl.arange(0, TOKENS)
        inside = (tokens < num_tokens)[:, None] & in_columns[None, :]
        value = tl.load(x[None, :] + tokens[:, None] * C, mask=inside, other=0.0).to(tl.float32)
        difference = tl.where(inside, value - centre[None, :], 0.0)
        first += difference
        second += difference * difference
    shift = tl.sum(first, 0) / num_tokens
    to = moments + sample * 2 * C + columns
    tl.store(to, centre + shift, mask=in_columns)
    tl.store(to + C, tl.maximum(tl.sum(second, 0) / num_tokens - shift * shift, 0.0), mask=in_columns)


def moments(x: Tensor, num_tokens: int) -> Tensor:
    """Mean and variance of each sample's channels, from differences from its first token.

    Choice: a pass of its own, instead of sums where the map is written, so that products keep their registers.

    Shape: [N * num_tokens, C] -> [N, 2, C] in float32.
    """
    num, c = len(x) // num_tokens, x.shape[1]
    result = x.new_empty(num, 2, c, dtype=torch.float32)
    _moments_kernel[(num, triton.cdiv(c, 64))](x, result, _size(x), num_tokens, C=c, COLUMNS=64)
    return result


def moments_reference(x: Tensor, num_tokens: int) -> Tensor:
    """The same in PyTorch."""
    return torch.stack(collapse.moments(x.float().unflatten(0, (-1, num_tokens))), 1)


@triton.jit
def _coefficients(
    mean, var, norm1_weight, norm1_bias, norm2_weight, norm2_bias, fc2_bias, columns, eps, C: tl.constexpr
):
    """A sample's scale, shift, gain and offset from its moments: collapse.coefficients."""
    inside = columns < C
    weight = tl.load(norm1_weight + columns, mask=inside, other=0.0)
    bias = tl.load(norm1_bias + columns, mask=inside, other=0.0)
    middle = tl.sum(mean, 0) / C
    difference = tl.where(inside, mean - middle, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(var + difference * difference, 0) / C + eps)
    gain = 1.0 + rstd * weight
    offset = bias - weight * (rstd * middle)
    mean = mean + difference * rstd * weight + bias

    weight = tl.load(norm2_weight + columns, mask=inside, other=0.0)
    bias = tl.load(norm2_bias + columns, mask=inside, other=0.0)
    middle = tl.sum(mean, 0) / C
    difference = tl.where(inside, mean - middle, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(gain * gain * var + difference * difference, 0) / C + eps)
    shift = bias + rstd * weight * (offset - middle)
    return rstd * weight * gain, shift, gain, offset + tl.load(fc2_bias + columns, mask=inside, other=0.0)


@triton.jit
def _coefficients_kernel(
    moments, norm1_weight, norm1_bias, norm2_weight, norm2_bias, fc2_bias, table, eps,
    C: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    inside = columns < C
    mean = tl.load(moments + sample * 2 * C + columns, mask=inside, other=0.0)
    var = tl.load(moments + sample * 2 * C + C + columns, mask=inside, other=0.0)
    scale, shift, gain, offset = _coefficients(
        mean, var, norm1_weight, norm1_bias, norm2_weight, norm2_bias, fc2_bias, columns, eps, C
    )
    to = table + sample * 4 * C + columns
    tl.store(to, scale, mask=inside)
    tl.store(to + C, shift, mask=inside)
    tl.store(to + 2 * C, gain, mask=inside)
    tl.store(to + 3 * C, offset, mask=inside)


def coefficient_table(moments: Tensor, block: BlockWeights, eps: float) -> Tensor:
    """A block's affine maps for each sample: scale, shift, gain and offset. Shape: [N, 2, C] -> [N, 4, C]."""
    num, _, c = moments.shape
    table = moments.new_empty(num, 4, c)
    norms = (block.norm1_weight, block.norm1_bias, block.norm2_weight, block.norm2_bias, block.fc2_bias)
    _coefficients_kernel[(num,)](moments, *norms, table, eps, C=c, COLUMNS=triton.next_power_of_2(c))
    return table


def coefficient_table_reference(moments: Tensor, block: BlockWeights, eps: float) -> Tensor:
    """The same in PyTorch."""
    return torch.stack(collapse.coefficients(moments[:, 0], moments[:, 1], block, eps)[:4], 1)


@triton.jit
def _affine_kernel(x, table, normed, M, num_tokens, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < M)[:, None] & (columns < C)[None, :]
    here = rows.to(tl.int64)[:, None] * C + columns[None, :]
    value = tl.load(x + here, mask=inside, other=0.0)
    at = table + (rows // num_tokens).to(tl.int64)[:, None] * 4 * C + columns[None, :]
    scale, shift = tl.load(at, mask=inside, other=0.0), tl.load(at + C, mask=inside, other=0.0)
    gain, offset = tl.load(at + 2 * C, mask=inside, other=0.0), tl.load(at + 3 * C, mask=inside, other=0.0)
    wide = value.to(tl.float32)
    tl.store(normed + here, (scale * wide + shift).to(value.dtype), mask=inside)
    tl.store(x + here, (gain * wide + offset).to(value.dtype), mask=inside)


def affine(x: Tensor, table: Tensor, num_tokens: int) -> Tensor:
    """The affine maps of a block of wide maps: returns scale * x + shift; x becomes gain * x + offset, in place.

    Shape: x [M, C], table [N, 4, C] -> [M, C].
    """
    normed, (m, c) = torch.empty_like(x), x.shape
    _affine_kernel[(triton.cdiv(m, 32), triton.cdiv(c, 64))](x, table, normed, m, num_tokens, C=c, ROWS=32, COLUMNS=64)
    return normed


def affine_reference(x: Tensor, table: Tensor, num_tokens: int) -> Tensor:
    """The same in PyTorch."""
    scale, shift, gain, offset = (vectors.repeat_interleave(num_tokens, 0) for vectors in table.unbind(1))
    normed = (scale * x.float() + shift).to(x.dtype)
    x.copy_(gain * x.float() + offset)
    return normed


@triton.jit
def _select(chosen, value, otherwise, PRECISION: tl.constexpr):
    """`value` in the rows where `chosen` is -1, `otherwise` where it is 0, both in 16 bits. Two values at once."""
    if INTERPRETED or PRECISION == "ieee":
        return tl.where(chosen != 0, value, otherwise)
    return tl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, $3, 0xCA;", "=r,r,r,r", [chosen, value, otherwise], value.dtype, is_pure=True, pack=2
    )


@triton.jit
def _multiply_add(x, scale, shift, PRECISION: tl.constexpr):
    """scale * x + shift in x's type, rounded once. Two values of 16 bits at once."""
    if INTERPRETED or PRECISION == "ieee":
        return (scale.to(tl.float32) * x.to(tl.float32) + shift.to(tl.float32)).to(x.dtype)
    if x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [x, scale, shift], x.dtype, is_pure=True, pack=2
        )
    return tl.inline_asm_elementwise(
        "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [x, scale, shift], x.dtype, is_pure=True, pack=2
    )


@triton.jit
def _prologue(
    x, table, first_row, columns, in_columns, M, num_tokens, C: tl.constexpr, SPANS: tl.constexpr, ROWS: tl.constexpr,
    WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scale * x + shift, each row with its sample's, in x's type. Rows beyond the map repeat its last."""
    rows = first_row + tl.arange(0, ROWS)
    at = x + tl.minimum(rows, M - 1).to(tl.int64)[:, None] * C + columns[None, :]
    value = _load(at, in_columns[None, :], WHOLE)
    first = first_row // num_tokens
    at = table + first.to(tl.int64) * 4 * C + columns
    scale = tl.broadcast_to(_load(at, in_columns, WHOLE).to(value.dtype)[None, :], value.shape)
    shift = tl.broadcast_to(_load(at + C, in_columns, WHOLE).to(value.dtype)[None, :], value.shape)
    for span in tl.static_range(1, SPANS):
        sample = tl.minimum(first + span, (M - 1) // num_tokens)
        chosen = tl.where(rows >= sample * num_tokens, -1, 0).to(tl.int16)[:, None]
        at = table + sample.to(tl.int64) * 4 * C + columns
        scale = _select(chosen, _load(at, in_columns, WHOLE).to(value.dtype)[None, :], scale, PRECISION)
        shift = _select(chosen, _load(at + C, in_columns, WHOLE).to(value.dtype)[None, :], shift, PRECISION)
    return _multiply_add(value, scale, shift, PRECISION)


@triton.jit
def _epilogue(
    product, x, table, first_row, start, M, num_tokens,
    C: tl.constexpr, SPANS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x = gain * x + offset + product in COLUMNS columns from `start`, in place.

    Wide tiles are written in two halves, which needs fewer registers.
    """
    if COLUMNS > 64:
        left, right = tl.split(tl.permute(tl.reshape(product, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
        _epilogue(left, x, table, first_row, start, M, num_tokens, C, SPANS, ROWS, COLUMNS // 2)
        _epilogue(right, x, table, first_row, start + COLUMNS // 2, M, num_tokens, C, SPANS, ROWS, COLUMNS // 2)
    else:
        rows, columns = first_row + tl.arange(0, ROWS), start + tl.arange(0, COLUMNS)
        inside = (rows < M)[:, None] & (columns < C)[None, :]
        here = x + rows.to(tl.int64)[:, None] * C + columns[None, :]
        old = tl.load(here, mask=inside, other=0.0)
        first, in_columns = first_row // num_tokens, columns < C
        at = table + first.to(tl.int64) * 4 * C + 2 * C + columns
        gain = tl.load(at, mask=in_columns, other=0.0)[None, :]
        offset = tl.load(at + C, mask=in_columns, other=0.0)[None, :]
        for span in tl.static_range(1, SPANS):
            sample = tl.minimum(first + span, (M - 1) // num_tokens)
            at = table + sample.to(tl.int64) * 4 * C + 2 * C + columns
            later = (rows >= sample * num_tokens)[:, None]
            gain = tl.where(later, tl.load(at, mask=in_columns, other=0.0)[None, :], gain)
            offset = tl.where(later, tl.load(at + C, mask=in_columns, other=0.0)[None, :], offset)
        value = (gain * old.to(tl.float32) + (offset + product)).to(old.dtype)
        tl.store(here, value, mask=inside)


def _columns(c: int) -> tuple[int, int]:
    """A width as one or two powers of 2, the sum of which it is; else the next power of 2."""
    largest = triton.next_power_of_2(c + 1) // 2
    rest = c - largest
    if largest >= 16 and (rest == 0 or (rest >= 16 and rest & (rest - 1) == 0)):
        return largest, rest
    return max(16, triton.next_power_of_2(c)), 0


@triton.autotune(
    _configs(
        ({"DEPTH": 32}, 4, 3, None),
        ({"DEPTH": 32}, 4, 2, 168),
        ({"DEPTH": 64}, 4, 2, None),
        ({"DEPTH": 64}, 8, 2, 128),
    ),
    key=["size", "H", "C"],
    restore_value=["x"],
    cache_results=True,
)
@triton.jit
def _mlp_kernel(
    x, table, fc1_weight, fc1_bias, fc2_weight, M, size, num_tokens, C: tl.constexpr, H: tl.constexpr,
    SPANS: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr, COLUMNS: tl.constexpr, MORE: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    first_row = tl.program_id(0) * ROWS
    columns = tl.arange(0, COLUMNS)
    in_columns = columns < C
    WHOLE: tl.constexpr = C == COLUMNS + MORE and H % DEPTH == 0
    a = _prologue(
        x, table, first_row, columns, in_columns, M, num_tokens, C, SPANS, ROWS, C == COLUMNS + MORE, PRECISION
    )
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    if MORE:
        more_columns = COLUMNS + tl.arange(0, MORE)
        more_inside = more_columns < C
        b = _prologue(x, table, first_row, more_columns, more_inside, M, num_tokens, C, SPANS, ROWS, True, PRECISION)
        more = tl.zeros([ROWS, MORE], tl.float32)
    for start in range(0, H, DEPTH):
        units = start + tl.arange(0, DEPTH)
        in_units = units < H
        w = _load(fc1_weight + units[None, :] * C + columns[:, None], in_units[None, :] & in_columns[:, None], WHOLE)
        hidden = tl.dot(a, w, input_precision=PRECISION)
        if MORE:
            w = _load(fc1_weight + units[None, :] * C + more_columns[:, None], in_units[None, :], WHOLE)
            hidden = tl.dot(b, w, hidden, input_precision=PRECISION)
        hidden += _load(fc1_bias + units, in_units, H % DEPTH == 0)[None, :]
        h = _gelu(hidden, PRECISION).to(a.dtype)
        w = _load(fc2_weight + columns[None, :] * H + units[:, None], in_columns[None, :] & in_units[:, None], WHOLE)
        total = tl.dot(h, w, total, input_precision=PRECISION)
        if MORE:
            w = _load(fc2_weight + more_columns[None, :] * H + units[:, None], in_units[:, None], WHOLE)
            more = tl.dot(h, w, more, input_precision=PRECISION)
    _epilogue(total, x, table, first_row, 0, M, num_tokens, C, SPANS, ROWS, COLUMNS)
    if MORE:
        _epilogue(more, x, table, first_row, COLUMNS, M, num_tokens, C, SPANS, ROWS, MORE)


def mlp(x: Tensor, table: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, num_tokens: int) -> None:
    """x = gain * x + offset + fc2(gelu(fc1(scale * x + shift))), in place, in one kernel; for narrow maps.

    Shape: x [M, C], table [N, 4, C], fc1_weight [H, C], fc1_bias [H], fc2_weight [C, H].
    """
    (m, c), rows, (columns, more) = x.shape, tile_rows(len(x), num_tokens), _columns(x.shape[1])
    _mlp_kernel[(triton.cdiv(m, rows),)](
        x, table, fc1_weight, fc1_bias, fc2_weight, m, _size(x), num_tokens, C=c, H=len(fc1_bias),
        SPANS=num_spans(rows, num_tokens), ROWS=rows, PRECISION=_precision(x), COLUMNS=columns, MORE=more,
    )  # fmt: skip


def mlp_reference(
    x: Tensor, table: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, num_tokens: int
) -> None:
    """The same in PyTorch; in x's type the first affine map takes its coefficients rounded."""
    scale, shift = (table[:, i].to(x.dtype).float().repeat_interleave(num_tokens, 0) for i in (0, 1))
    gain, offset = (table[:, i].repeat_interleave(num_tokens, 0) for i in (2, 3))
    product = (scale * x.float() + shift).to(x.dtype).float() @ fc1_weight.float().T + fc1_bias.float()
    unit = 1.0 if x.dtype == torch.float32 else GELU_SCALE
    hidden = (F.gelu(product / unit) * (1.0 if unit == 1 else 2 * unit)).to(x.dtype)
    x.copy_(gain * x.float() + offset + hidden.float() @ fc2_weight.float().T)


@triton.jit
def _pooled_kernel(moments, pooled, eps, C: tl.constexpr, COLUMNS: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    inside = columns < C
    mean = tl.load(moments + sample * 2 * C + columns, mask=inside, other=0.0)
    var = tl.load(moments + sample * 2 * C + C + columns, mask=inside, other=0.0)
    difference = tl.where(inside, mean - tl.sum(mean, 0) / C, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(var + difference * difference, 0) / C + eps)
    tl.store(pooled + sample * C + columns, difference * rstd, mask=inside)


def pooled(moments: Tensor, eps: float) -> Tensor:
    """The head's norm, then its average over the tokens, from the last map's moments. Shape: [N, 2, C] -> [N, C]."""
    num, _, c = moments.shape
    result = moments.new_empty(num, c)
    _pooled_kernel[(num,)](moments, result, eps, C=c, COLUMNS=triton.next_power_of_2(c))
    return result


def pooled_reference(moments: Tensor, eps: float) -> Tensor:
    """The same in PyTorch."""
    return collapse.normalised_mean(moments[:, 0], moments[:, 1], eps)


def _size(x: Tensor) -> int:
    """The size by which kernels are tuned: the map's number of rows, rounded up to a power of 2."""
    return triton.next_power_of_2(len(x))


def _precision(x: Tensor) -> str:
    """Input precision of tl.dot: float32 is not rounded to TF32; for narrower types it means nothing."""
    return "ieee" if x.dtype == torch.float32 else "tf32"
