"""The probe of an artefact: images of the training data, and what the training form computes from them."""

from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image
from torch import nn

from riformer.model.preprocessing import preprocessing_of
from riformer.runtime.parity import full_float32

NUM_IMAGES, NUM_ODD, NUM_ORIGINALS = 16, 7, 4


@full_float32()
@torch.inference_mode()
def make_probe(
    model: nn.Module, images: Iterable[Image.Image], inside: str = ""
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The arrays of probe.npz, and all images in the network's size.

    Args:
        model: in training form, any type; computed in its own type, float32 at least.
        images: RGB.
        inside: "resize" adds some of the images at another size, such as a graph that resizes takes.

    Returns:
        `pixels` and `logits`; `odd_pixels` and `odd_logits` where the network takes images of an odd size; `original_0`
        and so on, from which the first pixels come. Shape: pixels [N, H, W, C], logits [N, K], all images [M, H, W, C].

    Raises:
        ValueError: no image.
    """
    preprocessing = preprocessing_of(model)
    channels, height, width = preprocessing.input_size
    originals: list[np.ndarray] = []
    fitted: list[np.ndarray] = []
    odd: list[np.ndarray] = []
    for image in images:
        if inside == "resize" and len(originals) < NUM_ORIGINALS:
            image.thumbnail((2 * width, 2 * height))
            originals.append(np.asarray(image.convert("L") if channels == 1 else image))
        if len(odd) < NUM_ODD:
            odd_image = image.convert("L") if channels == 1 else image
            odd.append(np.asarray(odd_image.resize((width * 5 // 4 | 1, height * 9 // 8 | 1))))
        fitted.append(np.asarray(preprocessing.fit(image)))
    if not fitted:
        raise ValueError("the probe needs an image at least")
    pixels = _with_channels(fitted)
    probe = {"pixels": pixels[:NUM_IMAGES], "logits": _logits(model, pixels[:NUM_IMAGES])}
    try:
        probe |= {"odd_pixels": _with_channels(odd), "odd_logits": _logits(model, _with_channels(odd))}
    except (RuntimeError, AssertionError, ValueError):  # a network of fixed size
        probe.pop("odd_pixels", None)
    probe |= {f"original_{i}": _with_channels([image])[0] for i, image in enumerate(originals)}
    return probe, pixels


def _with_channels(images: list[np.ndarray]) -> np.ndarray:
    """Shape: [N, H, W, C]."""
    stacked = np.stack(images)
    return stacked if stacked.ndim == 4 else stacked[..., None]


def _logits(model: nn.Module, pixels: np.ndarray) -> np.ndarray:
    """Shape: [N, H, W, C] -> [N, K], float32."""
    values = pixels.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    parameter = next(model.parameters())
    images = torch.from_numpy(preprocessing_of(model).normalise(values)).to(parameter)
    return torch.cat([model(image[None]) for image in images]).float().cpu().numpy()
