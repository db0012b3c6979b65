"""Names and sizes, and their registration with timm: `timm.create_model("riformer_s12")`.

Every riformer_* builds the training form; `mixer="identity"` builds the deploy form, `mixer="pooling"` PoolFormer with
the official head, and any argument of `MetaFormer` may be given. gfnet_h_* are the paper's logit teachers.
"""

from contextlib import nullcontext
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

from riformer.model.gfnet import GFNet
from riformer.model.metaformer import MetaFormer
from riformer.model.weights import fit_state
from riformer.sizes import GFNETS, VARIANTS

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
        f"{name}.{tag}": _cfg(img_size, 32, 0.95 if "_m" in name else 0.9, _ZOO + file)
        for name, files in _ZOO_FILES.items()
        for tag, img_size, file in zip(("mmpretrain_in1k", "mmpretrain_in1k_384"), (224, 384), files, strict=True)
    }
    | {"riformer_micro": _cfg(16, 4, 1.0), "riformer_mini": _cfg(32, 16, 1.0)}
    # Their files lie where only a browser gets them: fetch one by hand and load it, see docs/teachers.md.
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
    # The size asked for is the size that the model is for; a saved model's notes stay as they are.
    is_saved = isinstance(kwargs.get("pretrained_cfg"), dict | PretrainedCfg)
    if "img_size" in kwargs and not is_saved:
        overlay.setdefault("input_size", (kwargs.get("in_chans", 3), *to_2tuple(kwargs["img_size"])))
    noted = resolve_pretrained_cfg(name, kwargs.get("pretrained_cfg"), overlay)
    sizes = GFNETS[name] if name in GFNETS else VARIANTS[name]
    args = {**sizes, "img_size": noted.input_size[-2:], **kwargs}
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
