"""From an RGB image to a network's input: one preprocessing for evaluation, prediction, pages and cards."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn


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
        return create_transform(
            self.input_size,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
        )
