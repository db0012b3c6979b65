"""The networks by name: their registration with timm (`timm.create_model("riformer_s12")`), and their recognition.

Every riformer_* builds the training form; `mixer="identity"` builds the deploy form, `mixer="pooling"` PoolFormer with
the official head, and any argument of `MetaFormer` may be given. gfnet_h_* are the paper's logit teachers.
"""

import re
from collections.abc import Mapping
from contextlib import nullcontext
from difflib import get_close_matches
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from torch import Tensor

from riformer.model.gfnet import GFNet
from riformer.model.keys import fit_state, is_gfnet, to_timm_keys, weightless_form
from riformer.model.metaformer import MetaFormer
from riformer.sizes import GFNETS, VARIANTS

CHECKPOINT_FORMS: dict[str, dict[str, Any]] = {
    "training": {},
    "deploy": {"mixer": "identity"},
    "poolformer": {"mixer": "pooling"},
    "timm-poolformer": {"mixer": "pooling", "pool_first": True},
    "deleted": {"mixer": "nothing"},
}
"""The arguments of the networks that a checkpoint can hold; all but the first have the same keys."""

# The authors' checkpoints (mmpretrain's model zoo), training form, 600 epochs: 224 px, and 30 more epochs at 384 px.
_ZOO = "https://download.openmmlab.com/mmclassification/v1/riformer/riformer-"
_ZOO_FILES = {
    "riformer_s12": ("s12_32xb128_in1k_20230406-6741ce71.pth", "s12_32xb128_in1k-384px_20230406-145eda4c.pth"),
    "riformer_s24": ("s24_32xb128_in1k_20230406-fdab072a.pth", "s24_32xb128_in1k-384px_20230406-bafae7ab.pth"),
    "riformer_s36": ("s36_32xb128_in1k_20230406-fdfcd3b0.pth", "s36_32xb128_in1k-384px_20230406-017ed3c4.pth"),
    "riformer_m36": ("m36_32xb128_in1k_20230406-2fcb9d9b.pth", "m36_32xb128_in1k-384px_20230406-66a6f764.pth"),
    "riformer_m48": ("m48_32xb128_in1k_20230406-2b9d1abf.pth", "m48_32xb128_in1k-384px_20230406-2e874826.pth"),
}


def _cfg(img_size: int, stride: int, crop_pct: float, url: str = "") -> dict:
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, img_size, img_size),
        "pool_size": (img_size // stride, img_size // stride),
        "crop_pct": crop_pct,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "classifier": "head.fc",
        "first_conv": "stem.conv",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2304.05659",
    }


default_cfgs = generate_default_cfgs(
    {
        f"{name}.{tag}": _cfg(img_size, 32, 0.949 if "_m" in name else 0.9, _ZOO + file)
        for name, files in _ZOO_FILES.items()
        for tag, img_size, file in zip(("mmpretrain_in1k", "mmpretrain_in1k_384"), (224, 384), files, strict=True)
    }
    | {"riformer_micro": _cfg(16, 4, 1.0), "riformer_mini": _cfg(32, 16, 1.0)}
    # Their files can only be downloaded in a browser: see docs/teachers.md.
    | {
        name: {
            **_cfg(224, 32, 0.875),
            "classifier": "head",
            "first_conv": "patch_embed.0.proj",
            "license": "mit",
            "paper_ids": "arXiv:2107.00645",
        }
        for name in GFNETS
    }
)


def _create(name: str, pretrained: bool, **kwargs: Any) -> Any:
    device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
    overlay = dict(kwargs.pop("pretrained_cfg_overlay", None) or {})
    # img_size is also the size to preprocess for; the description of a saved model stays as it is.
    is_saved = isinstance(kwargs.get("pretrained_cfg"), dict | PretrainedCfg)
    if "img_size" in kwargs and not is_saved:
        overlay.setdefault("input_size", (kwargs.get("in_chans", 3), *to_2tuple(kwargs["img_size"])))
    config = resolve_pretrained_cfg(name, kwargs.get("pretrained_cfg"), overlay)
    sizes = GFNETS[name] if name in GFNETS else VARIANTS[name]
    args = {**sizes, "img_size": config.input_size[-2:], **kwargs}
    out_indices = args.pop("out_indices", tuple(range(len(args["depths"]))))
    with nullcontext() if device is None else torch.device(device):
        model = build_model_with_cfg(
            GFNet if name in GFNETS else MetaFormer,
            name,
            pretrained,
            pretrained_cfg_overlay=overlay,
            pretrained_filter_fn=fit_state,
            feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
            **args,
        )
    return model.to(dtype=dtype)


@register_model
def riformer_s12(pretrained: bool = False, **kwargs: Any) -> MetaFormer:
    return _create("riformer_s12", pretrained, **kwargs)


@register_model
def riformer_s24(pretrained: bool = False, **kwargs: Any) -> MetaFormer:
    return _create("riformer_s24", pretrained, **kwargs)


@register_model
def riformer_s36(pretrained: bool = False, **kwargs: Any) -> MetaFormer:
    return _create("riformer_s36", pretrained, **kwargs)


@register_model
def riformer_m36(pretrained: bool = False, **kwargs: Any) -> MetaFormer:
    return _create("riformer_m36", pretrained, **kwargs)


