"""From an RGB image to a network's input: one preprocessing for evaluation, prediction, pages and cards."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torchvision.transforms import Compose

MAX_ASPECT = 32
"""Images that are longer than this many times their width, or wider than so many times their height, are cut around
their centre before they are resized. A centre crop keeps far less of them anyway; without the cut, a file of 150 bytes
can ask for gigabytes, since the shorter side is what is resized to the network's input."""


@dataclass(frozen=True)
class Preprocessing:
    """timm's evaluation transform, by the values that a model carries in `pretrained_cfg`.

    Attributes:
        input_size: channels, height and width of the network's input, pixels.
        crop_pct: share of the resized image that the crop keeps.
        crop_mode: "center", "squash" or "border".
        interpolation: of the resize, "bicubic", "bilinear" and so on.
        mean: of each channel, of values in 0..1.
        std: standard deviation of each channel.
    """

    input_size: tuple[int, int, int]
    crop_pct: float
    crop_mode: str
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of_model(cls, model: nn.Module) -> Self:
        """The preprocessing that the model was trained for, as timm resolves it."""
        config = resolve_model_data_config(model)
        return cls(**{name: config[name] for name in cls.__dataclass_fields__})

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """Shape: RGB image -> [*input_size], normalised."""
        transform = create_transform(
            self.input_size,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
        )
        return Compose([cut_long, *transform.transforms])


def cut_long(image: Image.Image) -> Image.Image:
    """The image, or the middle of one whose sides differ by more than a factor of `MAX_ASPECT`."""
    width, height = image.size
    new_width, new_height = min(width, MAX_ASPECT * height), min(height, MAX_ASPECT * width)
    if (new_width, new_height) == image.size:
        return image
    left, top = (width - new_width) // 2, (height - new_height) // 2
    return image.crop((left, top, left + new_width, top + new_height))
