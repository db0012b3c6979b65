"""Costs computed without measuring: parameters, multiply-accumulates of one image, and the GPU-hours of a training.

Multiply-accumulates are counted like the published RIFormer numbers (mmengine's and fvcore's rules): convolutions and
matrix products count their multiplications, norms count 5 per element, and biases, activations, pooling, residual adds,
layer scales and affines count nothing.
"""

from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from itertools import chain
from math import log2, prod
from typing import Any

import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from riformer.config import Recipe
from riformer.measure.quoted import IMAGES_PER_S
from riformer.recipes import teacher_recipe

aten = torch.ops.aten


def count_params(model: nn.Module) -> int:
    """Parameters of the model, frozen ones included."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, img_size: int | Sequence[int] = 224) -> int:
    """Multiply-accumulates of one image through any model in eval mode; see `count_macs_by_module`."""
    return count_macs_by_module(model, img_size)[""]


def count_macs_by_module(model: nn.Module, img_size: int | Sequence[int] = 224) -> dict[str, int]:
    """Multiply-accumulates of one image by module name, for the modules that have any; "" is the whole model.

    They follow from shapes alone: nothing is computed. The model may be on any device, also on the meta device. It is
    counted in eval mode and is not changed.

    Args:
        model: takes [1, C, H, W].
        img_size: pixels of a square, (height, width), or (channels, height, width); channels are otherwise the model's
            `in_chans`, or 3.
    """
    shape = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(shape) == 2:
        shape = (getattr(model, "in_chans", 3), *shape)
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    like = next(model.parameters(), torch.empty(0))
    model = deepcopy(model, shared).eval()  # new modules with the same tensors: eval() must not change the caller's
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), counter:
        model(torch.empty(1, *shape, device=like.device, dtype=like.dtype))
    by_name = {name: sum(flops.values()) // 2 for name, flops in counter.get_flop_counts().items()}
    root = type(model).__name__
    inside = {name.removeprefix(f"{root}."): macs for name, macs in by_name.items() if name not in ("Global", root)}
    return {"": by_name.get("Global", 0), **inside}


def gpu_hours(recipe: Recipe, num_images: int = 1_281_167) -> float:
    """GPU-hours of a training, estimated for the GPU on which the RIFormer paper measured throughputs.

    It follows from published inference throughputs: an image goes forward through the student and every teacher, and
    backward through the student at twice the cost of forward. Other image sizes scale by multiply-accumulates, and so
    do GFNet-H-Ti and GFNet-H-S from the throughput of GFNet-H-B. Reading images, the optimiser and evaluation are left
    out. A teacher named "own" is counted with its training. For other GPUs, measure with `measure.dryrun`.

    Raises:
        ValueError: the throughput of a network was never published.
    """
    distill, size = recipe.distill, recipe.data.img_size
    sizes = ("depths", "dims", "stem_patch", "stem_stride", "down_patch")
    if any(getattr(recipe.model, name) for name in sizes):
        raise ValueError(f"no throughput is published of {recipe.model.name} with other sizes than its own")
    seconds = 3 * _published_seconds(_name(recipe), size)
    for reference in {*distill.logit_teachers, distill.module_teacher} - {""}:
        name = reference.removeprefix("timm:").partition("@")[0]
        seconds += _published_seconds(
            _name(teacher_recipe(recipe)) if reference == "own" else name, distill.teacher_img_size or 224
        )
    hours = recipe.optim.epochs * num_images * seconds / 3600
    return hours + (gpu_hours(teacher_recipe(recipe), num_images) if distill.trains_teacher else 0)


def _name(recipe: Recipe) -> str:
    """The name under which IMAGES_PER_S would have the recipe's network."""
    name, mixer = recipe.model.name, recipe.model.mixer
    if not name.startswith("riformer_") or mixer in ("affine", "identity"):
        return name
    return name.replace("riformer", "poolformer") if mixer == "pooling" else f"{name} with the mixer {mixer}"


def _published_seconds(name: str, img_size: int) -> float:
    """Seconds that an image takes forward through the network, from the published throughput."""
    measured = "gfnet_h_b" if name in ("gfnet_h_ti", "gfnet_h_s") else name
    if measured not in IMAGES_PER_S:
        raise ValueError(f"no throughput is published of {name!r}; known are {', '.join(IMAGES_PER_S)}")
    seconds = 1 / IMAGES_PER_S[measured]
    if (name, img_size) == (measured, 224):
        return seconds
    return seconds * _macs(name, img_size) / _macs(measured, 224)


@cache
def _macs(name: str, img_size: int) -> int:
    with torch.device("meta"):
        return count_macs(timm.create_model(name), img_size)


def _norm_flops(x_shape: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 2 * 5 * prod(x_shape)


def _attention_flops(q_shape: Sequence[int], k_shape: Sequence[int], v_shape: Sequence[int], *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q_shape, k_shape, v_shape)


def _fft_flops(x: torch.Tensor, dim: Sequence[int], *args: Any, out_val: torch.Tensor, **kwargs: Any) -> int:
    """2.5 N log2(n) for a transform between real and complex, 5 N log2(n) between complex; n is one transform's length.

    Choice: the textbook operation count of the radix-2 algorithm, because the published rules have none for FFTs.
    """
    wide = out_val if x.is_complex() else x
    operations = 5.0 if x.is_complex() and out_val.is_complex() else 2.5
    return round(operations * wide.numel() * log2(prod(wide.shape[d] for d in dim)))


_fft_flops._get_raw = True  # type: ignore[attr-defined]  # so that the counter passes tensors instead of shapes

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
