"""Limits of a network's speed: its matrix products alone, and the device's peak rate of products."""

import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from riformer_runtime.native.library import UnavailableError
from riformer_runtime.native.network import products_in_cache

aten = torch.ops.aten
PRODUCTS = {
    aten.convolution.default,
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
}


class _Recorder(TorchDispatchMode):
    """Collects the calls of products, with their operands."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **kwargs or {})


@torch.inference_mode(False)  # in inference mode the dispatcher shows composite operators, not their products
@torch.no_grad()
def products_alone(model: nn.Module, example: Tensor, dtype: torch.dtype) -> Callable[[Tensor], None]:
    """A callable that computes the network's convolutions and matrix products in eager mode, and nothing between them.

    This is the time of a network whose norms, activations and residual adds cost nothing. The operands are those of the
    example's forward pass, and the images given to the callable are ignored. A fused runtime with faster products can
    beat this limit, but not the device's peak.
    """
    cast = deepcopy(model).eval().to(dtype).to(memory_format=torch.channels_last)
    with _Recorder() as recorder:
        cast(example.clone().to(dtype, memory_format=torch.channels_last))
    calls = [(func, *tree_map_only(Tensor, Tensor.detach, rest)) for func, *rest in recorder.calls]

    def run(images: Tensor) -> None:
        for func, args, kwargs in calls:
            func(*args, **kwargs)

    return run


@torch.no_grad()
def product_peak(dtype: torch.dtype, device: torch.device) -> Callable[[], float]:
    """A callable that measures the device's peak in multiply-accumulates per second.

    On a CPU it times products with the processor's best instructions on operands that stay in the first-level cache. On
    a GPU, and where those instructions are not available, it times one large square product.
    """
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(dtype)
    if device.type == "cpu" and precision:
        try:
            products_in_cache(precision, 1, torch.get_num_threads())
        except UnavailableError:
            pass
        else:
            return lambda: _rate(partial(products_in_cache, precision, 100_000, torch.get_num_threads()))
    # Choice: 512 on a CPU, because without bf16 instructions a product of 1024 takes two seconds
    size, repeats = (8192, 10) if device.type == "cuda" else (512, 1)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def multiply() -> float:
        for _ in range(repeats):
            torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return repeats * size**3

    return lambda: _rate(multiply)


def _rate(compute: Callable[[], float]) -> float:
    began = time.perf_counter()
    done = compute()
    return done / (time.perf_counter() - began)
