"""Throughput of networks on engines, interleaved in one process, each row beside its error and its limit.

In each round every competitor has a turn (A B C A B C ...): what else the machine does then hits all of them. With
them take turns their own matrix products alone, and one large product, the device's peak. No speed is recorded without
the error against the same weights in eager float32.
"""

import ast
import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from riformer.atomic import write_text
from riformer.export.engines import BACKENDS
from riformer.measure.cost import count_macs, count_params
from riformer.measure.latency import Spread, images_per_s
from riformer.measure.limit import product_peak, products_alone
from riformer.model.fuse import deploy_form, remaining_mixers
from riformer.model.weights import load
from riformer.runtime.native import supported
from riformer.runtime.optimize import DTYPES
from riformer.runtime.parity import compare, full_float32
from riformer.train.run import environment

BYTES = {"fp32": 4, "bf16x3": 4, "bf16": 2, "fp16": 2, "int8": 1, "fp64": 8}


@dataclass(frozen=True)
class Competitor:
    """A network on an engine in a precision."""

    model: str
    backend: str
    precision: str

    def __str__(self) -> str:
        return f"{self.model} {self.backend} {self.precision}"


def open_network(name: str, deploy: bool = True) -> nn.Module:
    """A network in eval mode, in deploy form unless that is not wanted.

    Args:
        name: a model of timm, with arguments as `riformer_s12:mixer=pooling,num_classes=10`; or a run folder, a model
            folder or a weights file. A model by name gets random weights in which nothing is hidden (`randomised`).

    Raises:
        ValueError: nothing of that name, or an argument that is not NAME=VALUE.
    """
    model_name, _, given = name.partition(":")
    if not timm.is_model(model_name):
        if not Path(name).exists():
            raise ValueError(
                f"no model {name!r}: neither a name in timm nor a run folder, model folder or weights file"
            )
        model = load(name).float().eval()
        return deploy_form(model) if deploy else model
    args: dict[str, Any] = {}
    for item in given.split(",") if given else ():
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"{item!r} in {name!r} is not NAME=VALUE")
        try:
            args[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            args[key] = value
    model = randomised(timm.create_model(model_name, **args)).eval()
    return deploy_form(model) if deploy else model


def randomised(model: nn.Module, seed: int = 0) -> Any:
    """The model with every norm, affine, layer scale and bias far from its start, which would hide wrong algebra."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_scale" in name or name.endswith("gamma"):
                parameter.copy_(0.5 + 0.2 * normal(parameter))
            elif parameter.ndim > 1:
                parameter.copy_(normal(parameter) / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_((1.0 if name.endswith("weight") else 0.0) + 0.5 * normal(parameter))
    return model


def competitors(
    models: Sequence[str], backends: Sequence[str], precisions: Sequence[str]
) -> tuple[list[Competitor], list[Competitor]]:
    """Every combination that exists, and those that do not: a precision that an engine lacks, a form that is not there.

    Raises:
        ValueError: an unknown backend or precision, or nothing left to measure.
    """
    known = {precision for backend in BACKENDS.values() for precision in backend.precisions}
    for name, values, table in (("backend", backends, BACKENDS), ("precision", precisions, known)):
        if unknown := [value for value in values if value not in table]:
            raise ValueError(f"no {name} {unknown[0]!r}; known are {', '.join(table)}")
    there: list[Competitor] = []
    absent: list[Competitor] = []
    for model in models:
        is_riformer = not remaining_mixers(open_network(model))
        for backend in backends:
            for precision in precisions:
                entry = BACKENDS[backend]
                exists = precision in entry.precisions and (is_riformer or not entry.riformer_only)
                (there if exists else absent).append(Competitor(model, backend, precision))
    if not there:
        raise ValueError(f"none of the backends {', '.join(backends)} has {', '.join(precisions)} for these models")
    return there, absent


def bench(
    entries: Sequence[Competitor],
    batch_sizes: Sequence[int] = (8,),
    img_sizes: Sequence[int] = (224,),
    threads: Sequence[int] = (1,),
    file: str | Path | None = None,
    rounds: int = 15,
    seconds: float = 0.2,
    memory: bool = True,
    status: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measures every group of image size, batch size and number of threads, each in one go; see `measure`.

    Args:
        entries: what to compare, the one that ratios refer to first; `competitors` makes every combination.
        file: JSON file to keep the results in after each group; groups that it holds are not measured again.

    Raises:
        ValueError: the file holds another comparison.
    """
    settings = {"competitors": [asdict(e) for e in entries], "rounds": rounds, "seconds": seconds}
    result: dict[str, Any] = {"kind": "bench", **settings, "groups": []}
    if file and Path(file).exists():
        kept = json.loads(Path(file).read_text())
        if changed := [name for name, value in settings.items() if kept.get(name) != value]:
            raise ValueError(f"{file} holds another comparison ({', '.join(changed)} differ); give another file")
        result = kept
    keys = ("img_size", "num_threads", "batch_size")
    done = [tuple(group[key] for key in keys) for group in result["groups"]]
    for sizes in product(img_sizes, threads, batch_sizes):
        if sizes in done:
            continue
        named = dict(zip(keys, sizes, strict=True))
        where = ", ".join(f"{key} {value}" for key, value in named.items())
        told = partial(_told, status, where)
        result["groups"].append(measure(entries, **named, rounds=rounds, seconds=seconds, memory=memory, status=told))
        if file:
            write_text(file, json.dumps(result, indent=1) + "\n")
    return result


def _told(status: Callable[[str], None], where: str, text: str) -> None:
    status(f"{where}: {text}")


@torch.inference_mode()
def measure(
    entries: Sequence[Competitor],
    batch_size: int,
    img_size: int,
    num_threads: int,
    rounds: int = 15,
    seconds: float = 0.2,
    memory: bool = True,
    status: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """All competitors at one batch size, image size and number of threads.

    Args:
        seconds: how long a turn lasts at least.
        memory: measure each one's peak as well; on a CPU that is a process of its own for each.
        status: is told what is being done.

    Returns:
        Rows in the order of `entries`, and the peaks, as JSON takes them; rates are images per second by round.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        images = torch.randn(batch_size, 3, img_size, img_size, generator=torch.Generator().manual_seed(0)).to(device)
        networks = {name: open_network(name).to(device) for name in dict.fromkeys(e.model for e in entries)}
        with full_float32():
            expected = {name: network(images) for name, network in networks.items()}
        runners: dict[str, Callable[[Tensor], Any]] = {}
        rows = []
        for entry in entries:
            status(f"building {entry}")
            network = networks[entry.model]
            runner, peak_mib = _with_peak(entry, network, images, num_threads, memory)
            parity = compare(partial(_given, expected[entry.model]), runner, [images])
            runners[str(entry)] = runner
            params = count_params(network)
            macs = count_macs(network, img_size)
            size = {"params": params, "size_mib": params * BYTES[entry.precision] / 2**20, "macs": macs}
            error = {"max_rel": parity.max_rel, "top1_agreement": parity.top1_agreement}
            rows.append({**asdict(entry), **size, "peak_mib": peak_mib, **error})
            dtype = _product_dtype(entry.precision)
            if dtype and f"products of {entry.model} {dtype}" not in runners:
                runners[f"products of {entry.model} {dtype}"] = products_alone(network, images, dtype)
        dtypes = dict.fromkeys(dtype for entry in entries if (dtype := _product_dtype(entry.precision)))
        peaks = {dtype: product_peak(dtype, device) for dtype in dtypes}
        found: dict[torch.dtype, list[float]] = {dtype: [] for dtype in dtypes}
        for dtype, peak in peaks.items():
            peak()  # warm-up
            runners[f"peak {dtype}"] = partial(_note, found[dtype], peak)
        status(f"{len(entries)} competitors, {rounds} rounds")
        rates = images_per_s(runners, images, rounds, seconds)
    finally:
        torch.set_num_threads(before)
    first = rates[str(entries[0])]
    for row, entry in zip(rows, entries, strict=True):
        own, dtype = rates[str(entry)], _product_dtype(entry.precision)
        row["rates"] = own
        row["images_per_s"] = asdict(Spread.of(own))
        row["ratio"] = asdict(Spread.of([a / b for a, b in zip(own, first, strict=True)]))
        if dtype:
            alone = rates[f"products of {entry.model} {dtype}"]
            row["of_products_alone"] = asdict(Spread.of([a / b for a, b in zip(own, alone, strict=True)]))
            row["of_peak"] = row["images_per_s"]["median"] * row["macs"] / Spread.of(found[dtype]).median
    env = {**environment(1), "num_threads": num_threads, "instruction_sets": list(supported())}
    settings = {"batch_size": batch_size, "img_size": img_size, "num_threads": num_threads}
    limits = {str(dtype).removeprefix("torch."): Spread.of(values).median for dtype, values in found.items()}
    return {"env": env, **settings, "rounds": rounds, "macs_per_s_peak": limits, "rows": rows}


def _given(logits: Tensor, images: Tensor) -> Tensor:
    return logits


def _note(values: list[float], peak: Callable[[], float], images: Tensor) -> None:
    values.append(peak())


def _product_dtype(precision: str) -> torch.dtype | None:
    """In which PyTorch's products are this precision's limit; None for int8, which has no such product here."""
    return DTYPES.get(precision)


def _with_peak(
    entry: Competitor, network: nn.Module, images: Tensor, num_threads: int, memory: bool
) -> tuple[Callable[[Tensor], Tensor], float | None]:
    """The competitor's runner, warm, and its peak memory in MiB."""
    if images.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    runner = BACKENDS[entry.backend].build(network, images, entry.precision)
    runner(images)
    if images.is_cuda:
        return runner, (torch.cuda.max_memory_allocated() - held) / 2**20 if memory else None
    return runner, peak_mib(entry, images.shape, num_threads) if memory else None


def peak_mib(entry: Competitor, shape: Sequence[int], num_threads: int) -> float:
    """Memory in MiB that a competitor holds while it runs, above that of a process that has run a small network.

    Measured in a process of its own: after the runner was built, whatever building took has been given back to the
    system, and the largest resident size of three runs is read. Linux.

    Raises:
        RuntimeError: the process ended without an answer.
    """
    spawn = get_context("spawn")
    receiving, sending = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_measure_peak, args=(entry, tuple(shape), num_threads, sending))
    process.start()
    sending.close()
    try:
        return receiving.recv()
    except EOFError as error:
        raise RuntimeError(f"the process that measures the memory of {entry} ended early") from error
    finally:
        process.join()


@torch.inference_mode()
def _measure_peak(entry: Competitor, shape: tuple[int, ...], num_threads: int, sending: Any) -> None:
    torch.set_num_threads(num_threads)
    images, small = torch.randn(shape), torch.randn(1, 3, 32, 32)
    build = BACKENDS[entry.backend].build
    build(open_network("riformer_micro"), small, entry.precision)(small)  # imports all that building needs
    network = open_network(entry.model)
    weights = sum(p.numel() * p.element_size() for p in network.parameters()) / 2**20
    _give_back()
    before = _status_mib("VmRSS") - weights
    runner = build(network, images, entry.precision)
    del network
    runner(images)
    _give_back()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    for _ in range(3):
        runner(images)
    sending.send(_status_mib("VmHWM") - before)


def _give_back() -> None:
    """Returns freed memory to the system."""
    import ctypes

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _status_mib(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024
