"""A RIFormer made as fast as the machine allows: `riformer.optimize(model, example, precision="bf16")`.

Training form or deploy form goes in; what comes out computes the same in collapsed form (`runtime/collapse.py`), by the
kernels that fit the example's device, and has been checked on the example.
"""

import logging
from copy import deepcopy
from functools import cache

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
    """What `optimize` returns: a callable without state, which several threads may call at once.

    Attributes:
        network: the collapsed form on its backend.
        backend: "native", "triton" or "portable".
        precision: the one asked for.
        parity: how far the example's logits are from the model's.

    Shape: images [N, C, H, W], any N, H and W -> logits [N, K] in float32 (in float64 for the precision fp64).
    """

    def __init__(self, network: nn.Module, backend: str, precision: str, parity: ParityReport):
        super().__init__()
        self.network, self.backend, self.precision, self.parity = network, backend, precision, parity
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}, precision={self.precision!r}"


@torch.no_grad()
def optimize(model: MetaFormer, example: Tensor, precision: str = "fp32", backend: str = "auto") -> Runtime:
    """The model as a callable that computes the same, as fast as the example's device allows.

    Choice: a precision is a floor. A processor without bf16 products computes "bf16" in float32, and one without AMX
    "bf16x3" as well: there float32's own products are both faster and closer.

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
    return Runtime(network, name, precision, parity)


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
