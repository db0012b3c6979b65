"""Small networks of every class in FAMILIES: a new line there needs one here, and all tests of families then run."""

from typing import Any

import timm
import torch
from timm.layers import GroupNorm1, LayerNorm2d
from timm.models.metaformer import Attention, MetaFormer, Pooling, SepConv
from torch import nn

LAYER_NORMS = [LayerNorm2d, LayerNorm2d, nn.LayerNorm, nn.LayerNorm]
# timm's names and arguments, for images of 32 px.
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "gfnet_h": ("gfnet_h_ti", dict(depths=(1, 2), dims=(16, 24), img_size=32)),
    "poolformer": ("poolformer_s12", dict(token_mixers=Pooling, norm_layers=GroupNorm1)),
    "caformer": ("caformer_s18", dict(token_mixers=[SepConv, SepConv, Attention, Attention], norm_layers=LAYER_NORMS)),
    "convformer": ("convformer_s18", dict(token_mixers=SepConv, norm_layers=LayerNorm2d)),
    "convnext": ("convnext_atto", dict(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32))),
    "swin": (
        "swin_tiny_patch4_window7_224",
        dict(depths=(2, 2), embed_dim=16, num_heads=(2, 2), img_size=32, window_size=4),
    ),
    "vit": ("vit_tiny_patch16_224", dict(depth=3, embed_dim=32, num_heads=2, img_size=32, patch_size=8)),
    "deit": ("deit_tiny_distilled_patch16_224", dict(depth=3, embed_dim=32, num_heads=2, img_size=32, patch_size=8)),
    "riformer_other_size": ("riformer_mini", dict(mixer="pooling", depths=(2, 4, 2), dims=(24, 40, 64), img_size=32)),
    "riformer_same_size": ("riformer_mini", dict(mixer="attention", depths=(1, 2, 1), dims=(8, 16, 32), img_size=32)),
}


def build(name: str, **args: Any) -> nn.Module:
    """A network of timm or of this package with fixed weights, for six classes."""
    torch.manual_seed(1)
    if "token_mixers" in args:  # timm's entry points take no sizes
        model = MetaFormer(depths=(1, 1, 2, 1), dims=(16, 32, 32, 64), num_classes=6, **args)
        model.pretrained_cfg = {**timm.get_pretrained_cfg(name).to_dict(), "input_size": (3, 32, 32)}
        return model
    return timm.create_model(name, num_classes=6, pretrained_cfg_overlay={"input_size": (3, 32, 32)}, **args)


def build_small(network: str) -> nn.Module:
    """The network of that name in NETWORKS."""
    name, args = NETWORKS[network]
    return build(name, **args)
