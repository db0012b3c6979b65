"""Images to try a model with: the probe of its artefact, which are images of the data that it was trained on."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from riformer_runtime.artifact import Artifact


def samples(path: str | Path, most: int) -> tuple[bytes, ...]:
    """PNG files of an artefact's first probe images; none where it has no probe.

    Raises:
        ValueError: there is no whole artefact.
    """
    probe = Artifact(path).probe()
    return tuple(_png(pixels) for pixels in probe["pixels"][:most]) if "pixels" in probe else ()


def _png(pixels: np.ndarray) -> bytes:
    """Shape: [H, W, C], uint8."""
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "PNG")
    return file.getvalue()
