"""The weights of a RIFormer in collapsed form, as arrays, and the file that holds them.

`riformer.runtime.collapse` makes them from a model, and has the algebra. There the same types hold tensors.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FORMAT = 1  # of the file


class BlockWeights(NamedTuple):
    """A folded block. Shape: norms and fc2_bias [C], fc1_weight [H, C], fc1_bias [H], fc2_weight [C, H]."""

    norm1_weight: Any
    norm1_bias: Any
    norm2_weight: Any
    norm2_bias: Any
    fc1_weight: Any
    fc1_bias: Any
    fc2_weight: Any
    fc2_bias: Any


class ConvWeights(NamedTuple):
    """The stem, or the step between two stages. Shape: weight [C, C', k, k], bias [C]."""

    weight: Any
    bias: Any
    stride: int
    padding: int


class NetworkWeights(NamedTuple):
    """A folded network: a convolution before each stage, the stages' blocks, and head.norm merged into head.fc.

    Shape: head_weight [K, C], head_bias [K].
    """

    convs: tuple[ConvWeights, ...]
    stages: tuple[tuple[BlockWeights, ...], ...]
    head_weight: Any
    head_bias: Any
    eps: float

    @property
    def in_chans(self) -> int:
        """Channels of the images."""
        return self.convs[0].weight.shape[1]

    @property
    def geometry(self) -> tuple[tuple[int, int, int], ...]:
        """Kernel, stride and padding of each convolution."""
        return tuple((conv.weight.shape[-1], conv.stride, conv.padding) for conv in self.convs)


def check_size(geometry: tuple[tuple[int, int, int], ...], height: int, width: int) -> None:
    """Checks that images of this size leave a token.

    Raises:
        ValueError: they are too small.
    """
    sizes: tuple[int, ...] = height, width
    for kernel, stride, padding in geometry:
        sizes = tuple((size + 2 * padding - kernel) // stride + 1 for size in sizes)
    if min(sizes) < 1:
        raise ValueError(f"images of {height} x {width} pixels are too small for this network")


def check_weights(weights: NetworkWeights) -> None:
    """Checks that the arrays fit together, since the engine reads them by their sizes alone.

    Raises:
        ValueError: an array has another shape than its neighbours imply, or values that are no finite floats.
    """
    channels = weights.in_chans
    for i, (conv, blocks) in enumerate(zip(weights.convs, weights.stages, strict=True)):
        columns, kernel = conv.weight.shape[0], conv.weight.shape[-1]
        _check(f"convs.{i}", conv.weight, (columns, channels, kernel, kernel))
        _check(f"convs.{i}", conv.bias, (columns,))
        if not 0 < conv.stride < 2**15 or not 0 <= conv.padding < kernel:
            raise ValueError(f"convs.{i} has stride {conv.stride} and padding {conv.padding}")
        channels = columns
        for j, block in enumerate(blocks):
            (hidden,) = block.fc1_bias.shape
            norm = (channels,)
            shapes = (norm, norm, norm, norm, (hidden, channels), (hidden,), (channels, hidden), norm)
            for name, values, shape in zip(BlockWeights._fields, block, shapes, strict=True):
                _check(f"stages.{i}.{j}.{name}", values, shape)
    (num_outputs,) = weights.head_bias.shape
    _check("head_bias", weights.head_bias, (num_outputs,))
    _check("head_weight", weights.head_weight, (num_outputs, channels))
    if not 0 < weights.eps < 1:
        raise ValueError(f"eps is {weights.eps}")


def _check(name: str, values: Any, shape: tuple[int, ...]) -> None:
    if values.shape != shape or not values.size:
        raise ValueError(f"{name} has shape {list(values.shape)}, where {list(shape)} is needed")
    if values.dtype != np.float32 or not np.isfinite(values).all():
        raise ValueError(f"{name} holds values that are no finite floats")


def write_weights(weights: NetworkWeights, file: str | Path) -> None:
    """Writes the weights as an .npz file, all arrays in float32."""
    arrays: dict[str, Any] = {"format": FORMAT, "eps": weights.eps}
    for i, (conv, blocks) in enumerate(zip(weights.convs, weights.stages, strict=True)):
        arrays |= {f"convs.{i}.{name}": value for name, value in conv._asdict().items()}
        for j, block in enumerate(blocks):
            arrays |= {f"stages.{i}.{j}.{name}": value for name, value in block._asdict().items()}
    arrays |= {"head_weight": weights.head_weight, "head_bias": weights.head_bias}
    with open(file, "wb") as stream:
        np.savez(stream, **arrays)


def read_weights(file: str | Path) -> NetworkWeights:
    """The weights in a file of `write_weights`. Nothing in the file is executed.

    Raises:
        ValueError: the file is of a newer format, damaged, or holds something else.
    """
    try:
        with np.load(file, allow_pickle=False) as arrays:
            if int(arrays["format"]) > FORMAT:
                raise ValueError(f"format {arrays['format']} is newer than this version reads ({FORMAT})")
            names = arrays.files
            num_stages = sum(name.startswith("convs.") and name.endswith(".stride") for name in names)
            convs, stages = [], []
            for i in range(num_stages):
                weight, bias, stride, padding = (arrays[f"convs.{i}.{name}"] for name in ConvWeights._fields)
                convs.append(ConvWeights(weight, bias, int(stride), int(padding)))
                depth = sum(name.startswith(f"stages.{i}.") and name.endswith(".fc1_bias") for name in names)
                blocks = [[arrays[f"stages.{i}.{j}.{name}"] for name in BlockWeights._fields] for j in range(depth)]
                stages.append(tuple(BlockWeights(*block) for block in blocks))
            head = arrays["head_weight"], arrays["head_bias"]
            weights = NetworkWeights(tuple(convs), tuple(stages), *head, float(arrays["eps"]))
        check_weights(weights)
        return weights
    except Exception as error:  # of damaged files zipfile and NumPy raise nearly anything
        raise ValueError(f"{file} holds no weights of the native network: {error}") from error
