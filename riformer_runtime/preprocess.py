"""From an RGB image to a network's input: one preprocessing for training's evaluation, prediction, exports and serving.

It computes timm's evaluation transform with Pillow and NumPy, equal to the last bit.
"""

from dataclasses import dataclass
from math import floor

import numpy as np
from PIL import Image

MAX_ASPECT = 32
"""Images that are longer than this many times their width, or wider than so many times their height, are cut around
their centre before they are resized. A centre crop keeps far less of them anyway; without the cut, a file of 150 bytes
can ask for gigabytes, since the shorter side is what is resized to the network's input."""

CROP_MODES = ("center", "squash", "border")
INTERPOLATIONS = {
    name: Image.Resampling[name.upper()] for name in ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
}


@dataclass(frozen=True)
class Preprocessing:
    """timm's evaluation transform, by the values that a model carries in `pretrained_cfg`.

    Attributes:
        input_size: channels (3 for RGB, 1 for grey), height and width of the network's input, pixels.
        crop_pct: share of the resized image that the crop keeps.
        crop_mode: "center" resizes the shorter side and crops; "squash" resizes both, whatever the proportions;
            "border" resizes the longer side and fills up with the mean.
        interpolation: of the resize, "bicubic", "bilinear" and so on.
        mean: of each channel, of values in 0..1.
        std: standard deviation of each channel.

    Raises:
        ValueError: a value that no image can be brought to; the message names it.
    """

    input_size: tuple[int, int, int]
    crop_pct: float
    crop_mode: str
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        channels = self.input_size[0]
        if channels not in (1, 3):
            raise ValueError(f"the network takes images of {channels} channels; images are read as RGB (3) or grey (1)")
        for name in ("mean", "std"):
            if len(values := getattr(self, name)) != channels:
                raise ValueError(f"{name} is {values}, but the network takes images of {channels} channel(s)")
        if min(self.std) <= 0:
            raise ValueError(f"std is {self.std}; it must be positive")
        if min(self.input_size) < 1 or not 0.1 <= self.crop_pct <= 2:
            raise ValueError(
                f"input_size is {self.input_size} and crop_pct {self.crop_pct}; they must be positive, and crop_pct "
                f"between 0.1 and 2"
            )
        if self.crop_mode not in CROP_MODES:
            raise ValueError(f"crop_mode is {self.crop_mode!r}; allowed are {', '.join(CROP_MODES)}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation is {self.interpolation!r}; allowed are {', '.join(INTERPOLATIONS)}")

    def __call__(self, image: Image.Image) -> np.ndarray:
        """The network's input for an RGB image. Shape: [C, H, W], float32, normalised."""
        return self.normalise(self.pixels(image))

    def pixels(self, image: Image.Image) -> np.ndarray:
        """The input before it is normalised. Shape: [C, H, W], float32 in 0..1."""
        values = np.asarray(self.fit(image))
        planes = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
        return planes.astype(np.float32, order="C") / np.float32(255)

    def normalise(self, pixels: np.ndarray) -> np.ndarray:
        """Values in 0..1 less the mean, over the standard deviation. Shape: [..., C, H, W], float32."""
        mean, std = (np.array(values, np.float32)[:, None, None] for values in (self.mean, self.std))
        return (pixels - mean) / std

    def fit(self, image: Image.Image) -> Image.Image:
        """The image in the network's size and number of channels, 8 bits each."""
        channels, height, width = self.input_size
        if self.crop_mode != "squash":
            image = cut_long(image)
        if channels == 1:
            image = image.convert("L")
        scaled_height, scaled_width = (floor(size / self.crop_pct) for size in (height, width))
        if self.crop_mode == "squash":
            size = scaled_width, scaled_height
        elif self.crop_mode == "center" and scaled_height == scaled_width:
            size = _with_short_side(image.size, scaled_height)
        else:
            ratios = image.height / scaled_height, image.width / scaled_width
            ratio = max(ratios) if self.crop_mode == "border" else min(ratios)
            size = round(image.width / ratio), round(image.height / ratio)
        if image.size != size:
            image = image.resize(size, INTERPOLATIONS[self.interpolation])
        fill = [round(255 * value) for value in self.mean] if self.crop_mode == "border" else [0] * channels
        return _centre(image, width, height, fill)


def _with_short_side(size: tuple[int, int], short: int) -> tuple[int, int]:
    """Width and height with the shorter one as given, in the old proportions."""
    width, height = size
    return (short, int(short * height / width)) if width <= height else (int(short * width / height), short)


def _centre(image: Image.Image, width: int, height: int, fill: list[int]) -> Image.Image:
    """The middle of the image, filled up with a colour where it is too small."""
    missing_width, missing_height = max(width - image.width, 0), max(height - image.height, 0)
    if missing_width or missing_height:
        size = image.width + missing_width, image.height + missing_height
        larger = Image.new(image.mode, size, tuple(fill) if len(fill) > 1 else fill[0])
        larger.paste(image, (missing_width // 2, missing_height // 2))
        image = larger
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def cut_long(image: Image.Image) -> Image.Image:
    """The image, or the middle of one whose sides differ by more than a factor of `MAX_ASPECT`."""
    width, height = image.size
    new_width, new_height = min(width, MAX_ASPECT * height), min(height, MAX_ASPECT * width)
    if (new_width, new_height) == image.size:
        return image
    left, top = (width - new_width) // 2, (height - new_height) // 2
    return image.crop((left, top, left + new_width, top + new_height))
