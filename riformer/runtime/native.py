"""The native network as a module of PyTorch. `riformer_runtime.native` has the network itself, over arrays."""

from typing import Any

import torch
from torch import Tensor

from riformer.runtime.opaque import OpaqueNetwork
from riformer_runtime.native.network import Network
from riformer_runtime.native.weights import BlockWeights, ConvWeights, NetworkWeights


class NativeNetwork(OpaqueNetwork):
    """A network built in native memory, run by all threads that torch is allowed (`torch.set_num_threads`).

    Nothing changes from call to call, so several threads may call it at once. What cannot be done with it, such as
    tracing and gradients, can be done with `riformer.runtime.collapse.Collapsed`.

    Shape: images [N, C, H, W] on the CPU -> logits [N, K] in float32.

    Raises:
        UnavailableError: this machine cannot build or run it.
        MemoryError: the weights do not fit into memory.
    """

    backend = "native"

    def __init__(self, weights: NetworkWeights, instruction_set: str, products: str, *more_flags: str):
        super().__init__(weights, torch.bfloat16 if products == "bf16" else torch.float32, torch.device("cpu"))
        self.instruction_set, self.products = instruction_set, products
        self._network = Network(as_arrays(weights), instruction_set, products, *more_flags)

    def compute(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self._network(_array(images), torch.get_num_threads()))

    def extra_repr(self) -> str:
        return f"products={self.products!r}, instruction_set={self.instruction_set!r}"


def as_arrays(weights: NetworkWeights) -> NetworkWeights:
    """The same weights as float32 arrays in the computer's memory."""
    convs = [ConvWeights(_array(conv.weight), _array(conv.bias), *conv[2:]) for conv in weights.convs]
    stages = [tuple(BlockWeights(*map(_array, block)) for block in stage) for stage in weights.stages]
    return NetworkWeights(
        tuple(convs), tuple(stages), _array(weights.head_weight), _array(weights.head_bias), weights.eps
    )


def _array(tensor: Tensor) -> Any:
    return tensor.detach().to("cpu", torch.float32).resolve_neg().contiguous().numpy()
