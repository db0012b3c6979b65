"""From an RGB image to a network's input: one preprocessing for evaluation, prediction, pages and cards."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torchvision.transforms import Compose, Grayscale

MAX_ASPECT = 32
"""Images that are longer than this many times their width, or wider than so many times their height, are cut around
their centre before they are resized. A centre crop keeps far less of them anyway; without the cut, a file of 150 bytes
can ask for gigabytes, since the shorter side is what is resized to the network's input."""


CROP_MODES = ("center", "squash", "border")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


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

    @classmethod
    def of_model(cls, model: nn.Module) -> Self:
        """The preprocessing that the model carries, as timm resolves it.

        Choice: the size it was trained at, not `test_input_size`, as in timm's own examples; and "random", which some
        trainings of timm interpolate by, is bilinear, as where timm trains without augmentation. One number for mean or
        standard deviation counts for all channels.

        Raises:
            ValueError: it carries none, or one that no image can be brought to.
        """
        if not getattr(model, "pretrained_cfg", None):
            raise ValueError(
                f"{type(model).__name__} carries no preprocessing: set model.pretrained_cfg = dict(input_size=(3, 224, "
                f"224), mean=..., std=..., interpolation=..., crop_pct=...)"
            )
        config = resolve_model_data_config(model)
        channels, height, width = config["input_size"]
        channels = getattr(model, "in_chans", channels)  # timm leaves input_size as it was for in_chans=1
        mean, std = (_for_channels(config[name], channels) for name in ("mean", "std"))
        interpolation = "bilinear" if config["interpolation"] == "random" else config["interpolation"]
        return cls((channels, height, width), config["crop_pct"], config["crop_mode"], interpolation, mean, std)

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """Shape: RGB image -> [*input_size], normalised."""
        timms = create_transform(
            self.input_size,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
        )
        before: list[Callable] = [] if self.crop_mode == "squash" else [cut_long]
        if self.input_size[0] == 1:
            before.append(Grayscale())
        return Compose([*before, *timms.transforms])


def _for_channels(values: float | Sequence[float], channels: int) -> tuple[float, ...]:
    values = tuple(values) if isinstance(values, Sequence) else (values,)
    return values * channels if len(values) == 1 else values


def cut_long(image: Image.Image) -> Image.Image:
    """The image, or the middle of one whose sides differ by more than a factor of `MAX_ASPECT`."""
    width, height = image.size
    new_width, new_height = min(width, MAX_ASPECT * height), min(height, MAX_ASPECT * width)
    if (new_width, new_height) == image.size:
        return image
    left, top = (width - new_width) // 2, (height - new_height) // 2
    return image.crop((left, top, left + new_width, top + new_height))
