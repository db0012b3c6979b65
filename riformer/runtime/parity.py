"""Numeric agreement of two runnables that should compute the same logits."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ParityReport:
    """Largest difference of logits, absolute and relative to the largest reference logit; share of equal arg-maxes."""

    max_abs: float
    max_rel: float
    top1_agreement: float
    num_images: int


@contextmanager
def full_float32() -> Iterator[None]:
    """Convolutions on a GPU in float32 proper, not in TF32."""
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before


@torch.no_grad()
@full_float32()
def compare(
    reference: Callable[[Tensor], Tensor], candidate: Callable[[Tensor], Tensor], batches: Iterable[Tensor]
) -> ParityReport:
    """Runs both on the same batches, float32 without TF32. Put models into eval mode first. NaN gives NaN differences.

    Shape: batches of images [N, 3, H, W].

    Raises:
        ValueError: no batch came.
    """
    differences, logits = [], []
    agreeing = num_images = 0
    for images in batches:
        expected, actual = reference(images).double(), candidate(images).double()
        differences.append((expected - actual).abs().max())
        logits.append(expected.abs().max())
        agreeing += int((expected.argmax(1) == actual.argmax(1)).sum())
        num_images += len(images)
    if not num_images:
        raise ValueError("no images to compare on")
    # torch's maximum: of values with a NaN among them it is NaN, and not what came before it
    largest_difference, largest_logit = (torch.stack(values).max().item() for values in (differences, logits))
    return ParityReport(
        max_abs=largest_difference,
        max_rel=largest_difference / largest_logit if largest_logit else 0.0,
        top1_agreement=agreeing / num_images,
        num_images=num_images,
    )
