"""Small data sets as arrays: scikit-learn's digits (shipped here), Fashion-MNIST, CIFAR, and glyphs of typefaces.

Their splits are fixed: drawn by hashing, classes in proportion, the same on every machine and with every seed; those of
the glyphs stand in their file.
"""

import gzip
import os
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST

from riformer.data.splits import hash_ranks
from riformer.data.warp import warp
from riformer_runtime.caches import cache_folder

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
"""Names, labels and pixels (uint8, [N, height, width] or [N, height, width, 3]) of one split."""


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
    splits: dict[str, Arrays] = {}
    for part, files in (("train", FASHION_FILES[:2]), ("test", FASHION_FILES[2:])):
        pixels, labels = (_read_idx(folder / name) for name in files)
        if pixels.ndim != 3 or labels.shape != pixels.shape[:1] or labels.max(initial=0) >= len(FASHION_CLASSES):
            raise ValueError(f"{', '.join(files)} in {folder} are not fashion-mnist's images and labels")
        splits |= _with_val(part, labels, pixels)
    return splits


def cifar(name: str, root: str = "") -> tuple[tuple[str, ...], dict[str, Arrays]]:
    """The classes, and 45,834 / 4,166 / 10,000 photographs; val is a twelfth of the original train.

    Raises:
        ValueError: the files are not in `root`, or without one in the cache folder, and cannot be downloaded there; or
            they are damaged.
    """
    folder = Path(root).expanduser() if root else cache_folder()
    splits: dict[str, Arrays] = {}
    for part in ("train", "test"):
        try:
            found = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name](folder, part == "train", download=True)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"{name} is not in {folder} and cannot be downloaded ({error}): put its python version there, or name "
                f"its folder with --data.root"
            ) from error
        splits |= _with_val(part, np.array(found.targets), found.data)
    return tuple(found.classes), splits


def glyphs(root: str = "", img_size: int = 32) -> tuple[tuple[str, ...], dict[str, Arrays]]:
    """The classes and splits of glyphs.npz, in which typefaces of one family are in one split.

    Images of train are as in the file, to be warped (`augment.policy`); those of val and test are one fixed draw of
    that, of `img_size` pixels.

    Raises:
        ValueError: there is no such file in `root`, or without one in the cache folder, or it is damaged.
    """
    file = (Path(root).expanduser() if root else cache_folder()) / "glyphs.npz"
    try:
        with np.load(file) as arrays:
            image, label, family, split = (arrays[name] for name in ("image", "label", "family", "split"))
            classes, families = (tuple(arrays[name].tolist()) for name in ("classes", "families"))
    except FileNotFoundError as error:
        raise ValueError(
            f"there is no {file}: make it with tools/glyphs.py, or name its folder with --data.root"
        ) from error
    except (OSError, EOFError, ValueError, KeyError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} is not a whole file of glyphs: {error}") from error
    splits: dict[str, Arrays] = {}
    for number, name in enumerate(("train", "val", "test")):
        indices = np.flatnonzero(split == number)
        pixels = image[indices]
        if name != "train":
            parts = zip(torch.from_numpy(pixels).split(256), torch.from_numpy(indices).split(256), strict=True)
            drawn = [(255 * warp(part, keys, img_size)).round().byte() for part, keys in parts]
            pixels = torch.cat(drawn).numpy() if drawn else pixels[:, :img_size, :img_size]
        names = [f"{families[family[i]]}/{i:05d}" for i in indices]
        splits[name] = names, label[indices].tolist(), pixels
    return classes, splits


def _with_val(part: str, labels: np.ndarray, pixels: np.ndarray) -> dict[str, Arrays]:
    """A part of a data set; from train a twelfth goes to val."""
    names = [f"{part}/{index:05d}" for index in range(len(labels))]
    order = _proportional_order(names, labels.tolist())
    num_val = len(order) // 12 if part == "train" else 0
    found = {part: _take(names, labels, pixels, order[num_val:])}
    return found | ({"val": _take(names, labels, pixels, order[:num_val])} if num_val else {})


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
