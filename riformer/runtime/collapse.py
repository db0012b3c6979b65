"""The collapsed form: a block is two matrix products and nothing else passes over the map.

In deploy form, per sample, `norm1`, the residual add and `norm2` together are one affine map per channel. With the
per-channel moments of a block's input x known, its MLP's input is `h = scale * x + shift` and its output
`gain * x + offset + fc2(gelu(fc1(h)))`, where the four follow in closed form (`coefficients`). So no norm reads the
map: one affine map is the prologue of the first product, the other is the epilogue of the second, in which the next
block's moments are summed as well.

Moments are of shifted values, x - K with K a token of the map: E[x^2] - E[x]^2 loses everything at a large common mean.
"""

from typing import NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from riformer.model.fuse import fold, remaining_mixers
from riformer.model.metaformer import MetaFormer
from riformer_runtime.native.weights import BlockWeights, ConvWeights, NetworkWeights


class Coefficients(NamedTuple):
    """A block's affine maps for each sample, and the mean of its output without fc2. Shape: [N, C] each."""

    scale: Tensor
    shift: Tensor
    gain: Tensor
    offset: Tensor
    mean: Tensor


@torch.no_grad()
def network_weights(model: MetaFormer) -> NetworkWeights:
    """The weights of the collapsed form of a RIFormer, given in training form or deploy form.

    Raises:
        ValueError: the model is no MetaFormer, mixes tokens, or its head is not norm, average, classifier.
    """
    if not isinstance(model, MetaFormer):
        raise ValueError(
            f"the collapsed form takes a MetaFormer, not {type(model).__name__}: of a wrapped model (DDP, EMA, "
            f"torch.compile) give the model inside; a features_only backbone can be fused instead, by "
            f"timm.utils.reparameterize_model"
        )
    if mixers := remaining_mixers(model):
        raise ValueError(f"the model mixes tokens ({mixers}): only a RIFormer collapses into matrix products")
    folded = fold(model)
    head = folded.head
    if head.global_pool.pool_type != "avg" or not isinstance(head.norm, nn.GroupNorm) or head.pool_first:
        raise ValueError(
            f"the head pools by {head.global_pool.pool_type!r} {'before' if head.pool_first else 'after'} "
            f"{type(head.norm).__name__}; "
            "the collapsed form needs global_pool='avg' after the head's norm"
        )
    convs, stages = [], []
    for i, stage in enumerate(folded.stages):
        conv = (stage.downsample if i else folded.stem).conv
        convs.append(ConvWeights(conv.weight, conv.bias, conv.stride[0], conv.padding[0]))
        stages.append(tuple(_block_weights(block) for block in stage.blocks))
    weight, bias = head.norm.weight, head.norm.bias
    if isinstance(head.fc, nn.Identity):  # num_classes=0: pooled features
        return NetworkWeights(tuple(convs), tuple(stages), weight.diag(), bias, head.norm.eps)
    head_bias = head.fc.weight @ bias + (0 if head.fc.bias is None else head.fc.bias)
    return NetworkWeights(tuple(convs), tuple(stages), head.fc.weight * weight, head_bias, head.norm.eps)


def _block_weights(block: nn.Module) -> BlockWeights:
    norms = (block.norm1.weight, block.norm1.bias, block.norm2.weight, block.norm2.bias)
    fc1, fc2 = block.mlp.fc1, block.mlp.fc2
    return BlockWeights(*norms, fc1.weight.flatten(1), fc1.bias, fc2.weight.flatten(1), fc2.bias)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel over the tokens of each sample, in x's type, which must be float32 or wider.

    Shape: [N, L, C] -> [N, C] and [N, C].
    """
    centre = x[:, :1]
    centred = x - centre
    mean = centred.mean(1)
    return mean + centre[:, 0], (centred * centred).mean(1) - mean * mean


def coefficients(mean: Tensor, var: Tensor, block: BlockWeights, eps: float) -> Coefficients:
    """What norm1, the residual add and norm2 come to, from the moments of the block's input.

    The variance over channels and tokens is that within channels plus that between their means.

    Shape: mean, var [N, C].
    """
    norm1_weight, norm1_bias, norm2_weight, norm2_bias = (tensor.to(mean.dtype) for tensor in block[:4])
    centre = mean.mean(1, keepdim=True)
    difference = mean - centre
    rstd = torch.rsqrt(var.mean(1, keepdim=True) + (difference * difference).mean(1, keepdim=True) + eps)
    gain = 1 + rstd * norm1_weight
    offset = norm1_bias - norm1_weight * (rstd * centre)
    mean = mean + difference * rstd * norm1_weight + norm1_bias  # gain * mean + offset, but without cancellation
    centre = mean.mean(1, keepdim=True)
    difference = mean - centre
    rstd = torch.rsqrt(
        (gain * gain * var).mean(1, keepdim=True) + (difference * difference).mean(1, keepdim=True) + eps
    )
    scale = rstd * norm2_weight * gain
    shift = norm2_bias + rstd * norm2_weight * (offset - centre)
    return Coefficients(scale, shift, gain, offset + block.fc2_bias.to(mean.dtype), mean)


def normalised_mean(mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """The head's norm, then its average over the tokens, from the moments. Shape: [N, C] -> [N, C]."""
    difference = mean - mean.mean(1, keepdim=True)
    return difference * torch.rsqrt(var.mean(1, keepdim=True) + (difference * difference).mean(1, keepdim=True) + eps)


