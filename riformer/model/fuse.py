"""Training form -> deploy form, exactly; and the further folding of layer scales.

Fuse: a mixer that is per channel and linear merges into the norm before it, `weight' = weight * (s - 1)`,
`bias' = bias * (s - 1) + t`, and the block keeps an identity mixer (RIFormer, section on re-parameterisation).
Fold: a layer scale merges into its neighbour, `ls1` into norm1 and `ls2` into fc2, and disappears.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from riformer.model.metaformer import Block, MetaFormer
from riformer.model.mixers import Identity


@torch.no_grad()
def fuse_block(block: Block) -> Block:
    """A new block, equal to `block` in eval mode, with its mixer merged into norm1.

    A mixer without `fold_into` (a real token mixer) cannot be merged: the copy then keeps it.
    """
    fused = deepcopy(block)
    if hasattr(block.token_mixer, "fold_into"):
        weight, bias = block.token_mixer.fold_into(block.norm1)
        fused.norm1.weight.copy_(weight)
        fused.norm1.bias.copy_(bias)
        fused.token_mixer = Identity(weight.numel(), grid=(0, 0)).train(block.training)
    return fused


def fuse(model: MetaFormer) -> MetaFormer:
    """A new model in deploy form, equal to `model` in eval mode. `model` stays as it was; fusing twice is harmless.

    Raises:
        ValueError: `model` is not a MetaFormer (for example still wrapped by DDP, torch.compile or an EMA).
    """
    fused = deepcopy(_unwrapped(model, "fuse"))
    for stage in fused.stages:
        for i, block in enumerate(stage.blocks):
            stage.blocks[i] = block.fuse()
    return fused


def deploy_form(model: nn.Module) -> nn.Module:
    """The model as it is used: a MetaFormer fused, any other as it is."""
    return fuse(model) if isinstance(model, MetaFormer) else model


@torch.no_grad()
def fold(model: MetaFormer) -> MetaFormer:
    """The deploy form without layer scales: `ls1` merged into norm1, `ls2` into fc2. Fuses first where needed.

    Raises:
        ValueError: `model` is not a MetaFormer, or has a token mixer through which `ls1` cannot pass.
    """
    folded = fuse(_unwrapped(model, "fold"))
    for name, block in folded.named_modules():
        if not isinstance(block, Block) or isinstance(block.layer_scale1, nn.Identity):
            continue
        if not isinstance(block.token_mixer, Identity):
            raise ValueError(f"fold: {name} has a {type(block.token_mixer).__name__} mixer; only a fused block folds")
        scale1, scale2 = block.layer_scale1.scale, block.layer_scale2.scale
        block.norm1.weight.mul_(scale1)
        block.norm1.bias.mul_(scale1)
        block.mlp.fc2.weight.mul_(scale2.view(-1, 1, 1, 1))
        block.mlp.fc2.bias.mul_(scale2)
        block.layer_scale1 = nn.Identity().train(block.training)
        block.layer_scale2 = nn.Identity().train(block.training)
    return folded


def mixing(model: nn.Module) -> str:
    """The mixers that a fuse leaves, because they mix tokens, by name and with commas; empty where there is none.

    Of a network that is no MetaFormer, its class.
    """
    if not isinstance(model, MetaFormer):
        return type(model).__name__
    return ", ".join(dict.fromkeys(mixer for mixer in fuse(model).mixers if mixer != "identity"))


FORMS: dict[str, Callable[[Any], Any]] = {"training": lambda model: model, "deploy": fuse, "folded": fold}
"""What makes each form of a network that was trained."""


def _unwrapped(model: nn.Module, verb: str) -> MetaFormer:
    if not isinstance(model, MetaFormer):
        raise ValueError(
            f"{verb} takes a MetaFormer, not {type(model).__name__}: unwrap it first "
            f"(.module of DDP and EMA, ._orig_mod of torch.compile); as a part of another model, "
            f"timm.utils.reparameterize_model fuses it"
        )
    return model
