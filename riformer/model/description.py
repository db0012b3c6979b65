"""config.json: what a model is, how to preprocess for it, its class names; written in the Hub's layout, read with care.

timm's `local-dir:` and `hf-hub:` read the same file. What is read may come from anywhere: nothing in it makes a load
fetch or open anything, and a value that cannot be right is refused by name before a network is built.
"""

import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from timm.data.transforms import str_to_interp_mode
from timm.models import PretrainedCfg
from timm.models._hub import _parse_model_cfg, save_config_for_hf
from torch import Tensor, nn

from riformer.model.metaformer import MetaFormer

logger = logging.getLogger(__name__)

SECTION = "riformer"  # of config.json: fields of pretrained_cfg that timm does not know; timm ignores it
_FIELDS = {field.name for field in fields(PretrainedCfg)}
_SOURCES = {"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load"}
_FACTORY_ARGS = {  # of timm.create_model and what it calls: where weights come from, and what is built around a network
    "cache_dir", "checkpoint_path", "device", "dtype", "feature_cfg", "features_only", "model_cfg", "out_indices",
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_custom_load", "pretrained_filter_fn",
    "pretrained_model_args", "pretrained_strict", "pruned",
}  # fmt: skip
_MAX_PIXELS = 8192
MAX_CHARACTERS = 2**24  # of a config.json


class Description(NamedTuple):
    """What a config.json says.

    Attributes:
        name: timm's name of the network.
        args: arguments of its constructor.
        pretrained_cfg: preprocessing, class names and the like, in timm's fields.
        more: fields of the model's pretrained_cfg that timm does not know.
    """

    name: str
    args: dict[str, Any]
    pretrained_cfg: dict[str, Any]
    more: dict[str, Any]


def config_text(model: nn.Module) -> str:
    """The text of config.json for a model built by `timm.create_model`, in the form that it has now.

    Raises:
        ValueError: the model was not built by `timm.create_model`, is wrapped, or carries a value that is not JSON.
    """
    noted = all(hasattr(model, name) for name in ("pretrained_cfg", "num_features"))
    if not noted or hasattr(model, "_orig_mod"):
        raise ValueError(
            f"save takes a model built by timm.create_model, not {type(model).__name__}: unwrap it first "
            f"(.module of DDP and EMA, ._orig_mod of torch.compile)"
        )
    args: dict[str, Any] = {}
    if isinstance(model, MetaFormer):  # fuse and fold change the form that timm recorded when it built the model
        args["mixer"] = model.mixers[0] if len(set(model.mixers)) == 1 else model.mixers
        if isinstance(model.get_submodule("stages.0.blocks.0.layer_scale1"), nn.Identity):
            args["layer_scale_init"] = 0
    label_names = model.pretrained_cfg.get("label_names")
    if label_names and len(label_names) != model.num_classes:
        logger.warning("left out %d class names of a model with %d classes", len(label_names), model.num_classes)
        label_names = None
    more = {key: value for key, value in model.pretrained_cfg.items() if key not in _FIELDS}
    try:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "config.json"
            save_config_for_hf(model, str(path), model_config={"label_names": label_names}, model_args=args)
            config = json.loads(path.read_text(encoding="utf-8"))
        known = _FIELDS - {"label_names"}  # which config.json has outside of pretrained_cfg
        config["pretrained_cfg"] = {key: value for key, value in config["pretrained_cfg"].items() if key in known}
        return json.dumps({**config, SECTION: more} if more else config, indent=2)
    except TypeError as error:
        raise ValueError(f"pretrained_cfg of the model has a value that cannot be written as JSON: {error}") from error


