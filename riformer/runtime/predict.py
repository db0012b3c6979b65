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
from riformer.runtime.optimize import device_and_dtype, optimize


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, best first, or why it could not be read."""

    path: str
    classes: tuple[tuple[str, float], ...] = ()
    error: str = ""


def on_engine(model: nn.Module, engine: str = "auto") -> tuple[nn.Module, str]:
    """The model on an engine, in float32, and a line about what it is.

    Args:
        model: in eval mode.
        engine: "eager" (PyTorch as it is), a backend of `optimize`, or "auto": the fastest that takes the model.

    Raises:
        ValueError: the engine does not take this model.
        RuntimeError: the engine cannot run here.
    """
    reason = ""
    if engine != "eager":
        device, _ = device_and_dtype(model)
        example = torch.randn(2, *Preprocessing.of_model(model).input_size, device=device)
        try:
            runtime = optimize(model, example, "fp32", engine)
            return runtime, f"engine: {runtime.engine}"
        except (ValueError, RuntimeError) as error:
            if engine != "auto":
                raise
            reason = f" ({str(error).splitlines()[0]})"
    return model, f"engine: eager PyTorch, fp32{reason}"


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
    """Predictions in the order of the images, with the model's own preprocessing; unreadable images give an error each.

    Args:
        model: a model, or what `riformer.optimize` made of one.
        images: files, or open binary files.
        top_k: classes of each image.
        batch_size: images computed at once.

    Raises:
        ValueError: `top_k` or `batch_size` below 1.
        RuntimeError: the model's logits are not finite.
    """
    for name, value in (("top_k", top_k), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be 1 or more")
    model.eval()
    device, dtype = device_and_dtype(model)
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
            logits = model(torch.stack(tensors).to(device, dtype)).float()
            if not logits.isfinite().all():
                raise RuntimeError(
                    "the model's logits are not finite: its weights are damaged, or do not suit the precision"
                )
            probabilities = logits.softmax(dim=1)
            values, indices = probabilities.topk(min(top_k, len(names)), dim=1)
            top = [
                [(names[i], p) for i, p in zip(*row, strict=True)]
                for row in zip(indices.tolist(), values.tolist(), strict=True)
            ]
        remaining = iter(top)
        for i, image in enumerate(batch):
            path = str(image) if isinstance(image, str | Path) else getattr(image, "name", "-")
            yield Prediction(path, error=errors[i]) if i in errors else Prediction(path, tuple(next(remaining)))
