"""Data set name -> classes, and images in splits.

A folder is read once in full before training: files that cannot be read are named and refused, or left out on request
and listed; none is ever replaced by another. The classes are those of train. What was opened can be recorded and
opened again from the record, whatever was added meanwhile.
"""

import difflib
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from riformer.config import DataConfig
from riformer.data import builtin
from riformer.data.folders import check_files, find_splits, hold_out
from riformer.images import read_image
from riformer.walk import describe

logger = logging.getLogger(__name__)

DATASETS = {
    "digits": "1,797 handwritten digits of 8 x 8 pixels, built in",
    "fashion-mnist": "70,000 grey images of clothes, 28 x 28 pixels, from the system or downloaded",
    "cifar10": "60,000 photographs of 10 kinds of things, 32 x 32 pixels, downloaded",
    "cifar100": "60,000 photographs of 100 kinds of things, 32 x 32 pixels, downloaded",
    "glyphs": "letters and digits in hundreds of typefaces, 64 x 64 pixels, made by tools/glyphs.py",
    "folder:PATH": "any images: PATH/train/CLASS/ and PATH/val/CLASS/, or PATH/CLASS/, which is split here",
}


@dataclass(frozen=True, eq=False)
class ImageList:
    """One split: a name and a label for each image, and where the pixels are.

    `source` is the folder that the names are relative to, or an array of bytes, [N, height, width] for grey images and
    [N, height, width, 3] for RGB. `sha256` is over names, labels and contents; `contents` has the start of each image's
    own SHA-256, for images in files.
    """

    names: list[str]
    labels: list[int]
    source: Path | np.ndarray
    sha256: str
    contents: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> Image.Image:
        """The image, RGB, in its own size."""
        if isinstance(self.source, Path):
            return read_image(self.source / self.names[index])
        return Image.fromarray(self.source[index]).convert("RGB")


@dataclass(frozen=True, eq=False)
class Dataset:
    """The classes, the splits ("train", "val" and mostly "test"), and what was left out.

    The classes of a folder are in timm's natural order: 1, 2, 10. `skipped` has a {"path", "reason"} for each image
    that cannot be read; `left_out` counts what is no image, by reason.
    """

    name: str
    classes: tuple[str, ...]
    splits: dict[str, ImageList]
    skipped: list[dict[str, str]] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)

    def origin(self, config: DataConfig) -> dict[str, Any]:
        """What a model carries about the data that it is trained on: digests by which they are known again."""
        drawn = {"val_fraction": config.val_fraction, "split_seed": config.split_seed}
        name = config.name if not config.name.startswith("folder:") else f"folder:{Path(config.name).name}"
        return {"name": name, "splits": {split: images.sha256 for split, images in self.splits.items()}, **drawn}

    def record(self) -> dict[str, Any]:
        """All of this as JSON types, with the names of the images in each split by class; see `open_dataset`."""
        splits = {}
        for split, images in self.splits.items():
            by_class: dict[str, list[str]] = {name: [] for name in self.classes}
            for name, label in zip(images.names, images.labels, strict=True):
                by_class[self.classes[label]].append(name)
            splits[split] = {"num_images": len(images), "sha256": images.sha256, "images": by_class}
            if images.contents:
                splits[split]["contents"] = images.contents
        return {
            "name": self.name,
            "classes": list(self.classes),
            "splits": splits,
            "skipped": self.skipped,
            "left_out": self.left_out,
        }


def open_dataset(config: DataConfig, record: dict[str, Any] | None = None, whole: bool = False) -> Dataset:
    """The data set that `config.name` names, or exactly the one in `record`.

    digits: 1,000 / 297 / 500 images in train / val / test. fashion-mnist: 55,000 / 5,000 / 10,000. cifar10, cifar100:
    45,834 / 4,166 / 10,000. glyphs: as its file says, by families of typefaces. These splits are fixed.

    folder:PATH is PATH/train and PATH/val (or the usual other names, in any case) and perhaps PATH/test, each with a
    folder for each class; or PATH with class folders, or PATH/train alone, of which `config.val_fraction` of each class
    is held out, drawn with `config.split_seed`, copies of one image on one side.

    Args:
        config: of the data.
        record: what `Dataset.record` returned, for exactly that split.
        whole: hold nothing out of a folder without val; test is then all of it, or PATH/test where there is one.

    Raises:
        ValueError: an unknown name; a folder that has not this form, or files in it that cannot be read; images that
            differ from the record. The message names them.
    """
    if config.name == "digits":
        dataset = _from_arrays("digits", builtin.DIGITS_CLASSES, builtin.digits())
    elif config.name == "fashion-mnist":
        dataset = _from_arrays("fashion-mnist", builtin.FASHION_CLASSES, builtin.fashion_mnist(config.root))
    elif config.name in ("cifar10", "cifar100"):
        dataset = _from_arrays(config.name, *builtin.cifar(config.name, config.root))
    elif config.name == "glyphs":
        dataset = _from_arrays(config.name, *builtin.glyphs(config.root, config.img_size))
    elif config.name.startswith("folder:"):
        dataset = _folder(config, record, whole)
    else:
        close = difflib.get_close_matches(config.name, DATASETS)
        close += [f"folder:{config.name}"] if os.path.isdir(config.name) else []
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"--data.name is {config.name!r}; allowed are {', '.join(DATASETS)}{hint}")
    if record is not None:
        _check_same(dataset.record(), record)
    _say_once(_summary(dataset))
    return dataset


