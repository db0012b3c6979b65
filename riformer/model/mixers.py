"""Token mixers: what a MetaFormer block does between its norm and its residual add.

Every mixer is built as `Mixer(dim, grid)`, where `grid` is the (height, width) of the token map, and maps
[N, dim, height, width] to the same shape. A mixer that is linear and per channel can be merged into the norm in
front of it: it then has a method `fold_into(norm) -> (weight, bias)`, which `merge` checks.
"""

from copy import deepcopy

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import register_notrace_module
from torch import Tensor, nn


class Affine(nn.Module):
    """RIFormer's stand-in for a token mixer: `s * y + t - y` per channel. It mixes nothing.

    The subtraction of y cancels the block's residual seen from inside, as in PoolFormer's pooling.
    Choice: s = 1 and t = 0 at the start, so that the branch begins as exact zero and the block as exact identity.

    Shape: [N, C, H, W] -> [N, C, H, W].
    """

    def __init__(self, dim: int, grid: tuple[int, int]):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, y: Tensor) -> Tensor:
        return (self.weight - 1).view(-1, 1, 1) * y + self.bias.view(-1, 1, 1)

    def fold_into(self, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
        """Weight and bias of the norm that equals this mixer after `norm`: w(s - 1) and b(s - 1) + t."""
        gain = self.weight - 1
        return norm.weight * gain, norm.bias * gain + self.bias


class Identity(nn.Module):
    """Returns its input: the deploy form of RIFormer, and the plain identity MetaFormer baseline.

    Shape: [N, C, H, W] -> [N, C, H, W].
    """

    def __init__(self, dim: int, grid: tuple[int, int]):
        super().__init__()

    def forward(self, y: Tensor) -> Tensor:
        return y


class Nothing(nn.Module):
    """Returns zeros, so that the block is its MLP alone: an affine fixed at s = 1, t = 0. A control beside Identity.

    Shape: [N, C, H, W] -> zeros [N, C, H, W].
    """

    def __init__(self, dim: int, grid: tuple[int, int]):
        super().__init__()

    def forward(self, y: Tensor) -> Tensor:
        return 0 * y  # keeps the norm in the graph: DDP expects a gradient for every parameter

    def fold_into(self, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
        """Weight and bias of the norm that equals this mixer after `norm`: zeros."""
        return torch.zeros_like(norm.weight), torch.zeros_like(norm.bias)


class Pooling(nn.Module):
    """PoolFormer's mixer: `avgpool3x3(y) - y`, stride 1, padding not counted.

    Shape: [N, C, H, W] -> [N, C, H, W].
    """

    def __init__(self, dim: int, grid: tuple[int, int]):
        super().__init__()

    def forward(self, y: Tensor) -> Tensor:
        return F.avg_pool2d(y, 3, stride=1, padding=1, count_include_pad=False) - y


class Attention(nn.Module):
    """Multi-head self-attention over the token map, heads of 32 channels (or one head when `dim` is not a multiple).

    Shape: [N, C, H, W] -> [N, C, H, W].
    """

    def __init__(self, dim: int, grid: tuple[int, int]):
        super().__init__()
        self.num_heads = dim // 32 if dim % 32 == 0 else 1
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=False)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, y: Tensor) -> Tensor:
        n, c, h, w = y.shape
        q, k, v = self.qkv(y).view(n, 3, self.num_heads, c // self.num_heads, h * w).transpose(-2, -1).unbind(1)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(-2, -1).reshape(n, c, h, w))


@register_notrace_module
class GlobalFilter(nn.Module):
    """GFNet's mixer: a learned complex filter per channel on the map's spectrum, computed in float32 or wider.

    On another grid than the one it was built for, the filter is resampled (see `resample_filter`).

    Shape: [N, C, H, W] -> [N, C, H, W].
    """

    def __init__(self, dim: int, grid: tuple[int, int]):
        super().__init__()
        height, width = grid
        self.complex_weight = nn.Parameter(torch.randn(height, width // 2 + 1, dim, 2) * 0.02)

    def forward(self, y: Tensor) -> Tensor:
        return filter_map(y, self.complex_weight)


def filter_map(y: Tensor, complex_weight: Tensor) -> Tensor:
    """The map with its spectrum multiplied by a filter. Shape: [N, C, H, W], [h, w // 2 + 1, C, 2] -> [N, C, H, W]."""
    height, width = y.shape[-2:]
    weight = resample_filter(complex_weight, height, width // 2 + 1).permute(3, 2, 0, 1)
    wide = y if y.dtype == torch.float64 else y.float()  # autocast leaves alone what is float32 already
    real, imaginary = weight.to(wide.dtype).unbind()
    spectrum = torch.fft.rfft2(wide, norm="ortho") * torch.complex(real, imaginary)
    return torch.fft.irfft2(spectrum, s=(height, width), norm="ortho").to(y.dtype)


def resample_filter(weight: Tensor, height: int, half_width: int) -> Tensor:
    """A global filter for another grid, bicubically, corners kept so that the lowest frequency stays where it is.

    Shape: [h, w // 2 + 1, C, 2] -> [height, half_width, C, 2].
    """
    if weight.shape[:2] == (height, half_width):
        return weight
    planes = weight.permute(3, 2, 0, 1)
    return F.interpolate(planes, (height, half_width), mode="bicubic", align_corners=True).permute(2, 3, 1, 0)


class TokenMatrix(nn.Module):
    """One learned matrix over all token positions, shared by the channels: the simplest global mixer.

    Bound to the grid it was built for.

    Shape: [N, C, H, W] -> [N, C, H, W].

    Raises:
        ValueError: the map has another size than `grid`.
    """

    trainable = True

    def __init__(self, dim: int, grid: tuple[int, int]):
        super().__init__()
        self.grid = tuple(grid)
        num_tokens = grid[0] * grid[1]
        matrix = trunc_normal_(torch.empty(num_tokens, num_tokens), std=num_tokens**-0.5)
        self.weight = nn.Parameter(matrix, requires_grad=self.trainable)

    def forward(self, y: Tensor) -> Tensor:
        if tuple(y.shape[-2:]) != self.grid:
            raise ValueError(
                f"token map is {tuple(y.shape[-2:])}, but this mixer was built for {self.grid}: "
                f"pass img_size to timm.create_model for another resolution"
            )
        return (y.flatten(2) @ self.weight).view_as(y)


class RandomMatrix(TokenMatrix):
    """A frozen random matrix whose columns sum to one (the "random mixing" of MetaFormer Baselines).

    Each output token is a weighted mean of all input tokens.

    Shape: [N, C, H, W] -> [N, C, H, W].
    """

    trainable = False

    def __init__(self, dim: int, grid: tuple[int, int]):
        super().__init__(dim, grid)
        self.weight.data = torch.rand_like(self.weight).softmax(dim=0)


class SeparableConv(nn.Module):
    """Inverted separable convolution (ConvFormer's mixer): 1x1 to twice the width, GELU, depthwise 7x7, 1x1 back.

    Shape: [N, C, H, W] -> [N, C, H, W].
    """

    def __init__(self, dim: int, grid: tuple[int, int]):
        super().__init__()
        self.pointwise1 = nn.Conv2d(dim, 2 * dim, 1, bias=False)
        self.depthwise = nn.Conv2d(2 * dim, 2 * dim, 7, padding=3, groups=2 * dim, bias=False)
        self.pointwise2 = nn.Conv2d(2 * dim, dim, 1, bias=False)

    def forward(self, y: Tensor) -> Tensor:
        return self.pointwise2(self.depthwise(F.gelu(self.pointwise1(y))))


@torch.no_grad()
def merge(norm: nn.Module, mixer: nn.Module) -> nn.GroupNorm:
    """The norm that equals `mixer` after `norm` in eval mode, compared with the two on random tokens.

    Raises:
        ValueError: `norm` is no GroupNorm with weight and bias, or the merged norm computes something else.
    """
    if not isinstance(norm, nn.GroupNorm) or norm.weight is None:
        raise ValueError(f"norm1 is {norm}; only an nn.GroupNorm with weight and bias can take up a mixer")
    merged = deepcopy(norm)
    weight, bias = mixer.fold_into(norm)
    merged.weight.copy_(weight)
    merged.bias.copy_(bias)
    if not merged.weight.is_meta:
        tokens = torch.randn(2, norm.num_channels, 2, 2, generator=torch.Generator().manual_seed(0)).double()
        before, after, mixing = (deepcopy(module).cpu().double().eval() for module in (norm, merged, mixer))
        normed = before(tokens)
        check_equal(after(tokens), mixing(normed), norm.weight.dtype, type(mixer).__name__, normed.abs().max().item())
    return merged


def check_equal(actual: Tensor, expected: Tensor, dtype: torch.dtype, merged: str, scale: float = 0.0) -> None:
    """Passes what differs by no more than rounding in `dtype`, relative to the largest value or `scale`.

    Raises:
        ValueError: a larger difference, or values that are not finite.
    """
    difference = (actual - expected).abs().max().item()
    if not difference <= 16 * torch.finfo(dtype).eps * max(scale, expected.abs().max().item()):
        raise ValueError(
            f"{merged} cannot be merged: the result differs by {difference:.2g} where values are up to "
            f"{expected.abs().max().item():.2g}; weights that are not finite, or a module that was changed, do that"
        )


MIXERS: dict[str, type[nn.Module]] = {
    "affine": Affine,
    "identity": Identity,
    "nothing": Nothing,
    "pooling": Pooling,
    "attention": Attention,
    "global_filter": GlobalFilter,
    "token_matrix": TokenMatrix,
    "random_matrix": RandomMatrix,
    "separable_conv": SeparableConv,
}
