"""From an RGB image to a network's input: one preprocessing for evaluation, prediction, pages and cards."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Self

from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

MAX_ASPECT = 32  # longer side over shorter side of an image that is resized whole


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
        """timm's transform, with very long images cut to their middle first, of which the crop keeps no more.

        Shape: RGB image -> [*input_size], normalised.
        """
        transform = create_transform(
            self.input_size,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
        )
        return partial(_transformed, transform, self.crop_mode == "center")


def _transformed(transform: Callable[[Image.Image], Tensor], crops_middle: bool, image: Image.Image) -> Tensor:
    return transform(_middle(image) if crops_middle else image)


def _middle(image: Image.Image) -> Image.Image:
    """The image, or the middle of one that is far longer than wide: resized whole, it would not fit into memory."""
    width, height = image.size
    longest = MAX_ASPECT * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
    return image.crop((left, top, left + min(width, longest), top + min(height, longest)))
