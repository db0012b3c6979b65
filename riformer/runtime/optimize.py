"""A RIFormer made as fast as the machine allows: `riformer.optimize(model, example, precision="bf16")`.

Training form or deploy form goes in; what comes out computes the same in collapsed form (`runtime/collapse.py`), by the
kernels that fit the example's device, and has been checked on the example.
"""

import logging
from copy import deepcopy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from riformer.model.metaformer import MetaFormer
from riformer.runtime.collapse import Collapsed, network_weights
from riformer.runtime.native import NativeNetwork, UnavailableError, choose
from riformer.runtime.parity import ParityReport, compare

logger = logging.getLogger(__name__)

DTYPES = {
    **{"fp64": torch.float64, "fp32": torch.float32, "bf16x3": torch.float32},
    **{"bf16": torch.bfloat16, "fp16": torch.float16},
}
"""What PyTorch's products take in each precision; moments and coefficients are in float32 at least."""

TOLERANCE = {"fp64": 1e-10, "fp32": 1e-4, "bf16x3": 5e-4, "bf16": 0.1, "fp16": 0.1}
"""Largest difference from the model, relative to its largest logit, with which a runtime is handed out."""

BACKENDS = {
    "native": ("fp32", "bf16x3", "bf16"),
    "triton": ("fp32", "bf16", "fp16"),
    "portable": tuple(DTYPES),
}
"""What can run the collapsed form, and in which precisions; the fast ones first."""

DEVICES = {"native": ("cpu",), "triton": ("cuda",)}
"""Where a backend runs; the portable one runs everywhere."""


class Runtime(nn.Module):
    """What `optimize` returns: a model for inference, without state, which several threads may call at once.

    It carries the class names and the preprocessing of its model, so that `predict` and `evaluate` take it as they take
    the model. Native and Triton runtimes compute outside of PyTorch: they have no gradients, and cannot be traced,
    exported, moved or saved, and say so. A child that is forked after a native runtime has run on several threads hangs
    if it calls it, as it would with PyTorch's own operations.

    Attributes:
        network: the collapsed form on its backend.
        backend: "native", "triton" or "portable".
        precision: the precision that is computed in.
        requested_precision: the one asked for; what is computed is at least as close.
        parity: how far the example's logits are from the model's.
        pretrained_cfg: preprocessing and class names, as timm's models have them.
        device: where images must be.
        dtype: type of the images.

    Shape: images [N, C, H, W], any N, H and W -> logits [N, K] in float32 (in float64 for the precision fp64).
    """

    def __init__(
        self, network: nn.Module, backend: str, requested_precision: str, parity: ParityReport, model: MetaFormer,
        device: torch.device,
    ):  # fmt: skip
        super().__init__()
        self.network, self.backend, self.parity, self.device = network, backend, parity, device
        self.requested_precision = requested_precision
        self.precision = getattr(network, "products", requested_precision)
        self.dtype = torch.float64 if requested_precision == "fp64" else torch.float32
        self.pretrained_cfg: Any = dict(getattr(model, "pretrained_cfg", {}))
        self.num_classes = model.num_classes
        super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        if self.backend != "portable":
            _refuse_tracing(images, self.backend)
            return _call(self.network, images)
        return self.network(images)

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}, precision={self.precision!r}, requested={self.requested_precision!r}"

    def train(self, mode: bool = True) -> "Runtime":
        """Stays in eval mode, which is all that it has."""
        return self

    def _outside(self, what: str) -> None:
        """Refuses what needs the weights in PyTorch.

        Raises:
            RuntimeError: it is a native or a Triton runtime.
        """
        if self.backend != "portable":
            raise RuntimeError(
                f"a {self.backend} runtime cannot be {what}: it was built for this process, device and precision. Save "
                f"the model with riformer.save and call riformer.optimize again"
            )

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._outside("moved or cast")
        return super()._apply(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._outside("asked for a state dict")
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._outside("given a state dict")
        return super().load_state_dict(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        self._outside("pickled")
        return super().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict) -> "Runtime":
        """A copy that shares the network, in which nothing ever changes; of a portable runtime, a full copy."""
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__dict__ = dict(self.__dict__) if self.backend != "portable" else deepcopy(self.__dict__, memo)
        return copied

    def __prepare_scriptable__(self) -> "Runtime":
        self._outside("scripted")
        return self


@torch.compiler.disable
def _call(network: nn.Module, images: Tensor) -> Tensor:
    """The network outside of what torch.compile traces."""
    return network(images)


def _refuse_tracing(images: Tensor, backend: str) -> None:
    """Refuses what would record or differentiate a network that PyTorch does not see.

    Raises:
        RuntimeError: `images` is not a plain tensor with values, a graph is being recorded, or a gradient is wanted.
    """
    recorded = torch.jit.is_tracing() or torch.compiler.is_exporting() or type(images) not in (Tensor, nn.Parameter)
    recorded = recorded or images.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(images)
    if recorded or torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
        raise RuntimeError(
            f"a {backend} runtime computes outside of PyTorch and cannot be traced, exported or transformed: give the "
            f'deploy form, riformer.fuse(model), or riformer.optimize(..., backend="portable")'
        )
    if images.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"a {backend} runtime has no gradients: call it under torch.inference_mode(), or take riformer.fuse(model)"
        )


def placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and type of the images that a model takes."""
    if isinstance(model, Runtime):
        return model.device, model.dtype
    parameter = next(model.parameters())
    return parameter.device, parameter.dtype


@torch.no_grad()
def optimize(model: MetaFormer, example: Tensor, precision: str = "fp32", backend: str = "auto") -> Runtime:
    """The model as a callable that computes the same, as fast as the example's device allows.

    Choice: you get at least the precision that you ask for. A processor without bf16 products computes "bf16" in
    float32, and one without AMX "bf16x3" as well: there float32's own products are both faster and closer.

    Args:
        model: a RIFormer in training form or deploy form, on any device; it stays as it was.
        example: images as they will come, on the device on which they will: [N, C, H, W]. Others fit as well.
        precision: "fp32"; "bf16"; "bf16x3", every value split into two bf16: nearly float32, by bf16's products;
            "fp16"; "fp64".
        backend: "native" (C++ on the CPU), "triton" (CUDA), "portable" (plain PyTorch, which torch.compile and
            torch.export take), or "auto": the first of them that this machine and the precision allow.

    Raises:
        ValueError: the model mixes tokens; or no such precision, backend or combination exists.
        RuntimeError: the backend asked for cannot run here, or what it computes is not what the model does.
    """
    device = example.device.type
    for name, value, known in (("precision", precision, DTYPES), ("backend", backend, ("auto", *BACKENDS))):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; allowed are {', '.join(known)}")
    fitting = [name for name in BACKENDS if precision in BACKENDS[name] and device in DEVICES.get(name, (device,))]
    if backend not in ("auto", *fitting):
        raise ValueError(
            f"the backend {backend!r} has no {precision} on {device}; this is what {', '.join(fitting)} have"
        )
    reference = deepcopy(model).eval().to(example.device, torch.float64 if precision == "fp64" else torch.float32)
    for name in fitting if backend == "auto" else [backend]:
        try:
            network = _build(reference, name, precision)
            break
        except UnavailableError as error:
            if backend != "auto":
                raise
            _say_once(f"{error}; running in plain PyTorch instead")
    parity = compare(lambda images: reference(images.to(next(reference.parameters()))), network, [example])
    if not parity.max_rel <= TOLERANCE[precision]:
        raise RuntimeError(
            f"{name} in {precision} is {parity.max_rel:.2g} of the largest logit away from the model, more than "
            f"{TOLERANCE[precision]:g}: the weights do not suit the precision, or this is a defect"
        )
    return Runtime(network, name, precision, parity, model, example.device)


def _build(model: MetaFormer, backend: str, precision: str) -> nn.Module:
    """The model on a backend.

    Raises:
        UnavailableError: this machine lacks what the backend needs.
    """
    if backend == "portable":
        return Collapsed(model, DTYPES[precision])
    if backend == "native":
        instruction_set, products = choose(precision)
        if products != precision:
            _say_once(f"{precision} is computed in {products}: this processor has {instruction_set}")
        return NativeNetwork(network_weights(model), instruction_set, products)
    try:
        from riformer.runtime.cuda import TritonNetwork
    except ImportError as error:
        raise UnavailableError(f"the backend triton is not installed ({error}): pip install triton") from error
    return TritonNetwork(network_weights(model), DTYPES[precision])


@cache
def _say_once(message: str) -> None:
    logger.warning(message)
