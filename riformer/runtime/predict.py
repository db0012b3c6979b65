"""Images in, class names out."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn

from riformer.images import read_image
from riformer.preprocess import Preprocessing
from riformer.runtime.native import is_compiled
from riformer.runtime.optimize import device_and_dtype, optimize

MIN_IMAGES_TO_COMPILE = 200


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, best first, or why it could not be read."""

    path: str
    classes: tuple[tuple[str, float], ...] = ()
    error: str = ""


def on_engine(model: nn.Module, engine: str = "auto", num_images: int | None = None) -> tuple[nn.Module, str]:
    """The model on an engine, in float32, and a line that names it.

    Choice: "auto" is the native network for a RIFormer on a CPU, and eager PyTorch for everything else. On a GPU eager
    PyTorch computes faster than images are read. The native network is not compiled for fewer than
    `MIN_IMAGES_TO_COMPILE` images, which are done sooner than the compiler.

    Args:
        model: a network.
        engine: "auto", "eager" (PyTorch as it is), or a backend of `optimize`.
        num_images: how many images there are to compute; None for many.

    Raises:
        ValueError: the engine does not take this model.
        RuntimeError: the engine cannot run here, or does not compute what the model does.
    """
    device, dtype = device_and_dtype(model)
    eager = f"engine: eager PyTorch, {str(dtype).removeprefix('torch.')}"
    if engine == "eager" or (engine == "auto" and device.type != "cpu"):
        return model, eager
    if engine == "auto" and num_images is not None and num_images < MIN_IMAGES_TO_COMPILE and not is_compiled():
        return model, (
            f"{eager} (for so few images the native network is not compiled, which takes half a minute once; "
            f"--engine native does)"
        )
    generator = torch.Generator().manual_seed(0)
    example = torch.randn(2, *Preprocessing.of_model(model).input_size, generator=generator).to(device)
    try:
        runtime = optimize(model, example, "fp32", "native" if engine == "auto" else engine)
    except (ValueError, RuntimeError) as error:
        if engine != "auto":
            raise
        return model, f"{eager} ({error})"
    return runtime, f"engine: {runtime.engine}"


def class_names(model: nn.Module, num_outputs: int | None = None) -> list[str]:
    """The class names that the model carries; ImageNet's for a thousand classes without names; else the numbers.

    Args:
        model: a network.
        num_outputs: number of its logits; by default what it says itself, `num_classes`.

    Raises:
        ValueError: it carries another number of names.
    """
    num_outputs = int(model.num_classes) if num_outputs is None else num_outputs
    names = getattr(model, "pretrained_cfg", {}).get("label_names")
    if not names and num_outputs == 1000:
        names = ImageNetInfo().label_descriptions()
    names = list(names or map(str, range(num_outputs)))
    if len(names) != num_outputs:
        raise ValueError(f"the model carries {len(names)} class names, but has {num_outputs} outputs")
    return names


@torch.inference_mode()
def predict(
    model: nn.Module, images: Iterable[str | Path | BinaryIO], top_k: int = 5, batch_size: int = 32
) -> Iterator[Prediction]:
    """Predictions in the order of the images, with the model's own preprocessing; unreadable images give an error each.

    Args:
        model: a network of this package or of timm, or what `riformer.optimize` returns.
        images: files, or open binary files.
        top_k: classes of each image.
        batch_size: images computed at once.

    Raises:
        ValueError: `top_k` or `batch_size` below 1, or a model without classes or preprocessing.
        RuntimeError: the model's logits are not finite.
    """
    for name, value in (("top_k", top_k), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be 1 or more")
    if getattr(model, "num_classes", None) == 0:
        raise ValueError("the model has no classifier (num_classes=0), so it predicts no classes")
    transform = Preprocessing.of_model(model).transform()
    model.eval()
    images = iter(images)
    while batch := list(islice(images, batch_size)):
        inputs, errors = [], {}
        for i, image in enumerate(batch):
            try:
                inputs.append(transform(read_image(image)))
            except ValueError as error:
                errors[i] = str(error)
        classes = iter(_most_probable(model, torch.stack(inputs), top_k) if inputs else [])
        for i, image in enumerate(batch):
            path = str(image) if isinstance(image, str | Path) else getattr(image, "name", "-")
            yield Prediction(path, error=errors[i]) if i in errors else Prediction(path, next(classes))


def _most_probable(model: nn.Module, inputs: Tensor, top_k: int) -> list[tuple[tuple[str, float], ...]]:
    """Names and probabilities of each image's most probable classes. Shape: inputs [N, C, H, W]."""
    device, dtype = device_and_dtype(model)
    logits = model(inputs.to(device, dtype)).float()
    if not logits.isfinite().all():
        raise RuntimeError("the model's logits are not finite: its weights are damaged, or do not suit the precision")
    names = class_names(model, logits.shape[1])
    values, indices = logits.softmax(dim=1).topk(min(top_k, len(names)), dim=1)
    rows = zip(indices.tolist(), values.tolist(), strict=True)
    return [tuple((names[i], probability) for i, probability in zip(*row, strict=True)) for row in rows]
