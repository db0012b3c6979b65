"""A RIFormer made as fast as the machine allows: `riformer.optimize(model, example, precision="bf16")`.

Training form or deploy form goes in; what comes out computes the same in collapsed form (`runtime/collapse.py`), by the
kernels for the example's device, and has been compared with the model on the example.
"""

import logging
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache
from itertools import chain
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from riformer.model.metaformer import MetaFormer
from riformer.runtime.collapse import Collapsed, network_weights
from riformer.runtime.manifest import manifest_of
from riformer.runtime.native import NativeNetwork
from riformer.runtime.opaque import OpaqueNetwork
from riformer.runtime.parity import ParityReport, compare
from riformer_runtime.artifact import Manifest
from riformer_runtime.engines import describe
from riformer_runtime.native.library import UnavailableError, best_products

logger = logging.getLogger(__name__)

DTYPES = {
    **{"fp64": torch.float64, "fp32": torch.float32, "bf16x3": torch.float32},
    **{"bf16": torch.bfloat16, "fp16": torch.float16},
}
"""What PyTorch's products multiply in each precision; moments and coefficients are in float32 at least."""

TOLERANCE = {"fp64": 1e-10, "fp32": 1e-4, "bf16x3": 5e-4, "bf16": 0.1, "fp16": 0.1}
"""Largest difference from the model, relative to its largest logit, that `optimize` accepts."""

BACKENDS = {
    "native": ("fp32", "bf16x3", "bf16"),
    "triton": ("fp32", "bf16", "fp16"),
    "portable": tuple(DTYPES),
}
"""What can run the collapsed form, and the precisions of each; the fast ones first."""

DEVICES = {"native": ("cpu",), "triton": ("cuda",)}
"""The devices of each backend; the portable one runs on all."""