@register_model
def riformer_m48(pretrained: bool = False, **kwargs: Any) -> MetaFormer:
    return _create("riformer_m48", pretrained, **kwargs)


@register_model
def riformer_micro(pretrained: bool = False, **kwargs: Any) -> MetaFormer:
    return _create("riformer_micro", pretrained, **kwargs)


@register_model
def riformer_mini(pretrained: bool = False, **kwargs: Any) -> MetaFormer:
    return _create("riformer_mini", pretrained, **kwargs)


@register_model
def gfnet_h_ti(pretrained: bool = False, **kwargs: Any) -> GFNet:
    return _create("gfnet_h_ti", pretrained, **kwargs)


@register_model
def gfnet_h_s(pretrained: bool = False, **kwargs: Any) -> GFNet:
    return _create("gfnet_h_s", pretrained, **kwargs)


@register_model
def gfnet_h_b(pretrained: bool = False, **kwargs: Any) -> GFNet:
    return _create("gfnet_h_b", pretrained, **kwargs)


def identify(state: Mapping[str, Tensor], form: str = "") -> tuple[str, dict[str, Any]]:
    """timm's model name and the arguments that differ from its defaults, by a state dict's keys and shapes.

    Args:
        state: keys in any layout that `riformer.model.keys` understands, wrapped or not.
        form: a name from `CHECKPOINT_FORMS`; needed where the keys are those of several networks.

    Raises:
        ValueError: keys of no known layout, sizes of no variant, mixers whose weights are of an unknown kind, an
            unknown form, or one that contradicts the keys; or the keys are those of several networks and no form says
            which it is.
    """
    renamed, gfnet = to_timm_keys(state), is_gfnet(state)
    block, variants = ("blocks.{}.{}.", GFNETS) if gfnet else ("stages.{}.blocks.{}.", VARIANTS)
    pattern = re.escape(block).replace(r"\{\}", r"(\d+)")
    blocks = {match.groups() for key in renamed if (match := re.match(pattern, key))}
    if not blocks:
        raise ValueError(
            f"unknown key layout: {', '.join(sorted(state)[:5])}, ...; known are those of timm, mmpretrain and the "
            f"authors for RIFormer, PoolFormer and GFNet-H, with or without a prefix that all keys share"
        )
    depths = tuple(sum(stage == str(i) for stage, _ in blocks) for i in range(len({stage for stage, _ in blocks})))
    dims = tuple(_numel(renamed, block.format(i, 0) + "norm2.weight") for i in range(len(depths)))
    sizes = {name: (size["depths"], size["dims"]) for name, size in variants.items()}
    name = next((name for name, size in sizes.items() if size == (depths, dims)), None)
    if name is None:
        raise ValueError(
            f"no variant has depths {depths} and dims {dims}, which is what keys like {sorted(state)[:3]} say; "
            f"known are {sizes}"
        )
    if gfnet:
        height = len(renamed["blocks.0.0.filter.complex_weight"])
        args: dict[str, Any] = {"img_size": (4 * height, 4 * _numel(renamed, "pos_embed") // (dims[0] * height))}
        args = {} if args["img_size"] == (224, 224) else args
    else:
        args = dict(CHECKPOINT_FORMS[_form(state, renamed, form)])
        if not any("layer_scale" in key for key in renamed):
            args["layer_scale_init"] = 0
    stem = renamed.get("patch_embed.0.proj.weight" if gfnet else "stem.conv.weight")
    if stem is not None and stem.ndim == 4 and stem.shape[1] != 3:
        args["in_chans"] = stem.shape[1]
    if (num_classes := _numel(renamed, "head.bias" if gfnet else "head.fc.bias")) != 1000:
        args["num_classes"] = num_classes
    return name, args


def _form(state: Mapping[str, Tensor], renamed: Mapping[str, Tensor], form: str) -> str:
    """The form that the keys show, or else the one that is given."""
    if form and form not in CHECKPOINT_FORMS:
        near = get_close_matches(form, CHECKPOINT_FORMS) or list(CHECKPOINT_FORMS)
        raise ValueError(f"form is {form!r}; did you mean one of {near}?")
    mixer_keys = {key.split("token_mixer.")[1] for key in renamed if "token_mixer." in key}
    if mixer_keys and mixer_keys != {"weight", "bias"}:
        raise ValueError(
            f"mixer weights named {sorted(mixer_keys)[:5]} belong to no mixer that checkpoints are read for"
        )
    shown = "training" if mixer_keys else weightless_form(state)
    possible = [shown] if shown else [name for name in CHECKPOINT_FORMS if name != "training"]
    if form and form not in possible:
        raise ValueError(f"form is {form!r}, but the keys are those of {' or '.join(possible)}")
    if not form and not shown:
        raise ValueError(
            f"no mixer has weights, and keys like {sorted(state)[0]} are those of several networks: say which it is "
            f"with form, one of {possible} (deploy: a fused RIFormer or an identity MetaFormer; poolformer: norm, then "
            f"average in the head; timm-poolformer: average, then norm, as timm trains it; deleted: blocks without the "
            f"branch of the mixer). `riformer convert FILE NEW.safetensors --form FORM` writes a file that needs none"
        )
    return form or shown


def _numel(state: Mapping[str, Tensor], key: str) -> int:
    return state[key].numel() if key in state else 0