class CollapsedBlock(nn.Module):
    """A block on tokens. Shape: [N, L, C] -> [N, L, C]."""

    def __init__(self, weights: BlockWeights, dtype: torch.dtype, eps: float):
        super().__init__()
        self.eps = eps
        self.wide = torch.promote_types(dtype, torch.float32)
        for name, tensor in weights._asdict().items():
            # Choice: norms and fc2's bias stay in float32, as the coefficients are; products take `dtype`.
            own = dtype if name in ("fc1_weight", "fc1_bias", "fc2_weight") else self.wide
            self.register_buffer(name, tensor.detach().to(own, copy=True).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        weights = BlockWeights(*(getattr(self, name) for name in BlockWeights._fields))
        mean, var = moments(x.to(self.wide))
        scale, shift, gain, offset, _ = (c.to(x.dtype)[:, None] for c in coefficients(mean, var, weights, self.eps))
        hidden = F.gelu(F.linear(x * scale + shift, self.fc1_weight, self.fc1_bias))
        return F.linear(hidden, self.fc2_weight) + (x * gain + offset)


class Collapsed(nn.Module):
    """A RIFormer in collapsed form, in plain PyTorch: for torch.compile, torch.export, ONNX, and any device.

    Args:
        model: a RIFormer in training form or deploy form; it stays as it was.
        dtype: of products and maps; moments and coefficients are in float32 at least.

    Shape: images [N, C, H, W] -> logits [N, K] in float32, or in float64 where `dtype` is.

    Raises:
        ValueError: the model mixes tokens, or its head is not norm, average, classifier.
    """

    def __init__(self, model: MetaFormer, dtype: torch.dtype = torch.float32):
        super().__init__()
        weights = network_weights(model)
        self.dtype, self.wide, self.eps = dtype, torch.promote_types(dtype, torch.float32), weights.eps
        convs = [_conv(conv).to(dtype).to(memory_format=torch.channels_last) for conv in weights.convs]
        self.convs = nn.ModuleList(convs)
        blocks = [[CollapsedBlock(block, dtype, weights.eps) for block in stage] for stage in weights.stages]
        self.stages = nn.ModuleList([nn.Sequential(*stage) for stage in blocks])
        out_features, in_features = weights.head_weight.shape
        self.head = nn.Linear(in_features, out_features, device="meta")
        self.head.weight, self.head.bias = (nn.Parameter(w.clone(), False) for w in weights[2:4])
        self.head.to(self.wide)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        x = images.to(self.dtype)  # the convolutions give channels last, as their weights are
        for conv, blocks in zip(self.convs, self.stages, strict=True):
            x = conv(x)
            tokens = blocks(x.flatten(2).transpose(1, 2))
            x = tokens.transpose(1, 2).unflatten(2, (x.shape[2], x.shape[3]))
        mean, var = moments(tokens.to(self.wide))
        return self.head(normalised_mean(mean, var, self.eps))

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError("the collapsed form cannot be scripted: trace it, or script riformer.fuse(model)")


def _conv(weights: ConvWeights) -> nn.Conv2d:
    """The convolution as a module, holding a copy of the weights."""
    out_chans, in_chans, kernel, _ = weights.weight.shape
    conv = nn.Conv2d(in_chans, out_chans, kernel, weights.stride, weights.padding, device="meta")
    conv.weight, conv.bias = (nn.Parameter(w.detach().clone(), False) for w in weights[:2])
    return conv