class Runtime(nn.Module):
    """What `optimize` returns: a network that is only run, by several threads at once if need be.

    It is a `riformer_runtime.Runner`, so that prediction, evaluation and serving take it: given an array it returns an
    array. It stays in the precision that it was made in. A native or triton one also stays on its device, gives no
    gradients and can be neither traced nor pickled (see `OpaqueNetwork`); a portable one is a module of plain PyTorch.

    A process that called a native runtime on several threads must not be forked: the child would hang at its first
    call, as it does with PyTorch's own operators. Start such processes with "spawn" or "forkserver".

    Attributes:
        network: the collapsed form on its backend.
        engine: the backend, "native", "triton" or "portable".
        precision: the one that products are computed in.
        requested_precision: the one asked for, which may be narrower.
        detail: the instruction set of the native backend, such as "avx512_bf16"; else "".
        parity: how far the example's logits are from the model's.
        pretrained_cfg: the model's, with its preprocessing and, where it has them, class names.
        num_classes: number of logits; 0 where the network returns pooled features.
        in_chans: channels of its images.

    Shape: images [N, C, H, W], any N, H and W -> logits [N, K] in float32 (in float64 for the precision fp64).
    """

    def __init__(
        self, network: nn.Module, backend: str, requested_precision: str, parity: ParityReport, model: MetaFormer
    ):
        super().__init__()
        self.network, self.engine, self.parity = network, backend, parity
        self.requested_precision = requested_precision
        self.precision = getattr(network, "products", requested_precision)
        self.detail = getattr(network, "instruction_set", "")
        self.pretrained_cfg = deepcopy(getattr(model, "pretrained_cfg", {}))
        self.num_classes, self.in_chans = model.num_classes, model.in_chans
        self.eval()

    def forward(self, images: Any) -> Any:
        """The logits, as a tensor of a tensor, as an array of an array."""
        if isinstance(images, np.ndarray):
            tensor = torch.from_numpy(np.ascontiguousarray(images)).to(self.device)
            return self.network(tensor).cpu().numpy()
        return self.network(images)

    @property
    def manifest(self) -> Manifest:
        """Class names, preprocessing and the like.

        Raises:
            ValueError: the model carries no preprocessing.
        """
        return replace(manifest_of(self), form="deploy")

    def train(self, mode: bool = True) -> Self:
        """Changes nothing: a runtime computes what the model computes in eval mode."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        """Where it takes images."""
        return self.network.device if isinstance(self.network, OpaqueNetwork) else next(self.buffers()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of images that loses nothing; others are converted."""
        return torch.float64 if self.precision == "fp64" else torch.float32

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What .to(), .half() and .cuda() call.

        Raises:
            RuntimeError: it would change the precision, or move a network that cannot be moved.
        """
        tensors = chain(self.parameters(), self.buffers())
        dtypes = {DTYPES[self.precision], *(tensor.dtype for tensor in tensors)}  # bf16 has its norms in float32
        if any(fn(torch.empty(0, dtype=dtype, device=self.device)).dtype != dtype for dtype in dtypes):
            raise RuntimeError(
                f"a runtime stays in its precision, {self.precision}: call riformer.optimize again with another one"
            )
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        asked = "" if self.precision == self.requested_precision else f", asked for={self.requested_precision!r}"
        return f"engine={describe(self)!r}{asked}"


@torch.no_grad()
def optimize(model: MetaFormer, example: Tensor, precision: str = "fp32", backend: str = "auto") -> Runtime:
    """The model as a callable that computes the same, as fast as the example's device allows.

    Choice: the result is at least as precise as asked for. A processor without bf16 products computes "bf16" in
    float32, and one without AMX "bf16x3" as well: there float32's own products are both faster and closer.

    Args:
        model: a RIFormer in training form or deploy form, on any device; it stays as it was.
        example: images of the kind and on the device that will be used: [N, C, H, W]. Other sizes can be given later.
        precision: "fp32"; "bf16"; "bf16x3", every value split into two bf16: nearly float32, by bf16's products;
            "fp16"; "fp64".
        backend: "native" (C++ on the CPU), "triton" (CUDA), "portable" (plain PyTorch, which torch.compile and
            torch.export take), or "auto": the first of them that this machine and the precision allow.

    Raises:
        ValueError: the model is no MetaFormer, or mixes tokens; the example is no batch of images for it; or no such
            precision, backend or combination exists.
        RuntimeError: the backend asked for cannot run here, or what it computes is not what the model does.
    """
    shape = tuple(example.shape) if isinstance(example, Tensor) else type(example).__name__
    channels = getattr(model, "in_chans", 3)
    if not isinstance(example, Tensor) or example.dim() != 4 or not example.numel() or example.shape[1] != channels:
        raise ValueError(f"example is {shape}; it must be a tensor of one or more images, [N, {channels}, H, W]")
    device = example.device.type
    for name, value, allowed in (("precision", precision, DTYPES), ("backend", backend, ("auto", *BACKENDS))):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; allowed are {', '.join(allowed)}")
    possible = [name for name in BACKENDS if precision in BACKENDS[name] and device in DEVICES.get(name, (device,))]
    if backend not in ("auto", *possible):
        raise ValueError(
            f"the backend {backend!r} has no {precision} on {device}; this is what {', '.join(possible)} have"
        )
    reference = deepcopy(model).eval().to(example.device, torch.float64 if precision == "fp64" else torch.float32)
    for name in possible if backend == "auto" else [backend]:
        try:
            network = _build(reference, name, precision)
            break
        except UnavailableError as error:
            if backend != "auto":
                raise
            _warn_once(f"{error}; running in plain PyTorch instead")
    parity = compare(lambda images: reference(images.to(next(reference.parameters()))), network, [example])
    if not parity.max_rel <= TOLERANCE[precision]:
        raise RuntimeError(
            f"{name} in {precision} is {parity.max_rel:.2g} of the largest logit away from the model, more than "
            f"{TOLERANCE[precision]:g}: the weights do not suit the precision, or this is a defect"
        )
    return Runtime(network, name, precision, parity, model)


def device_and_dtype(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a network or runtime takes images, and in which type."""
    if isinstance(model, Runtime):
        return model.device, model.dtype
    tensors = (tensor for tensor in chain(model.parameters(), model.buffers()) if tensor.is_floating_point())
    first = next(tensors, torch.empty(0))
    return first.device, first.dtype


def _build(model: MetaFormer, backend: str, precision: str) -> nn.Module:
    """The model on a backend.

    Raises:
        UnavailableError: this machine lacks what the backend needs.
    """
    if backend == "portable":
        return Collapsed(model, DTYPES[precision])
    if backend == "native":
        instruction_set, products = best_products(precision)
        if products != precision:
            _warn_once(f"{precision} is computed in {products}: this processor has {instruction_set}")
        return NativeNetwork(network_weights(model), instruction_set, products)
    try:
        from riformer.runtime.cuda import TritonNetwork
    except ImportError as error:
        raise UnavailableError(f"the backend triton is not installed ({error}): pip install triton") from error
    return TritonNetwork(network_weights(model), DTYPES[precision])


@cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)
