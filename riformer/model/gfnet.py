"""GFNet-H, the paper's logit teacher: stages of blocks whose mixer is a learned filter on the map's spectrum.

Rao et al., "Global Filter Networks for Image Classification", NeurIPS 2021; keys and function are those of the authors'
`GFNetPyramid`, so their checkpoints load as they are. It is no MetaFormer of this package: a block has one residual,
norms are per token, and the position embedding is added once, after the first patch embedding.
"""

from collections.abc import Mapping, Sequence

import torch
from timm.layers import DropPath, Mlp, calculate_drop_path_rates, resample_abs_pos_embed, trunc_normal_
from timm.models import checkpoint_seq, register_notrace_function, register_notrace_module
from timm.models._features import feature_take_indices
from torch import Tensor, jit, nn

from riformer.model.metaformer import build_pool, conv_size
from riformer.model.mixers import GlobalFilter, filter_map, resample_filter


class PatchEmbed(nn.Module):
    """A convolution without overlap: the first one on the image, later ones from a stage to the next.

    Shape: [N, in_dim, H, W] -> [N, dim, H // patch, W // patch].
    """

    def __init__(self, in_dim: int, dim: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


@register_notrace_module
class TokenFilter(GlobalFilter):
    """The global filter on channels-last maps. Shape: [N, H, W, C] -> [N, H, W, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return filter_map(x.permute(0, 3, 1, 2), self.complex_weight).permute(0, 2, 3, 1)


class FilterBlock(nn.Module):
    """`x + gamma * mlp(norm2(filter(norm1(x))))`: one residual around filter and MLP together.

    Shape: [N, H, W, C] -> [N, H, W, C].
    """

    def __init__(self, dim: int, grid: tuple[int, int], mlp_ratio: float, layer_scale_init: float, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.filter = TokenFilter(dim, grid)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.gamma = nn.Parameter(layer_scale_init * torch.ones(dim))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.gamma * self.mlp(self.norm2(self.filter(self.norm1(x)))))


class GFNet(nn.Module):
    """GFNet-H.

    On another resolution than `img_size`, position embedding and filters are resampled bicubically in each forward
    pass; a model built for that resolution loads the same checkpoint with them resampled once.

    Args:
        depths: blocks in each stage.
        dims: channels in each stage.
        in_chans: channels of the input image.
        num_classes: outputs of the classifier; 0 returns pooled features.
        global_pool: pooling before the classifier; "" keeps the map.
        patch_size: side of the first patches, pixels; each later stage halves the map.
        mlp_ratio: hidden width of the MLP over its input width.
        layer_scale_init: first value of gamma.
        img_size: input height and width, pixels.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.

    Shape: [N, in_chans, H, W] -> [N, num_classes].

    Raises:
        ValueError: depths and dims of different number.
    """

    def __init__(
        self,
        depths: Sequence[int] = (3, 3, 10, 3),
        dims: Sequence[int] = (64, 128, 256, 512),
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        patch_size: int = 4,
        mlp_ratio: float = 4.0,
        layer_scale_init: float = 1e-3,
        img_size: int | tuple[int, int] = 224,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        if len(depths) != len(dims):
            raise ValueError(f"depths {depths} and dims {dims} must name the same number of stages")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info: list[dict] = []
        self.grad_checkpointing = False

        drop_paths = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        grid = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.patch_embed, self.blocks = nn.ModuleList(), nn.ModuleList()
        for i, dim in enumerate(dims):
            embed = PatchEmbed(dims[i - 1] if i else in_chans, dim, 2 if i else patch_size)
            grid = conv_size(grid, embed.proj)
            if i == 0:
                self.grid = grid
            blocks = [FilterBlock(dim, grid, mlp_ratio, layer_scale_init, rate) for rate in drop_paths[i]]
            self.patch_embed.append(embed)
            self.blocks.append(nn.Sequential(*blocks))
            self.feature_info.append(dict(num_chs=dim, reduction=patch_size * 2**i, module=f"blocks.{i}"))
        self.pos_embed = nn.Parameter(trunc_normal_(torch.empty(1, self.grid[0] * self.grid[1], dims[0]), std=0.02))
        self.norm: nn.Module = nn.LayerNorm(dims[-1], eps=1e-6)
        self.global_pool = build_pool(global_pool)
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Linear(dims[-1], num_classes) if num_classes > 0 else nn.Identity()
        self.apply(_init_weights)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """The last stage's map, after the norm. Shape: [N, in_chans, H, W] -> [N, dims[-1], H', W']."""
        return self._normed(self._maps(x, len(self.blocks) - 1)[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits, or pooled features with `pre_logits`. Shape: [N, dims[-1], H', W'] -> [N, K]."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def _maps(self, x: Tensor, last: int) -> list[Tensor]:
        """The map of each stage up to number `last`, [N, dim, H, W]. One loop over all: TorchScript takes no slice."""
        maps = []
        for i, (patch_embed, blocks) in enumerate(zip(self.patch_embed, self.blocks)):  # noqa: B905 TorchScript
            if i <= last:
                x = patch_embed(x).permute(0, 2, 3, 1)
                if i == 0:
                    x = x + positions(self.pos_embed, self.grid, x)
                x = checkpoint_seq(blocks, x) if self.grad_checkpointing and not jit.is_scripting() else blocks(x)
                x = x.permute(0, 3, 1, 2)
                maps.append(x)
        return maps

    def _normed(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

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

        `norm` applies the last norm to the last stage only, whose width it has.

        Raises:
            ValueError: `output_fmt` is not "NCHW".
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is {output_fmt!r}, but only 'NCHW' is supported")
        take, last = feature_take_indices(len(self.blocks), indices)
        maps = self._maps(x, last if stop_early else len(self.blocks) - 1)
        # The last norm has the width of the last stage, which an early stop does not reach.
        final = self._normed(maps[-1]) if len(maps) == len(self.blocks) else maps[-1]
        if norm:
            maps[-1] = final
        intermediates = [x for i, x in enumerate(maps) if i in take]
        return intermediates if intermediates_only else (final, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Cuts the stages that `indices` do not need, in place, and returns the indices as a list."""
        take, last = feature_take_indices(len(self.blocks), indices)
        cut = last < len(self.blocks) - 1
        self.patch_embed, self.blocks = self.patch_embed[: last + 1], self.blocks[: last + 1]
        self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_norm or cut:
            self.norm = nn.Identity()
        if prune_head or cut:
            self.reset_classifier(0, "")
        return take

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a fresh one (0: none), and the pooling when one is given, in place."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = build_pool(global_pool)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        _init_weights(self.head)
        self.head.to(self.pos_embed).train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Layer groups for layer-wise learning rates, in timm's form; the head, which none matches, is the last."""
        stem = r"^pos_embed|^patch_embed\.0"
        if coarse:
            return dict(stem=stem, blocks=r"^(?:blocks|patch_embed)\.(\d+)")
        blocks = [(r"^patch_embed\.(\d+)", (0,)), (r"^blocks\.(\d+)\.(\d+)", None), (r"^norm", (99999,))]
        return dict(stem=stem, blocks=blocks)


def resample_state(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The checkpoint with global filters and GFNet's position embedding resampled to the grids of `model`, bicubically.

    Tensors that already fit, and those of other kinds, stay as they are.
    """
    own, resampled = model.state_dict(), dict(state)
    for key, tensor in state.items():
        if key.endswith(".complex_weight") and key in own and tensor.ndim == 4:
            resampled[key] = resample_filter(tensor, *own[key].shape[:2])
    first = state.get("blocks.0.0.filter.complex_weight")
    if isinstance(model, GFNet) and first is not None and state["pos_embed"].shape[1] != model.pos_embed.shape[1]:
        grid = (first.shape[0], state["pos_embed"].shape[1] // first.shape[0])
        resampled["pos_embed"] = _resampled(state["pos_embed"], grid, model.grid)
    return resampled


def _resampled(pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Shape: [1, old height * old width, C] -> [1, new height * new width, C]."""
    return resample_abs_pos_embed(pos_embed, list(new), list(old), num_prefix_tokens=0)


def positions(pos_embed: Tensor, grid: tuple[int, int], x: Tensor) -> Tensor:
    """The position embedding on the map's own grid. Shape: [1, height * width, C], x [N, H, W, C] -> [1, H, W, C]."""
    height, width = x.shape[1:3]
    if (height, width) != grid:
        pos_embed = _resampled(pos_embed, grid, (height, width))
    return pos_embed.view(1, height, width, -1)


register_notrace_function(positions)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
