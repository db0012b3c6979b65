"""Training form -> deploy form, exactly; and the further folding of layer scales.

Fuse: a mixer that is per channel and linear merges into the norm before it, `weight' = weight * (s - 1)`,
`bias' = bias * (s - 1) + t`, and the block keeps an identity mixer (RIFormer, section on re-parameterisation).
Fold: a layer scale merges into its neighbour, `ls1` into norm1 and `ls2` into fc2, and disappears.

Both compare what they merged with what was there, on random tokens.
"""

import logging
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from riformer.model.metaformer import Block, LayerScale, MetaFormer
from riformer.model.mixers import Identity, check_equal, merge
from riformer.model.plain import plain_copy

logger = logging.getLogger(__name__)


def fuse(model: MetaFormer) -> MetaFormer:
    """A new model in deploy form, equal to `model` in eval mode. `model` stays as it was; fusing twice is harmless.

    Token mixers that cannot be merged stay, and a warning names them. Parametrized weights become plain ones.

    Raises:
        ValueError: `model` is not a MetaFormer (for example still wrapped by DDP, torch.compile or an EMA), has hooks,
            or a block that the merged one does not equal.
    """
    fused = _fused(_unwrapped(model, "fuse"))
    if kept := _kept(model):
        names = remaining_mixers(model)
        logger.warning("fuse: %d of %d blocks keep their token mixer (%s)", len(kept), len(model.mixers), names)
    return fused


def deploy_form(model: nn.Module) -> nn.Module:
    """The model as it is used: a MetaFormer fused as far as its mixers can be merged, any other model as it is."""
    return _fused(model) if isinstance(model, MetaFormer) else model


def _fused(model: MetaFormer) -> MetaFormer:
    fused = plain_copy(model)
    for stage in fused.stages:
        for i, block in enumerate(stage.blocks):
            stage.blocks[i] = block.fuse()
    return fused


@torch.no_grad()
def fold(model: MetaFormer) -> MetaFormer:
    """The deploy form without layer scales: `ls1` merged into norm1, `ls2` into fc2. Fuses first where needed.

    Raises:
        ValueError: `model` is not a MetaFormer, or has a token mixer through which `ls1` cannot pass.
    """
    folded = _fused(_unwrapped(model, "fold"))
    for name, block in folded.named_modules():
        if not isinstance(block, Block) or isinstance(block.layer_scale1, nn.Identity):
            continue
        if not isinstance(block.token_mixer, Identity):
            raise ValueError(f"fold: {name} has a {type(block.token_mixer).__name__} mixer; only a fused block folds")
        block.norm1 = merge(block.norm1, block.layer_scale1)
        _fold_into_mlp(block.mlp, block.layer_scale2)
        block.layer_scale1 = nn.Identity().train(block.training)
        block.layer_scale2 = nn.Identity().train(block.training)
    return folded


def _fold_into_mlp(mlp: nn.Module, layer_scale: LayerScale) -> None:
    fc2, scale = deepcopy(mlp.fc2), layer_scale.scale
    fc2.weight.mul_(scale.view(-1, 1, 1, 1))
    if fc2.bias is not None:
        fc2.bias.mul_(scale)
    tokens = torch.randn(2, mlp.fc1.in_channels, 1, 1, generator=torch.Generator().manual_seed(0)).to(fc2.weight)
    expected = layer_scale(mlp(tokens))
    mlp.fc2 = fc2
    if not fc2.weight.is_meta:
        check_equal(mlp(tokens), expected, fc2.weight.dtype, "LayerScale")


def remaining_mixers(model: nn.Module) -> str:
    """The mixers that stay after a fuse, because they mix tokens, by name and with commas; "" where there are none.

    For a network that is no MetaFormer, the name of its class.
    """
    if not isinstance(model, MetaFormer):
        return type(model).__name__
    return ", ".join(dict.fromkeys(_kept(model)))


def _kept(model: MetaFormer) -> list[str]:
    mixers = [block.token_mixer for stage in model.stages for block in stage.blocks]
    named = zip(model.mixers, mixers, strict=True)
    return [name for name, mixer in named if not isinstance(mixer, Identity) and not hasattr(mixer, "fold_into")]


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
