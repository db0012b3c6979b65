"""Throughput of networks on engines, measured in turns in one process, each row beside its error and its limit.

In each round every competitor has a turn (A B C A B C ...), so that other load on the machine slows all of them. The
network's matrix products alone, and the device's peak rate of products, take turns with them. Every speed is recorded
with the error against the same weights in eager float32.
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
from riformer.export.engines import ENGINES
from riformer.machine import environment
from riformer.measure.cost import count_macs, count_params
from riformer.measure.limit import product_peak, products_alone
from riformer.model.fuse import deploy_form, remaining_mixers
from riformer.model.weights import load
from riformer.runtime.latency import Spread, images_per_s
from riformer.runtime.optimize import DTYPES
from riformer.runtime.parity import compare, full_float32
from riformer_runtime.native.library import supported

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
    """A network in eval mode.

    Args:
        name: a model of timm, with arguments as in `riformer_s12:mixer=pooling,num_classes=10`; or a run folder, a
            model folder or a weights file. A model by name gets random weights (`randomised`).
        deploy: whether it is brought to deploy form.

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
    """The model with norms, affines, layer scales and biases far from initial values, which can hide wrong algebra."""
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
    """The combinations that exist, and those that do not, because the engine lacks the precision or the network's form.

    Raises:
        ValueError: an unknown backend or precision, or nothing left to measure.
    """
    known = {precision for backend in ENGINES.values() for precision in backend.precisions}
    for name, values, table in (("backend", backends, ENGINES), ("precision", precisions, known)):
        if unknown := [value for value in values if value not in table]:
            raise ValueError(f"no {name} {unknown[0]!r}; known are {', '.join(table)}")
    existing: list[Competitor] = []
    missing: list[Competitor] = []
    for model in models:
        is_riformer = not remaining_mixers(open_network(model))
        for backend in backends:
            for precision in precisions:
                entry = ENGINES[backend]
                exists = precision in entry.precisions and (is_riformer or not entry.riformer_only)
                (existing if exists else missing).append(Competitor(model, backend, precision))
    if not existing:
        raise ValueError(f"none of the backends {', '.join(backends)} has {', '.join(precisions)} for these models")
    return existing, missing


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
    """Measures every group of image size, batch size and number of threads; see `measure`.

    Args:
        entries: the competitors, first the one that ratios refer to; `competitors` makes every combination.
        batch_sizes: images at once.
        img_sizes: height and width of the images, pixels.
        threads: numbers of threads on a CPU.
        file: JSON file in which the results are kept after each group; groups that it has are not measured again.
        rounds: see `measure`, as for the others.
        seconds: least duration of a turn.
        memory: whether peak memory is measured.
        status: is called with a line about what is being measured.

    Raises:
        ValueError: the file has another comparison.
    """
    settings = {"competitors": [asdict(e) for e in entries], "rounds": rounds, "seconds": seconds}
    result: dict[str, Any] = {"kind": "bench", **settings, "groups": []}
    if file and Path(file).exists():
        kept = json.loads(Path(file).read_text())
        if changed := [name for name, value in settings.items() if kept.get(name) != value]:
            raise ValueError(f"{file} has another comparison ({', '.join(changed)} differ); give another file")
        result = kept
    keys = ("img_size", "num_threads", "batch_size")
    done = [tuple(group[key] for key in keys) for group in result["groups"]]
    for sizes in product(img_sizes, threads, batch_sizes):
        if sizes in done:
            continue
        named = dict(zip(keys, sizes, strict=True))
        where = ", ".join(f"{key} {value}" for key, value in named.items())
        prefixed = partial(_prefixed, status, where)
        group = measure(entries, **named, rounds=rounds, seconds=seconds, memory=memory, status=prefixed)
        result["groups"].append(group)
        if file:
            write_text(file, json.dumps(result, indent=1) + "\n")
    return result


