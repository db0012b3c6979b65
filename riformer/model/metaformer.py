"""The network: stem -> stages of blocks -> head. The token mixer is an argument; everything else stays the same.

RIFormer's training form is `MetaFormer(mixer="affine")`, its deploy form `MetaFormer(mixer="identity")` with rewritten
norms, PoolFormer is `MetaFormer(mixer="pooling")`. There is one block class and no switch between forms.
"""

from collections.abc import Sequence
from difflib import get_close_matches
from numbers import Integral
from typing import cast

import torch.nn.functional as F
from timm.layers import DropPath, SelectAdaptivePool2d, calculate_drop_path_rates, trunc_normal_
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, jit, nn, ones
from torch.nn.utils.parametrize import type_before_parametrizations

from riformer.model.mixers import MIXERS, Identity, merge
from riformer.model.plain import plain_copy


class ConvEmbed(nn.Module):
    """A strided convolution from one map to the next coarser one: the stem, and the step between two stages.

    Shape: [N, in_dim, H, W] -> [N, dim, H / stride, W / stride], rounded as the padding allows.
    """

    def __init__(self, in_dim: int, dim: int, patch: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, patch, stride=stride, padding=(patch - stride + 1) // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class LayerScale(nn.Module):
    """A learned factor per channel.

    Shape: [N, C, H, W] -> [N, C, H, W].
    """

    def __init__(self, dim: int, init: float):
        super().__init__()
        self.scale = nn.Parameter(init * ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.view(-1, 1, 1)

    def fold_into(self, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
        """Weight and bias of the norm that equals this scale after `norm`."""
        return norm.weight * self.scale, norm.bias * self.scale


class Mlp(nn.Module):
    """Channel MLP: 1x1 convolution, exact GELU, 1x1 convolution.

    Shape: [N, C, H, W] -> [N, C, H, W].
    """

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1)
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """`x + ls1 * mixer(norm1(x))`, then `x + ls2 * mlp(norm2(x))`.

    Shape: [N, C, H, W] -> [N, C, H, W].
    """

    def __init__(
        self, dim: int, grid: tuple[int, int], mixer: str, mlp_ratio: float, layer_scale_init: float, drop_path: float
    ):
        super().__init__()

        def layer_scale() -> nn.Module:
            return LayerScale(dim, layer_scale_init) if layer_scale_init else nn.Identity()

        self.norm1 = nn.GroupNorm(1, dim)
        self.token_mixer = MIXERS[mixer](dim, grid)
        self.layer_scale1 = layer_scale()
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.GroupNorm(1, dim)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.layer_scale2 = layer_scale()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.layer_scale1(self.token_mixer(self.norm1(x))))
        return x + self.drop_path2(self.layer_scale2(self.mlp(self.norm2(x))))

    def fuse(self) -> "Block":
        """A new block, equal to this one in eval mode, with its mixer merged into norm1.

        A mixer without `fold_into`, a real token mixer, stays. timm's reparameterize_model calls this method by name.

        Raises:
            ValueError: the block has hooks, or the merged norm does not compute what norm1 and mixer do.
        """
        fused = plain_copy(self)
        if hasattr(fused.token_mixer, "fold_into"):
            fused.norm1 = merge(fused.norm1, fused.token_mixer)
            fused.token_mixer = Identity(fused.norm1.num_channels, grid=(0, 0)).train(self.training)
        return fused


class Stage(nn.Module):
    """Downsampling (none in the first stage), then blocks on one token map.

    Shape: [N, in_dim, H, W] -> [N, dim, H', W'].
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[Block]):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        return checkpoint_seq(self.blocks, x) if self.grad_checkpointing and not jit.is_scripting() else self.blocks(x)


class Head(nn.Module):
    """Norm, average over the map, classifier: the official order. With `pool_first`, timm's: average, norm, classifier.

    Shape: [N, C, H, W] -> [N, num_classes].
    """

    def __init__(self, dim: int, num_classes: int, global_pool: str, drop_rate: float, pool_first: bool):
        super().__init__()
        self.pool_first = pool_first
        self.norm: nn.Module = nn.GroupNorm(1, dim)
        self.global_pool = build_pool(global_pool)
        self.drop = nn.Dropout(drop_rate)
        self.fc: nn.Module = nn.Linear(dim, num_classes) if num_classes > 0 else nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.norm(self.global_pool(x)) if self.pool_first else self.global_pool(self.norm(x))
        x = self.drop(x)
        return x if pre_logits else self.fc(x)


class MetaFormer(nn.Module):
    """Hierarchical MetaFormer with the official RIFormer / PoolFormer head.

    Args:
        depths: blocks in each stage.
        dims: channels in each stage.
        mixer: a name from `MIXERS` for every block, or one name a stage, or one name a block.
        in_chans: channels of the input image.
        num_classes: outputs of the classifier; 0 returns pooled features.
        global_pool: pooling in the head; "" keeps the map.
        pool_first: pools before the head's norm, as a PoolFormer of timm does; the official networks pool after it.
        stem_patch: kernel of the first convolution, pixels.
        stem_stride: stride of the first convolution, pixels.
        down_patch: kernel of the convolutions between stages, tokens; their stride is 2.
        mlp_ratio: hidden width of the MLP over its input width.
        layer_scale_init: first value of the layer scales; 0 builds none (the folded form).
        img_size: input height and width, pixels; matters only to mixers bound to a token grid.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
        init_std: standard deviation of the first weights of convolutions and classifier.

    Shape: [N, in_chans, H, W] -> [N, num_classes].

    Raises:
        ValueError: unknown mixer, sizes below 1, or depths, dims and mixers that do not agree in number.
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (64, 128, 320, 512),
        mixer: str | Sequence[str] = "affine",
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        pool_first: bool = False,
        stem_patch: int = 7,
        stem_stride: int = 4,
        down_patch: int = 3,
        mlp_ratio: float = 4.0,
        layer_scale_init: float = 1e-5,
        img_size: int | tuple[int, int] = 224,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        init_std: float = 0.02,
    ):
        super().__init__()
        patches = {"stem_patch": [stem_patch], "stem_stride": [stem_stride], "down_patch": [down_patch]}
        for argument, values in {"depths": depths, "dims": dims, **patches}.items():
            if not all(isinstance(value, Integral) and value > 0 for value in values):
                raise ValueError(f"{argument} is {values}; it must be whole numbers of 1 or more")
        names = [mixer] * len(depths) if isinstance(mixer, str) else list(mixer)
        if len(depths) != len(dims) or len(names) not in (len(depths), sum(depths)):
            raise ValueError(
                f"depths {depths} and dims {dims} must name the same number of stages, and mixer {mixer} as many, or "
                f"one a block"
            )
        if len(names) == len(depths):
            names = [name for name, depth in zip(names, depths, strict=True) for _ in range(depth)]
        for name in names:
            if name not in MIXERS:
                near = get_close_matches(name, MIXERS) or sorted(MIXERS)
                raise ValueError(f"mixer {name!r} is unknown; did you mean one of {near}?")

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info: list[dict] = []
        self.stem = ConvEmbed(in_chans, dims[0], stem_patch, stem_stride)
        grid = conv_size((img_size, img_size) if isinstance(img_size, int) else tuple(img_size), self.stem.conv)
        drop_paths = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)

        stages = []
        for i, dim in enumerate(dims):
            downsample = ConvEmbed(dims[i - 1], dim, down_patch, stride=2) if i else nn.Identity()
            grid = conv_size(grid, downsample.conv) if i else grid
            mixers = names[sum(depths[:i]) : sum(depths[: i + 1])]
            blocks = [
                Block(dim, grid, name, mlp_ratio, layer_scale_init, rate)
                for name, rate in zip(mixers, drop_paths[i], strict=True)
            ]
            stages.append(Stage(downsample, blocks))
            self.feature_info.append(dict(num_chs=dim, reduction=stem_stride * 2**i, module=f"stages.{i}"))
        self.stages = nn.Sequential(*stages)
        self.head = Head(dims[-1], num_classes, global_pool, drop_rate, pool_first)
        self.init_std = init_std
        self.apply(self._init_weights)

    @property
    @jit.unused
    def mixers(self) -> list[str]:
        """The token mixer of each block, by its name in `MIXERS`, as the blocks are now: fusing changes it."""
        names: dict[type, str] = {mixer: name for name, mixer in MIXERS.items()}
        blocks = [block for stage in self.stages for block in cast(Stage, stage).blocks]
        kinds = [type_before_parametrizations(block.token_mixer) for block in blocks]
        return [names.get(kind, kind.__name__) for kind in kinds]

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """The last stage's map, before the head's norm. Shape: [N, in_chans, H, W] -> [N, dims[-1], H', W']."""
        return self.stages(self.stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits, or pooled features with `pre_logits`. Shape: [N, dims[-1], H', W'] -> [N, K]."""
        return self.head(x, pre_logits=pre_logits)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Stage outputs chosen by `indices` (all when None, the last n when an int), as timm's models give them.

        Choice: `norm` applies the head's norm to the last stage only; it has the wrong width for the others.

        Raises:
            ValueError: `output_fmt` is not "NCHW".
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is {output_fmt!r}, but only 'NCHW' is supported")
        take, last = feature_take_indices(len(self.stages), indices)
        intermediates = []
        x = self.stem(x)
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take:
                intermediates.append(self.head.norm(x) if norm and i == len(self.stages) - 1 else x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Cuts the stages that `indices` do not need, in place, and returns the indices as a list."""
        take, last = feature_take_indices(len(self.stages), indices)
        cut = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_norm or cut:
            self.head.norm = nn.Identity()
        if prune_head or cut:
            self.reset_classifier(0, "")
        return take

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a fresh one (0: none), and the pooling when one is given, in place."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.head.global_pool = build_pool(global_pool)
        if num_classes > 0:
            like = self.stem.conv.weight
            self.head.fc = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            self._init_weights(self.head.fc)
        else:
            self.head.fc = nn.Identity()
        self.head.train(self.head.training)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            trunc_normal_(module.weight, std=self.init_std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes each block in the backward pass instead of keeping its activations."""
        for stage in self.stages:
            cast(Stage, stage).grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict:
        """Layer groups for layer-wise learning rates, in timm's form; the head, which none matches, is the last."""
        if coarse:
            return dict(stem=r"^stem", blocks=r"^stages\.(\d+)")
        blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return dict(stem=r"^stem", blocks=blocks)


def build_pool(pool_type: str) -> SelectAdaptivePool2d:
    """timm's pooling over the map, [N, C, H, W] -> [N, C]; "" keeps the map.

    Raises:
        ValueError: an unknown kind, or one that changes the width.
    """
    pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))
    if pool.feat_mult() != 1:
        raise ValueError(f"global_pool is {pool_type!r}, which changes the width; allowed are avg, max, avgmax and ''")
    return pool


def conv_size(size: tuple[int, int], conv: nn.Conv2d) -> tuple[int, int]:
    """Height and width of the convolution's output map."""
    kernel, stride, pad = conv.kernel_size[0], conv.stride[0], conv.padding[0]
    return (size[0] + 2 * pad - kernel) // stride + 1, (size[1] + 2 * pad - kernel) // stride + 1
