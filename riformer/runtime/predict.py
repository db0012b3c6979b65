"""Images in, class names out."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import torch
from timm.data import ImageNetInfo
from torch import nn

from riformer.images import read_image
from riformer.preprocess import Preprocessing


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, best first, or why it could not be read."""

    path: str
    classes: tuple[tuple[str, float], ...] = ()
    error: str = ""


def class_names(model: nn.Module) -> list[str]:
    """The names noted on the model; ImageNet's for a thousand classes without names; else the numbers."""
    names = model.pretrained_cfg.get("label_names")
    if not names and model.num_classes == 1000:
        names = ImageNetInfo().label_descriptions()
    return list(names or map(str, range(model.num_classes)))


@torch.inference_mode()
def predict(
    model: nn.Module, images: Iterable[str | Path | BinaryIO], top_k: int = 5, batch_size: int = 32
) -> Iterator[Prediction]:
    """Predictions in the order of the images, preprocessed as the model notes; unreadable images give an error each.

    Raises:
        ValueError: `top_k` or `batch_size` below 1.
    """
    for name, value in (("top_k", top_k), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be 1 or more")
    model.eval()
    parameter = next(model.parameters())
    names = class_names(model)
    transform = Preprocessing.of_model(model).transform()
    images = iter(images)
    while batch := list(islice(images, batch_size)):
        tensors, errors = [], {}
        for i, image in enumerate(batch):
            try:
                tensors.append(transform(read_image(image)))
            except ValueError as error:
                errors[i] = str(error)
        top: list[list[tuple[str, float]]] = []
        if tensors:
            probabilities = model(torch.stack(tensors).to(parameter)).float().softmax(dim=1)
            values, indices = probabilities.topk(min(top_k, len(names)), dim=1)
            top = [
                [(names[i], p) for i, p in zip(*row, strict=True)]
                for row in zip(indices.tolist(), values.tolist(), strict=True)
            ]
        remaining = iter(top)
        for i, image in enumerate(batch):
            path = str(image) if isinstance(image, str | Path) else getattr(image, "name", "-")
            yield Prediction(path, error=errors[i]) if i in errors else Prediction(path, tuple(next(remaining)))
