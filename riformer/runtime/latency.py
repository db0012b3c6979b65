"""Throughput of models that take turns."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spread:
    """Median, lower and upper quartile of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """The spread of two values or more."""
        low, median, high = statistics.quantiles(values, n=4)
        return cls(median, low, high)


@torch.inference_mode()
def images_per_s(
    models: Mapping[str, Callable[[Any], Any]], images: Any, rounds: int = 15, seconds: float = 0.02
) -> dict[str, list[float]]:
    """Images per second of each model in each round; the models take turns (A B C A B C ...), after a warm-up.

    A turn repeats the batch for about `seconds`, so that the clock's resolution does not matter for fast models.
    Compare models round by round, because other load on the machine then slows all of them.

    Shape: images [N, 3, H, W], a tensor on the models' device, or an array for runners.
    """
    repeats = {}
    for name, model in models.items():
        _timed(model, images, 2)  # warm-up
        repeats[name] = max(1, round(seconds / _timed(model, images, 2) * 2))
    rates: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            rates[name].append(len(images) * repeats[name] / _timed(model, images, repeats[name]))
    return rates


def _timed(model: Callable[[Any], Any], images: Any, repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        model(images)
    if isinstance(images, Tensor) and images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began