def _summary(dataset: Dataset) -> str:
    """Splits, classes and what was left out, in a line."""
    sizes = ", ".join(f"{len(images):,} {split}" for split, images in dataset.splits.items())
    shown = ", ".join(dataset.classes[:5]) + (", ..." if len(dataset.classes) > 5 else "")
    text = f"{dataset.name}: {sizes} images of {len(dataset.classes):,} classes ({shown})"
    return text + (f"; left out: {describe(Counter(dataset.left_out))}" if dataset.left_out else "")


@cache
def _say_once(text: str) -> None:
    logger.info("%s", text)


def _check_same(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Compares two records of a data set, wherever it lies.

    Raises:
        ValueError: they differ in classes, images or splits.
    """
    digests = [{split: part["sha256"] for split, part in record["splits"].items()} for record in (now, before)]
    changed = sorted(split for split in digests[0] | digests[1] if digests[0].get(split) != digests[1].get(split))
    if now["classes"] != before["classes"] or changed:
        what = f"in {', '.join(changed)}" if changed else "its class names"
        raise ValueError(f"{now['name']} has changed since the run began ({what}); restore it, or start a new run")


def _from_arrays(name: str, classes: tuple[str, ...], splits: dict[str, builtin.Arrays]) -> Dataset:
    lists = {}
    for split, (names, labels, pixels) in splits.items():
        contents = (hashlib.sha256(image.tobytes()).hexdigest() for image in pixels)
        lists[split] = ImageList(names, labels, pixels, _digest(names, labels, contents))
    return Dataset(name, classes, lists)


def _folder(config: DataConfig, record: dict[str, Any] | None, whole: bool) -> Dataset:
    path = config.name.removeprefix("folder:")
    root = Path(path).expanduser()
    if not path or not os.path.isdir(root):  # Path.is_dir raises where it may not look
        raise ValueError(f"--data.name is {config.name!r}, but there is no folder {path!r}")
    if record is None:
        found, counts = find_splits(root)
        left_out = dict(counts)
    else:
        found = {split: part["images"] for split, part in record["splits"].items()}
        left_out = record.get("left_out", {})

    if record is None and "val" in found and config.val_fraction != DataConfig().val_fraction:
        raise ValueError(f"--data.val-fraction is {config.val_fraction}, but has no effect: {root} has a val folder")
    hashes, bad = check_files(root, [name for part in found.values() for names in part.values() for name in names])
    if bad and (record is not None or config.on_bad == "error"):
        advice = "restore them" if record is not None else "mend or remove them, or leave them out: --data.on-bad skip"
        lines = [f"{name}: {reason}" for name, reason in bad.items()]
        lines[20:] = [f"... and {len(lines) - 20} more"] if len(lines) > 20 else []
        raise ValueError(
            f"{len(bad)} of {len(bad) + len(hashes)} images in {root} cannot be read; {advice}:\n  "
            + "\n  ".join(lines)
        )
    if bad:
        logger.warning("left out %d images in %s that cannot be read, such as %s", len(bad), root, next(iter(bad)))
    skipped = [{"path": name, "reason": reason} for name, reason in bad.items()]

    kept = {split: {c: [n for n in names if n in hashes] for c, names in part.items()} for split, part in found.items()}
    for split, part in kept.items():
        lost = [name for name, images in part.items() if not images]
        if lost and (split == "train" or len(lost) == len(part)):
            raise ValueError(f"none of the images in {split} of class {', '.join(lost)} in {root} can be read")
    if "val" not in kept and whole:
        kept = {"test": kept["train"], **kept}
    elif "val" not in kept:
        kept["train"], kept["val"] = hold_out(kept["train"], config.val_fraction, config.split_seed, hashes)
    splits = {split: _from_files(root, list(kept["train"]), part, hashes) for split, part in kept.items()}
    for problem in _copies(splits):
        logger.warning("%s: %s", config.name, problem)
    return Dataset(config.name, tuple(kept["train"]), splits, record["skipped"] if record else skipped, left_out)


def _copies(splits: dict[str, ImageList]) -> list[str]:
    """What images of equal content spoil: in several splits, or in several classes."""
    places: dict[str, list[tuple[str, int, str]]] = {}
    for split, images in splits.items():
        for content, label, name in zip(images.contents, images.labels, images.names, strict=True):
            places.setdefault(content, []).append((split, label, name))
    copies = [found for found in places.values() if len(found) > 1]
    problems = []
    for what, part in (("several splits", 0), ("several classes", 1)):
        if spread := [found for found in copies if len({place[part] for place in found}) > 1]:
            example = ", ".join(name for _, _, name in spread[0][:3])
            problems.append(f"{len(spread):,} images are in {what} at once, such as {example}")
    return problems


def _from_files(root: Path, classes: list[str], images: dict[str, list[str]], hashes: dict[str, str]) -> ImageList:
    names = [path for name in classes for path in images.get(name, [])]
    labels = [label for label, name in enumerate(classes) for _ in images.get(name, [])]
    contents = [hashes[name][:16] for name in names]
    return ImageList(names, labels, root, _digest(names, labels, (hashes[name] for name in names)), contents)


def _digest(names: Iterable[str], labels: Iterable[int], contents: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for name, label, content in zip(names, labels, contents, strict=True):
        digest.update(os.fsencode(f"{label} {content} {name}\n"))
    return digest.hexdigest()
