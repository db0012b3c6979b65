"""Small data sets that need no preparation, as arrays: scikit-learn's digits (shipped here) and Fashion-MNIST.

Their splits are fixed: drawn by hashing, classes in proportion, the same on every machine and with every seed.
"""

import gzip
import os
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from torchvision.datasets import FashionMNIST

from riformer.train.folders import cache_folder, hash_ranks

DIGITS_CLASSES = tuple("0123456789")
FASHION_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
FASHION_SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
FASHION_FILES = (
    *("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    *("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
)

Arrays = tuple[list[str], list[int], np.ndarray]
"""Names, labels and pixels (uint8, [N, height, width]) of one split."""


def digits() -> dict[str, Arrays]:
    """1,000 / 297 / 500 scans of handwritten digits, 8 x 8 pixels, whose 0..16 become 0..255."""
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        pixels, labels = np.rint(file["images"] * (255 / 16)).astype(np.uint8), file["labels"]
    names = [f"{index:04d}" for index in range(len(labels))]
    order = _proportional_order(names, labels.tolist())
    parts = {"train": order[797:], "val": order[500:797], "test": order[:500]}
    return {split: _take(names, labels, pixels, indices) for split, indices in parts.items()}


def fashion_mnist(root: str = "") -> dict[str, Arrays]:
    """55,000 / 5,000 / 10,000 grey images of clothes, 28 x 28 pixels; val is a twelfth of the original train.

    Raises:
        ValueError: the files are not in `root`, or without one in the system's or the cache folder, and cannot be
            downloaded there; or they are damaged.
    """
    folder = _fashion_folder(Path(root).expanduser() if root else None)
    splits = {}
    for part, files in (("train", FASHION_FILES[:2]), ("test", FASHION_FILES[2:])):
        pixels, labels = (_read_idx(folder / name) for name in files)
        if pixels.ndim != 3 or labels.shape != pixels.shape[:1] or labels.max(initial=0) >= len(FASHION_CLASSES):
            raise ValueError(f"{', '.join(files)} in {folder} are not fashion-mnist's images and labels")
        names = [f"{part}/{index:05d}" for index in range(len(labels))]
        order = _proportional_order(names, labels.tolist())
        num_val = len(order) // 12 if part == "train" else 0
        splits[part] = _take(names, labels, pixels, order[num_val:])
        if part == "train":
            splits["val"] = _take(names, labels, pixels, order[:num_val])
    return splits


def _fashion_folder(root: Path | None) -> Path:
    """The folder with the four files, which are downloaded where there are none."""
    places = [root] if root else [FASHION_SYSTEM_FOLDER, cache_folder()]
    folders = [folder for place in places for folder in (place, place / "FashionMNIST" / "raw")]
    for folder in folders:
        if all(os.path.isfile(folder / name) for name in FASHION_FILES):
            return folder
    try:
        FashionMNIST(places[-1], download=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"fashion-mnist is not in {' or '.join(map(str, places))} and cannot be downloaded ({error}): install the "
            f"Debian package dataset-fashion-mnist, or put {', '.join(FASHION_FILES)} into a folder and name it with "
            f"--data.root"
        ) from error
    return folders[-1]


def _read_idx(path: Path) -> np.ndarray:
    """The array of bytes in a gzipped IDX file."""
    try:
        content = gzip.decompress(path.read_bytes())
        num_dims = content[3]
        shape = np.frombuffer(content, ">u4", count=num_dims, offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * num_dims).reshape(shape)
    except (OSError, EOFError, zlib.error, ValueError, IndexError) as error:
        raise ValueError(f"{path} is not a whole gzipped IDX file: {error}") from error


def _proportional_order(names: list[str], labels: list[int]) -> list[int]:
    """All indices in a fixed drawn order of which every stretch holds the classes in proportion."""
    ranks, counts = hash_ranks(names, labels), Counter(labels)
    return sorted(range(len(names)), key=lambda i: ((ranks[i] + 0.5) / counts[labels[i]], labels[i]))


def _take(names: list[str], labels: np.ndarray, pixels: np.ndarray, indices: list[int]) -> Arrays:
    indices = sorted(indices)
    return [names[i] for i in indices], labels[indices].tolist(), pixels[indices]
