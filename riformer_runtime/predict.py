"""Images in, class names out, by anything that is a `Runner`."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from riformer_runtime.engines import Runner, input_of
from riformer_runtime.images import read_image


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, best first, or why it could not be read."""

    path: str
    classes: tuple[tuple[str, float], ...] = ()
    error: str = ""


def predict(
    runner: Runner, images: Iterable[str | Path | BinaryIO], top_k: int = 5, batch_size: int = 32
) -> Iterator[Prediction]:
    """Predictions in the order of the images, with the network's own preprocessing; an unreadable image gives an error.

    Args:
        runner: `open_runner(ARTEFACT)`, what `riformer.optimize` returns, or another `Runner`.
        images: files, or open binary files.
        top_k: classes of each image.
        batch_size: images computed at once.

    Raises:
        ValueError: `top_k` or `batch_size` below 1, or a network without classes.
        RuntimeError: the network's logits are not finite.
    """
    for name, value in (("top_k", top_k), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be 1 or more")
    if runner.manifest.num_classes == 0:
        raise ValueError("the model has no classifier (num_classes=0), so it predicts no classes")
    images = iter(images)
    while batch := list(islice(images, batch_size)):
        inputs, errors = [], {}
        for i, image in enumerate(batch):
            try:
                inputs.append(input_of(runner, read_image(image)))
            except ValueError as error:
                errors[i] = str(error)
        classes = iter(most_probable(runner, probabilities(runner, inputs), top_k) if inputs else [])
        for i, image in enumerate(batch):
            path = str(image) if isinstance(image, str | Path) else getattr(image, "name", "-")
            yield Prediction(path, error=errors[i]) if i in errors else Prediction(path, next(classes))


def classify(runner: Runner, images: Sequence[Image.Image], top_k: int = 5) -> list[tuple[tuple[str, float], ...]]:
    """Names and probabilities of the most probable classes of RGB images, computed at once.

    Raises:
        RuntimeError: the network's logits are not finite.
    """
    return most_probable(runner, probabilities(runner, [input_of(runner, image) for image in images]), top_k)


def probabilities(runner: Runner, inputs: Sequence[np.ndarray]) -> np.ndarray:
    """The probability of each class. Shape: one or more inputs [C, H, W] -> [N, K], float32.

    Raises:
        RuntimeError: the network's logits are not finite.
    """
    groups = [np.stack(list(group)) for _, group in groupby(inputs, key=np.shape)]  # a graph that resizes takes any
    logits = np.concatenate([runner(group) for group in groups])
    if not np.isfinite(logits).all():
        raise RuntimeError("the model's logits are not finite: its weights are damaged, or do not suit the precision")
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def most_probable(runner: Runner, probability: np.ndarray, top_k: int) -> list[tuple[tuple[str, float], ...]]:
    """Names and probabilities of each image's most probable classes. Shape: probability [N, K]."""
    names = runner.manifest.class_names
    order = np.argsort(-probability, axis=1, kind="stable")[:, :top_k]
    return [tuple((names[i], float(row[i])) for i in best) for row, best in zip(probability, order, strict=True)]
