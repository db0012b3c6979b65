"""The native network over arrays: built in native memory, run by as many threads as a call gives it."""

import ctypes
import weakref
from typing import Any

import numpy as np

from riformer_runtime.native.library import UnavailableError, best_products, build
from riformer_runtime.native.weights import NetworkWeights


class Network:
    """A RIFormer in collapsed form, in native memory.

    Nothing changes from call to call, so several threads may call it at once.

    Attributes:
        instruction_set: of the library that runs it, such as "avx512".
        products: the precision that it multiplies in.

    Raises:
        UnavailableError: this machine cannot build or run it.
        MemoryError: the weights do not fit into memory.
    """

    def __init__(self, weights: NetworkWeights, instruction_set: str, products: str, *more_flags: str):
        self.instruction_set, self.products = instruction_set, products
        self.in_chans, self.num_outputs = weights.in_chans, len(weights.head_bias)
        self._library = library = build(instruction_set, *more_flags)
        self._network = library.riformer_new(products.encode())
        if not self._network:
            raise UnavailableError(f"the system grants no {products} products of {instruction_set}")
        weakref.finalize(self, library.riformer_delete, self._network)
        for conv, blocks in zip(weights.convs, weights.stages, strict=True):
            weight, bias = _floats(conv.weight, conv.bias)
            columns, in_chans, kernel, _ = weight.shape
            sizes = (columns, in_chans, kernel, conv.stride, conv.padding)
            check(library.riformer_add_conv(self._network, *_pointers(weight, bias), *sizes))
            for block in blocks:
                arrays = _floats(*block)
                pointers = (ctypes.c_void_p * len(arrays))(*_pointers(*arrays))
                check(library.riformer_add_block(self._network, pointers, len(block.fc1_bias)))
        weight, bias = _floats(weights.head_weight, weights.head_bias)
        check(library.riformer_set_head(self._network, *_pointers(weight, bias), self.num_outputs, weights.eps))

    def __call__(self, images: np.ndarray, threads: int) -> np.ndarray:
        """The logits.

        Shape: images [N, C, H, W], any N, H and W that leave a token -> [N, K] in float32.

        Raises:
            ValueError: images of another number of channels.
            MemoryError: no memory for this many images of this size.
        """
        num, channels, height, width = images.shape
        if channels != self.in_chans:
            raise ValueError(f"images have {channels} channels, but the weights are for {self.in_chans}")
        (pixels,) = _floats(images)
        logits = np.empty((num, self.num_outputs), np.float32)
        if num:
            arguments = (*_pointers(pixels, logits), num, height, width, threads)
            check(
                self._library.riformer_forward(self._network, *arguments), f"{num} images of {height} x {width} pixels"
            )
        return logits


def products_in_cache(precision: str, repeats: int, threads: int) -> float:
    """Computes products whose operands stay in the first-level cache, on all threads; returns the number of MACs.

    Divided by the time it takes, this is the processor's peak, which no network exceeds.

    Raises:
        UnavailableError: this machine has no products of that precision.
    """
    instruction_set, products = best_products(precision)
    if products != precision:
        raise UnavailableError(f"{instruction_set} has no products in {precision}")
    library = build(instruction_set)
    network = library.riformer_new(products.encode())
    if not network:
        raise UnavailableError(f"the system grants no {products} products of {instruction_set}")
    try:
        products_done = library.riformer_multiply_in_cache(network, threads, repeats)
        check(products_done < 0)
        return products_done
    finally:
        library.riformer_delete(network)


def _floats(*arrays: Any) -> list[np.ndarray]:
    """The arrays as C reads them: float32, in memory as they are indexed."""
    return [np.ascontiguousarray(array, np.float32) for array in arrays]


def _pointers(*arrays: np.ndarray) -> list[int]:
    return [array.ctypes.data for array in arrays]


def check(status: int, what: str = "the native network") -> None:
    """Raises MemoryError where a function of the library returns that there is no memory."""
    if status:
        raise MemoryError(f"no memory for {what}")
