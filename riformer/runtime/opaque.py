"""Networks that compute outside of PyTorch's operators, and what PyTorch's tools may do with them.

A tool that records or differentiates operators (a tracer, an exporter, torch.func, autograd) sees none of theirs, and
would go on with a result that is wrong. Such calls raise, and say what to use instead.
"""

from collections.abc import Callable
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from riformer_runtime.native.weights import NetworkWeights, check_size

INSTEAD = "use riformer.fuse(model), or riformer.optimize(model, example, backend='portable')"


class OpaqueNetwork(nn.Module):
    """A network whose computation PyTorch cannot see, and which does not change once it is built.

    A copy, shallow or deep, is the network itself. It cannot be pickled, moved or cast, and has no state dict; in
    training mode it computes the same. torch.compile leaves it as it is and compiles what is around it.

    A subclass has `backend`, its name in messages, and `compute`.

    Args:
        weights: of the network.
        dtype: of its products.
        device: where it runs.

    Shape: images [N, C, H, W] -> logits [N, K].
    """

    backend = ""

    def __init__(self, weights: NetworkWeights, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.dtype, self.device = dtype, device
        self.in_chans, self.num_outputs = weights.in_chans, len(weights.head_bias)
        self._geometry = weights.geometry

    def compute(self, images: Tensor) -> Tensor:
        """The logits of images that fit the network, a plain tensor without gradients."""
        raise NotImplementedError

    @torch.compiler.disable(reason=f"native and triton networks run outside of PyTorch: {INSTEAD}")
    def forward(self, images: Tensor) -> Tensor:
        """The logits.

        Raises:
            RuntimeError: a tool records or differentiates this call.
            TypeError: the images are no tensor.
            ValueError: they are complex, sparse or quantised, on another device, or not of the network's shape.
        """
        if tool := _observer(images):
            raise RuntimeError(f"{tool} cannot see what the {self.backend} network computes: {INSTEAD}")
        if not isinstance(images, Tensor):
            raise TypeError(f"images are a {type(images).__name__}; they must be a torch.Tensor")
        if images.is_complex() or images.is_quantized or images.layout != torch.strided:
            raise ValueError(f"images are {images.dtype} and {images.layout}; they must be real and dense")
        if images.ndim != 4 or images.shape[1] != self.in_chans or images.device != self.device:
            raise ValueError(
                f"images are {list(images.shape)} on {images.device}; the {self.backend} network takes "
                f"[N, {self.in_chans}, H, W] on {self.device}"
            )
        check_size(self._geometry, *images.shape[2:])
        return self.compute(images.detach().as_subclass(Tensor))

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What .to(), .half() and .cuda() call: what changes nothing is allowed."""
        before = torch.empty(0, dtype=self.dtype, device=self.device)
        after = fn(before)
        if (after.dtype, after.device) != (before.dtype, before.device):
            raise RuntimeError(
                f"the {self.backend} network computes in {self.dtype} on {self.device} and can be neither cast nor "
                f"moved: call riformer.optimize again, with the precision wanted and an example on the device wanted"
            )
        return self

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict) -> Self:
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            f"the {self.backend} network cannot be pickled: save the model with riformer.save, and call "
            "riformer.optimize where it is loaded"
        )

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(
            f"torch.jit.script cannot see what the {self.backend} network computes: use riformer.fuse(model)"
        )

    def state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(
            f"the {self.backend} network has no state dict: save the model with riformer.save; to export, {INSTEAD}"
        )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(
            f"the weights of the {self.backend} network cannot be changed: load them into the model, and call "
            "riformer.optimize again"
        )


def _observer(images: Any) -> str:
    """What records or differentiates a call with these images; "" where nothing does."""
    if isinstance(images, torch.fx.Proxy):
        return "torch.fx"
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    if not isinstance(images, Tensor):
        return ""
    if torch._C._functorch.is_functorch_wrapped_tensor(images) or torch._is_functional_tensor(images):
        return "torch.func"
    if type(images).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"a tool that passes a {type(images).__name__}"
    if modes := _get_current_dispatch_mode_stack():
        return type(modes[-1]).__name__
    if torch.is_grad_enabled() and images.requires_grad:
        return "autograd (the images require gradients; call it under torch.no_grad() if you need none)"
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(images).tangent is not None:
        return "forward-mode autograd"
    return ""