def read_description(text: str) -> Description:
    """What the text of a config.json says, without the places that it may name to fetch weights from.

    Raises:
        ValueError: it describes no model, or has a value that cannot be right; the message names the field.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"describes no model: {len(text)} characters, more than {MAX_CHARACTERS}")
    try:
        config = json.loads(text)
        parts = [config, *(config.get(key) or {} for key in ("pretrained_cfg", "model_args", SECTION))]
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"describes no model: {error!r}") from error
    for place, part in zip(("config.json", "pretrained_cfg", "model_args", SECTION), parts, strict=True):
        if not isinstance(part, dict):
            raise ValueError(f"describes no model: {place} is {str(part)[:80]!r}; it must be a JSON object")
        for key, (is_right, allowed) in _CHECKS.items():
            if part.get(key) is not None and not is_right(part[key]):
                raise ValueError(f"{place}.{key} is {str(part[key])[:80]!r}; it must be {allowed}")
    config.pop(SECTION, None)
    try:
        pretrained_cfg, name, _ = _parse_model_cfg(config, {})
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"describes no model: {error!r}") from error
    args, more = parts[2:]
    if not isinstance(name, str):
        raise ValueError(f"architecture is {name!r}; it must be the name of a network")
    if refused := sorted(_FACTORY_ARGS & args.keys()):
        raise ValueError(f"model_args has {refused[0]}, which no saved model has: it is about where weights come from")
    if unknown := sorted(pretrained_cfg.keys() - _FIELDS):
        raise ValueError(f"pretrained_cfg has {unknown[0]}, which is no field of timm's")
    pretrained_cfg = {key: value for key, value in pretrained_cfg.items() if key not in _SOURCES and value is not None}
    channels = {1, 3, args.get("in_chans"), pretrained_cfg.get("input_size", [3])[0]}
    for key in ("mean", "std"):
        numbers = pretrained_cfg.get(key)
        if isinstance(numbers, list | tuple) and len(numbers) not in channels:
            raise ValueError(f"pretrained_cfg.{key} is {str(numbers)[:80]}; it must have a number for each channel")
    if isinstance(names := pretrained_cfg.get("label_names"), Mapping):
        pretrained_cfg["label_names"] = [names[str(i)] for i in range(len(names))]
    num_classes = pretrained_cfg.get("num_classes")
    if args.get("num_classes") is None:
        args["num_classes"] = num_classes
    elif num_classes not in (None, args["num_classes"]):
        raise ValueError(f"num_classes is {num_classes}, but model_args.num_classes is {args['num_classes']}")
    return Description(name, args, pretrained_cfg, {key: more[key] for key in more if key not in _FIELDS})


def check_size(args: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Compares the arguments of a network with its weights, before the network is built.

    Raises:
        ValueError: more blocks than the weights have tensors, or a number that no network is built with.
    """
    for key, value in args.items():
        numbers = list(_numbers(value))
        if not all(math.isfinite(number) and abs(number) <= 2**31 for number in numbers):
            raise ValueError(f"model_args.{key} is {str(value)[:80]}, which no network is built with")
        if re.search("depth|layers|blocks|stages|levels|repeats", key) and sum(map(abs, numbers)) > len(state):
            raise ValueError(f"model_args.{key} is {str(value)[:80]}, but the weights have {len(state)} tensors")


def _numbers(value: Any) -> Iterator[float]:
    """All numbers in nested lists and objects."""
    items = [value]
    while items:
        item = items.pop()
        if isinstance(item, int | float):
            yield item
        elif isinstance(item, list | tuple):
            items.extend(item)
        elif isinstance(item, Mapping):
            items.extend(item.values())


def _is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_size(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(_is_whole(n, 1, _MAX_PIXELS) for n in value)


def _is_img_size(value: Any) -> bool:
    sizes = value if isinstance(value, list | tuple) else [value]
    return len(sizes) in (1, 2) and all(_is_whole(n, 1, _MAX_PIXELS) for n in sizes)


def _are_numbers(value: Any, above: float = -math.inf) -> bool:
    values = value if isinstance(value, list | tuple) else [value]
    return bool(values) and all(
        isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) and v > above for v in values
    )


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0.1 <= value <= 2


def _is_interpolation(value: Any) -> bool:
    try:
        return bool(str_to_interp_mode(value))
    except (KeyError, TypeError):
        return False


def _are_names(value: Any) -> bool:
    if isinstance(value, Mapping):
        return value.keys() == set(map(str, range(len(value)))) and all(isinstance(v, str) for v in value.values())
    return isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)


def _is_module_name(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list | tuple) and all(isinstance(v, str) for v in value))


_SIZE = f"channels, height and width, whole numbers from 1 to {_MAX_PIXELS}"
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "input_size": (_is_size, _SIZE),
    "test_input_size": (_is_size, _SIZE),
    "min_input_size": (_is_size, _SIZE),
    "img_size": (_is_img_size, f"one or two whole numbers from 1 to {_MAX_PIXELS}, pixels"),
    "in_chans": (lambda value: _is_whole(value, 1, _MAX_PIXELS), "a whole number of 1 or more"),
    "num_classes": (lambda value: _is_whole(value, 0, 10**7), "a whole number from 0 to ten million"),
    "mean": (_are_numbers, "a number for each channel"),
    "std": (lambda value: _are_numbers(value, above=0), "a positive number for each channel"),
    "crop_pct": (_is_share, "a number from 0.1 to 2"),
    "test_crop_pct": (_is_share, "a number from 0.1 to 2"),
    "crop_mode": (lambda value: value in ("center", "squash", "border"), "center, squash or border"),
    "interpolation": (_is_interpolation, "nearest, bilinear, bicubic, box, hamming or lanczos"),
    "label_names": (_are_names, "a list of names, one for each class"),
    "first_conv": (_is_module_name, "the name of a module"),
    "classifier": (_is_module_name, "the name of a module"),
    "fixed_input_size": (lambda value: isinstance(value, bool), "true or false"),
}