def _prefixed(status: Callable[[str], None], where: str, text: str) -> None:
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
        batch_size: images at once.
        img_size: height and width of the images, pixels.
        num_threads: threads on a CPU.
        rounds: turns of each competitor.
        seconds: least duration of a turn.
        memory: whether each one's peak memory is measured; on a CPU each takes a process of its own.
        status: is called with a line about what is being measured.

    Returns:
        Rows in the order of `entries`, and the peaks, all of it JSON; rates are images per second by round.
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
            parity = compare(partial(_fixed_logits, expected[entry.model]), runner, [images])
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
        peak_rates: dict[torch.dtype, list[float]] = {dtype: [] for dtype in dtypes}
        for dtype, peak in peaks.items():
            peak()  # warm-up
            runners[f"peak {dtype}"] = partial(_record_peak, peak_rates[dtype], peak)
        status(f"{len(entries)} competitors, {rounds} rounds")
        rates = images_per_s(runners, images, rounds, seconds)
    finally:
        torch.set_num_threads(before)
    first = rates[str(entries[0])]
    for row, entry in zip(rows, entries, strict=True):
        values, dtype = rates[str(entry)], _product_dtype(entry.precision)
        row["rates"] = values
        row["images_per_s"] = asdict(Spread.of(values))
        row["ratio"] = asdict(Spread.of([a / b for a, b in zip(values, first, strict=True)]))
        if dtype:
            alone = rates[f"products of {entry.model} {dtype}"]
            row["of_products_alone"] = asdict(Spread.of([a / b for a, b in zip(values, alone, strict=True)]))
            row["of_peak"] = row["images_per_s"]["median"] * row["macs"] / Spread.of(peak_rates[dtype]).median
    env = {**environment(1), "num_threads": num_threads, "instruction_sets": list(supported())}
    settings = {"batch_size": batch_size, "img_size": img_size, "num_threads": num_threads}
    limits = {str(dtype).removeprefix("torch."): Spread.of(values).median for dtype, values in peak_rates.items()}
    return {"env": env, **settings, "rounds": rounds, "macs_per_s_peak": limits, "rows": rows}


def _fixed_logits(logits: Tensor, images: Tensor) -> Tensor:
    return logits


def _record_peak(values: list[float], peak: Callable[[], float], images: Tensor) -> None:
    values.append(peak())


def _product_dtype(precision: str) -> torch.dtype | None:
    """Type of the PyTorch products that are this precision's limit; None for int8, which has none here."""
    return DTYPES.get(precision)


def _with_peak(
    entry: Competitor, network: nn.Module, images: Tensor, num_threads: int, memory: bool
) -> tuple[Callable[[Tensor], Tensor], float | None]:
    """The competitor's runner, warm, and its peak memory in MiB."""
    if images.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    runner = ENGINES[entry.backend].build(network, images, entry.precision)
    runner(images)
    if images.is_cuda:
        return runner, (torch.cuda.max_memory_allocated() - before) / 2**20 if memory else None
    return runner, peak_mib(entry, images.shape, num_threads) if memory else None


def peak_mib(entry: Competitor, shape: Sequence[int], num_threads: int) -> float:
    """Memory in MiB that a competitor needs while it runs, above that of a process that has run a small network.

    Measured on Linux, in a process of its own: when the runner is built, freed memory is returned to the system, and
    the largest resident size during three runs is read.

    Raises:
        RuntimeError: the process ended without a result.
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
    build = ENGINES[entry.backend].build
    build(open_network("riformer_micro"), small, entry.precision)(small)  # imports what building needs
    network = open_network(entry.model)
    weights = sum(p.numel() * p.element_size() for p in network.parameters()) / 2**20
    _release_memory()
    before = _status_mib("VmRSS") - weights
    runner = build(network, images, entry.precision)
    del network
    runner(images)
    _release_memory()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    for _ in range(3):
        runner(images)
    sending.send(_status_mib("VmHWM") - before)


def _release_memory() -> None:
    """Returns freed memory to the system."""
    import ctypes

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _status_mib(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024
