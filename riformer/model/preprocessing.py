"""The preprocessing that a model carries in timm's fields."""

from collections.abc import Sequence

from timm.data import resolve_model_data_config
from torch import nn

from riformer_runtime.preprocess import Preprocessing


def preprocessing_of(model: nn.Module) -> Preprocessing:
    """The preprocessing that the model carries in `pretrained_cfg`, as timm resolves it.

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
    return Preprocessing((channels, height, width), config["crop_pct"], config["crop_mode"], interpolation, mean, std)


def _for_channels(values: float | Sequence[float], channels: int) -> tuple[float, ...]:
    values = tuple(values) if isinstance(values, Sequence) else (values,)
    return values * channels if len(values) == 1 else values
