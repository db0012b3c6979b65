"""Deterministic checkpoints and inputs behind the golden files in this folder; README.md says what those hold.

`checkpoint(spec)` builds, from a list of (key, shape) pairs, a state dict of float64 NumPy arrays, each a pure
function of its key and shape, so that no weights need to be stored. `image(shape)` builds the input the same way.
"""

import zlib
from collections.abc import Mapping

import numpy as np


def _normal(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float64 array that depends only on `name` and `shape`."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)


def tensor(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of one checkpoint entry."""
    noise = _normal(key, shape)
    if "layer_scale" in key or key.endswith("gamma"):
        return 0.3 + 0.1 * noise
    if key.endswith("affine.weight") or (len(shape) == 1 and key.endswith("weight")):
        return 1.0 + 0.2 * noise
    if key.endswith("bias"):
        return 0.1 * noise
    if key.endswith("complex_weight"):
        return noise
    if key == "pos_embed":
        return 0.1 * noise
    fan_in = int(np.prod(shape[1:]))
    return noise / np.sqrt(fan_in)


def checkpoint(spec: list[tuple[str, tuple[int, ...]]]) -> dict[str, np.ndarray]:
    """State dict in mmpretrain's key layout."""
    return {key: tensor(key, shape) for key, shape in spec}


def image(shape: tuple[int, ...]) -> np.ndarray:
    """NCHW float64 input."""
    return _normal("image", shape)


def spec_of(golden: Mapping[str, np.ndarray]) -> list[tuple[str, tuple[int, ...]]]:
    """(key, shape) pairs stored in a golden file opened with np.load."""
    return [
        (str(key), tuple(int(n) for n in str(shape).split(",")))
        for key, shape in zip(golden["keys"], golden["shapes"], strict=True)
    ]
