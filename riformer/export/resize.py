"""A resize and centre crop inside a graph, by Pillow's arithmetic.

A separable resize is two matrix products, with a row of weights for each pixel of the output. They are computed in the
graph, from the size of the image, so that every engine that has arithmetic can run it, at any size.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from riformer_runtime.preprocess import Preprocessing


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic with a = -0.5, which is Pillow's."""
    x = x.abs()
    inner = (1.5 * x - 2.5) * x * x + 1
    outer = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, inner, torch.where(x < 2, outer, torch.zeros_like(x)))


FILTERS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {"bilinear": (_triangle, 1.0), "bicubic": (_cubic, 2.0)}
"""Pillow's filter and half of its width, by name."""


class Resize(nn.Module):
    """From an image of any size to the network's, as `Preprocessing.fit` does it, to a step of 1/255.

    Raises:
        ValueError: the preprocessing fills borders, or its interpolation is not in `FILTERS`.

    Shape: images [N, C, H, W], float32 in 0..1 -> [N, C, height, width] of the preprocessing.
    """

    def __init__(self, preprocessing: Preprocessing):
        super().__init__()
        self.crop_mode = preprocessing.crop_mode
        if self.crop_mode == "border" or preprocessing.interpolation not in FILTERS or preprocessing.crop_pct > 1:
            raise ValueError(
                f"no resize inside the graph for crop_mode={self.crop_mode!r}, crop_pct={preprocessing.crop_pct} and "
                f"interpolation={preprocessing.interpolation!r}: export with --inside normalise"
            )
        self.filter, self.half_width = FILTERS[preprocessing.interpolation]
        _, self.height, self.width = preprocessing.input_size
        self.scaled = tuple(int(size / preprocessing.crop_pct) for size in (self.height, self.width))

    def forward(self, images: Tensor) -> Tensor:
        """The resized and cropped images."""
        height, width = (torch.scalar_tensor(size, dtype=torch.float32) for size in images.shape[2:])
        scaled_height, scaled_width = (torch.full_like(height, size) for size in self.scaled)
        if self.crop_mode == "center" and self.scaled[0] == self.scaled[1]:  # the shorter side, the other one cut off
            scaled_height = torch.maximum(torch.floor(scaled_height * height / width), scaled_height)
            scaled_width = torch.maximum(torch.floor(scaled_width * width / height), scaled_width)
        elif self.crop_mode == "center":
            ratio = torch.minimum(height / scaled_height, width / scaled_width)
            scaled_height, scaled_width = torch.round(height / ratio), torch.round(width / ratio)
        columns = self._weights(images.shape[3], width, scaled_width, self.width)
        rows = self._weights(images.shape[2], height, scaled_height, self.height)
        resized = _to_bytes(images * 255 @ columns.transpose(0, 1))  # Pillow rounds between the passes as well
        return _to_bytes(rows @ resized) / 255

    def _weights(self, num: int, size: Tensor, scaled: Tensor, crop: int) -> Tensor:
        """Share of each input pixel in each pixel of the crop. Shape: [crop, num]."""
        scale = size / scaled
        support = scale.clamp(min=1.0)
        first = torch.round((scaled - crop) / 2)
        centres = (torch.arange(crop) + first + 0.5) * scale
        distances = (torch.arange(num) + 0.5)[None] - centres[:, None]
        weights = self.filter(distances / support)
        return weights / weights.sum(1, keepdim=True)


def _to_bytes(values: Tensor) -> Tensor:
    return torch.floor(values.clamp(0, 255) + 0.5)
