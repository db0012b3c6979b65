"""Whether a network is worth running in int8, and which of its layers are not.

An int8 payload is judged on validation images, beside the same engine in floating point, in one run. Where it loses too
much accuracy, the layers that cost most stay in float32, more and more of them up to half.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

from riformer.export.graph import OnnxFile, Options
from riformer.export.onnx import float_onnx
from riformer.export.quantise import product_names
from riformer.export.targets import Target
from riformer.runtime.latency import Spread, images_per_s
from riformer_runtime.engines import PayloadRunner

NUM_NAMED = 5  # layers in a message
NUM_PROBED = 16  # images on which layers are compared
ROUNDS, SECONDS = 9, 0.2


@dataclass(frozen=True)
class Limits:
    """What an int8 payload has to reach.

    Attributes:
        max_drop: of top-1 on the validation images, points.
        min_speedup: over the engine's fastest precision in floating point.
    """

    max_drop: float = 0.5
    min_speedup: float = 1.1


class NotWorthItError(Exception):
    """int8 loses too much accuracy, or is not faster; the message has the numbers."""


def export_int8(
    model: nn.Module,
    target: Target,
    folder: Path,
    options: Options,
    images: np.ndarray,
    accuracy: Callable[[PayloadRunner], float],
    limits: Limits,
    status: Callable[[str], None],
) -> PayloadRunner:
    """Writes the int8 payload, and notes its accuracy and speed in it.

    Args:
        model: the network.
        target: with int8.
        folder: into which the payload is written.
        options: with the precision int8.
        images: for calibration, as the graph takes them. Shape: [N, C, H, W].
        accuracy: top-1 on validation images, in percent.
        limits: that it has to keep.
        status: is called with a line about what is being done.

    Raises:
        NotWorthItError: it misses a limit; the message names the layers that cost most.
    """
    example = torch.from_numpy(images)
    with TemporaryDirectory() as temporary, float_onnx(model, example, options) as source:
        options = replace(options, source=source)
        floats = {}
        for precision in target.precisions:
            if precision in ("fp32", "bf16"):
                status(f"{precision}, to compare with")
                floats[precision] = target.export(
                    model, example[:2], Path(temporary), replace(options, precision=precision)
                )
        expected = accuracy(floats["fp32"])
        costs: list[tuple[str, str, float]] = []
        unquantised: tuple[str, ...] = ()
        while True:
            status(f"quantising, {len(unquantised)} layers in float32")
            runner = target.export(model, example, folder, replace(options, unquantised=unquantised))
            top1 = accuracy(runner)
            if expected - top1 <= limits.max_drop:
                break
            if not costs:
                costs = layer_costs(model, target, options, source, images[:NUM_PROBED], floats["fp32"], status)
            num_kept = max(1, 2 * len(unquantised))
            if num_kept > len(costs) / 2:
                raise NotWorthItError(
                    f"top-1 falls from {expected:.2f} % to {top1:.2f} %, more than --max-drop {limits.max_drop:g} "
                    f"allows, with {len(unquantised)} of {len(costs)} layers in float32. {_named(costs)}"
                )
            unquantised = tuple(node for node, _, _ in costs[:num_kept])
        status("speed")
        batch = images[: 1 if options.inside == "resize" else 8]
        rates = images_per_s({**floats, "int8": runner}, batch, ROUNDS, SECONDS)
        best = max(floats, key=lambda name: Spread.of(rates[name]).median)
        speedup = Spread.of([a / b for a, b in zip(rates["int8"], rates[best], strict=True)])
        if speedup.median < limits.min_speedup:
            costs = costs or layer_costs(model, target, options, source, images[:NUM_PROBED], floats["fp32"], status)
            raise NotWorthItError(
                f"{speedup.median:.2f} times as fast as {best} on this machine ({speedup.low:.2f} to "
                f"{speedup.high:.2f}), and --min-speedup is {limits.min_speedup:g}; top-1 is {top1:.2f} %, and "
                f"{expected:.2f} % in fp32. {_named(costs)}"
            )
    noted = {
        "top1": top1,
        "top1_fp32": expected,
        "speedup": speedup.median,
        "speedup_over": best,
        "unquantised": [name for node, name, _ in costs if node in unquantised],
    }
    runner.payload = replace(runner.payload, accuracy=noted)
    return runner


def layer_costs(
    model: nn.Module,
    target: Target,
    options: Options,
    source: OnnxFile,
    images: np.ndarray,
    reference: PayloadRunner,
    status: Callable[[str], None],
) -> list[tuple[str, str, float]]:
    """The error that each layer brings when it alone is quantised, the costliest first.

    Returns:
        For each layer its name in the graph, its name in the model, and the root mean square of the logits' error, as a
        share of the logits' own.
    """
    example, expected = torch.from_numpy(images), _in_turn(reference, images)
    costs = []
    names = product_names(source.path)
    for i, (node, name) in enumerate(names.items()):
        status(f"what each layer costs: {i + 1} of {len(names)}")
        others = tuple(other for other in names if other != node)
        with TemporaryDirectory() as folder:
            runner = target.export(model, example, Path(folder), replace(options, unquantised=others))
            error = _in_turn(runner, images) - expected
        costs.append((node, name, float(np.sqrt(np.mean(error**2) / np.mean(expected**2)))))
    return sorted(costs, key=lambda cost: -cost[2])


def _in_turn(runner: PayloadRunner, images: np.ndarray) -> Any:
    return np.concatenate([runner(images[i : i + 8]) for i in range(0, len(images), 8)])


def _named(costs: list[tuple[str, str, float]]) -> str:
    worst = ", ".join(f"{name} {cost:.1%}" for _, name, cost in costs[:NUM_NAMED])
    return f"The layers that cost most, by their error of the logits: {worst}"
