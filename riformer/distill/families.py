"""How networks of each family name their parts: the one table for imitation and for the profile of latency."""

import re
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Family:
    """Module names of a family, and the layout of its feature maps.

    Attributes:
        blocks: pattern of a block's name with the groups (stage, index), or (index) for a network without stages.
        mixer: name of the token mixer inside a block.
        norms: names of the norms inside a block.
        mlp: name of the MLP inside a block.
        channels_last: whether feature maps are [N, H, W, C]. Outputs of three dimensions are tokens in any family,
            [N, tokens, C].
        mixer_output: the module inside a block whose output is what the token mixer adds to the residual stream, where
            that is not the mixer itself.
    """

    blocks: str
    mixer: str
    norms: tuple[str, ...] = ("norm1", "norm2")
    mlp: str = "mlp"
    channels_last: bool = False
    mixer_output: str = ""

    @property
    def imitated_mixer(self) -> str:
        """The module inside a block whose output the mixer term compares."""
        return self.mixer_output or self.mixer


FAMILIES = {  # by the name of the model's class
    "MetaFormer": Family(r"stages\.(\d+)\.blocks\.(\d+)", "token_mixer"),  # also timm's PoolFormer, Conv- and CAFormer
    "GFNet": Family(r"blocks\.(\d+)\.(\d+)", "filter", channels_last=True),
    "ConvNeXt": Family(r"stages\.(\d+)\.blocks\.(\d+)", "conv_dw", norms=("norm",)),
    # Swin's attention works on single windows; drop_path1 is the first module after it that has the whole map.
    "SwinTransformer": Family(r"layers\.(\d+)\.blocks\.(\d+)", "attn", channels_last=True, mixer_output="drop_path1"),
    "VisionTransformer": Family(r"blocks\.(\d+)", "attn"),  # also DeiT
    "VisionTransformerDistilled": Family(r"blocks\.(\d+)", "attn"),
}


def family_of(model: nn.Module) -> Family:
    """How this model names its parts.

    Raises:
        ValueError: its class is not in FAMILIES.
    """
    name = type(model).__name__
    if name not in FAMILIES:
        raise ValueError(
            f"the blocks of a {name} are not known; known classes are {', '.join(sorted(FAMILIES))}. To add it, give "
            f"FAMILIES in riformer/distill/families.py a line with the names of its blocks, token mixer, norms and MLP"
        )
    return FAMILIES[name]


def block_names(model: nn.Module) -> list[list[str]]:
    """Module names of the blocks, a list for each stage; a model without stages has one list.

    Raises:
        ValueError: the model's class is not in FAMILIES.
    """
    pattern = family_of(model).blocks
    stages: dict[str, list[str]] = {}
    for name, _ in model.named_modules():
        if match := re.fullmatch(pattern, name):
            stages.setdefault("".join(match.groups()[:-1]), []).append(name)
    return list(stages.values())
