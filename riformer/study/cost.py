"""What a network costs on paper: parameters, and multiply-accumulates of one image.

Counted as the published RIFormer numbers are (mmengine's and fvcore's rules): convolutions and matrix products by
their multiplications, norms at 5 per element; biases, activations, pooling, residual adds, layer scales and affines
at nothing.
"""

from collections.abc import Sequence
from copy import deepcopy
from itertools import chain
from math import log2, prod
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

aten = torch.ops.aten


def count_params(model: nn.Module) -> int:
    """Parameters of the model, frozen ones included."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, img_size: int | Sequence[int] = 224) -> int:
    """Multiply-accumulates of one image through any model in eval mode, from shapes alone: nothing is computed.

    The model may be on any device, the meta device included, and stays as it is.

    Args:
        model: takes [1, C, H, W].
        img_size: pixels of a square, (height, width), or (channels, height, width); channels are otherwise the model's
            `in_chans`, or 3.
    """
    shape = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(shape) == 2:
        shape = (getattr(model, "in_chans", 3), *shape)
    own = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    like = next(model.parameters(), torch.empty(0))
    model = deepcopy(model, own).eval()  # new modules around the same tensors: eval() must not reach the caller's
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), counter:
        model(torch.empty(1, *shape, device=like.device, dtype=like.dtype))
    return counter.get_total_flops() // 2


def _norm_flops(x_shape: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 2 * 5 * prod(x_shape)


def _attention_flops(q_shape: Sequence[int], k_shape: Sequence[int], v_shape: Sequence[int], *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q_shape, k_shape, v_shape)


def _fft_flops(x: torch.Tensor, dim: Sequence[int], *args: Any, out_val: torch.Tensor, **kwargs: Any) -> int:
    """2.5 N log2(n) for a transform between real and complex, 5 N log2(n) between complex; n is one transform's length.

    Choice: the textbook operation count of the radix-2 algorithm, as the published rules know no FFT.
    """
    wide = out_val if x.is_complex() else x
    operations = 5.0 if x.is_complex() and out_val.is_complex() else 2.5
    return round(operations * wide.numel() * log2(prod(wide.shape[d] for d in dim)))


_fft_flops._get_raw = True  # type: ignore[attr-defined]  # the counter then passes tensors, not only their shapes

_NORMS = (
    aten.native_group_norm,
    aten.native_layer_norm,
    aten.native_batch_norm,
    aten._native_batch_norm_legit,
    aten._native_batch_norm_legit_no_training,
    aten.cudnn_batch_norm,
    aten._fused_rms_norm,
)
_FORMULAS = {
    **dict.fromkeys(_NORMS, _norm_flops),
    **dict.fromkeys((aten._fft_r2c, aten._fft_c2r, aten._fft_c2c), _fft_flops),
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,  # the counter knows only the CUDA kernels
}
