"""What a model notes on itself in timm's fields, as the manifest that travels with whatever runs it."""

from typing import Any, cast

from timm.data import ImageNetInfo
from torch import nn

from riformer.model.metaformer import MetaFormer
from riformer.model.preprocessing import preprocessing_of
from riformer_runtime.artifact import Manifest


def manifest_of(model: nn.Module) -> Manifest:
    """What a model notes on itself, as a manifest without payloads.

    Raises:
        ValueError: it carries no preprocessing, or another number of class names than it has outputs.
    """
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    preprocessing = preprocessing_of(model)
    is_deploy = isinstance(model, MetaFormer) and set(model.mixers) == {"identity"}
    return Manifest(
        architecture=str(config.get("architecture") or type(model).__name__),
        form="deploy" if is_deploy else "training",
        num_classes=int(cast(Any, model).num_classes),
        class_names=tuple(class_names(model)),
        preprocessing=preprocessing,
    )


def class_names(model: nn.Module) -> list[str]:
    """The class names that the model carries; ImageNet's for a thousand classes without names; else the numbers.

    Raises:
        ValueError: it carries another number of names than it has outputs.
    """
    num_outputs = int(cast(Any, model).num_classes)
    names = getattr(model, "pretrained_cfg", {}).get("label_names")
    if not names and num_outputs == 1000:
        names = ImageNetInfo().label_descriptions()
    names = list(names or map(str, range(num_outputs)))
    if len(names) != num_outputs:
        raise ValueError(f"the model carries {len(names)} class names, but has {num_outputs} outputs")
    return names
