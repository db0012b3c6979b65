"""Data set name -> classes, and images in splits.

A folder is read once in full before training: files that cannot be read are named and refused, or left out on request
and listed; none is ever replaced by another. The classes are those of train. What was opened can be recorded and
opened again from the record, whatever was added meanwhile, and wherever the folder was moved.
"""

import difflib
import hashlib
import logging
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
from PIL import Image

from riformer.config import DataConfig
from riformer.data import builtin
from riformer.data.folders import Layout, Split, find_splits
from riformer.data.orders import natural_order
from riformer.data.scan import check_files
from riformer.data.splits import duplicates, hold_out
from riformer_runtime.images import read_image
from riformer_runtime.walk import describe

logger = logging.getLogger(__name__)

DATASETS = {
    "digits": "1,797 handwritten digits of 8 x 8 pixels, built in",
    "fashion-mnist": "70,000 grey images of clothes, 28 x 28 pixels, from the system or downloaded",
    "cifar10": "60,000 photographs of 10 kinds of things, 32 x 32 pixels, downloaded",
    "cifar100": "60,000 photographs of 100 kinds of things, 32 x 32 pixels, downloaded",
    "glyphs": "letters and digits in hundreds of typefaces, 64 x 64 pixels, made by tools/glyphs.py",
    "folder:PATH": "any images: PATH/train/CLASS/ and PATH/val/CLASS/, or PATH/CLASS/, which is split here",
}

NUM_DIGITS = 16  # of an image's SHA-256 that are recorded


@dataclass(frozen=True, eq=False)
class ImageList:
    """One split: a name and a label for each image, and where the pixels are.

    Attributes:
        names: of the images; those of files are relative to `source`.
        labels: index of each image's class.
        source: a folder, or an array of bytes, [N, height, width] for grey images and [N, height, width, 3] for RGB.
        sha256: over names, labels and contents.
        contents: the first digits of each image's SHA-256, of the file or of the pixels in an array.
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

    Attributes:
        name: as in the recipe.
        classes: class names by label; those of a folder are in timm's natural order.
        splits: by name.
        skipped: a {"path", "reason"} for each image that cannot be read.
        left_out: files and folders that are no images of the data set: how many, by reason.
        folders: of a folder, the name of each split's folder; "" for class folders in the root itself.
        held_out: `val_fraction` and `split_seed` with which val was drawn from train; empty where it was not.
        warnings: what a user may not expect, a line for each.
    """

    name: str
    classes: tuple[str, ...]
    splits: dict[str, ImageList]
    skipped: list[dict[str, str]] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    folders: dict[str, str] = field(default_factory=dict)
    held_out: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """All of this as JSON types, the names and digests of images by split and class; see `open_dataset`."""
        splits = {}
        for split, images in self.splits.items():
            names: dict[str, list[str]] = {name: [] for name in self.classes}
            contents: dict[str, list[str]] = {name: [] for name in self.classes}
            for name, label, content in zip(images.names, images.labels, images.contents, strict=True):
                names[self.classes[label]].append(name)
                contents[self.classes[label]].append(content)
            joined = {name: " ".join(some) for name, some in contents.items()}
            splits[split] = {
                "num_images": len(images), "sha256": images.sha256, "images": names, "contents": joined
            }  # fmt: skip
        return {
            "name": self.name,
            "classes": list(self.classes),
            "folders": self.folders,
            "held_out": self.held_out,
            "splits": splits,
            "skipped": self.skipped,
            "left_out": self.left_out,
        }

    @cached_property
    def train_data(self) -> dict[str, Any]:
        """What a model trained on it carries as `pretrained_cfg["train_data"]`: digests, no path and no file name."""
        splits = {split: {"sha256": self.digest(split), "num_images": len(i)} for split, i in self.splits.items()}
        return {"name": public_name(self.name), "sha256": self.digest(*self.splits), "splits": splits, **self.held_out}

    def digest(self, *splits: str) -> str:
        """SHA-256 over classes and contents of the images in these splits, whatever their names, places and order."""
        lines = [
            f"{content} {self.classes[label]}\n"
            for split in splits
            for content, label in zip(self.splits[split].contents, self.splits[split].labels, strict=False)
        ]
        return hashlib.sha256("".join(sorted(lines)).encode("utf-8", "surrogateescape")).hexdigest()

    def describe(self) -> str:
        """Splits, classes and what was left out, in one line."""
        sizes = []
        for split, images in self.splits.items():
            folder = self.folders.get(split, "")
            sizes.append(f"{split}{f' (folder {folder})' if folder not in ('', split) else ''} {len(images):,}")
        order = " in natural order" if self.folders and list(self.classes) == natural_order(self.classes) else ""
        first = ", ".join(self.classes[:5]) + (", ..." if len(self.classes) > 5 else "")
        lines = [f"{self.name}: images in {', '.join(sizes)}", f"{len(self.classes)} classes{order}: {first}"]
        if self.held_out:
            fraction, seed = self.held_out["val_fraction"], self.held_out["split_seed"]
            lines.append(f"val is {fraction:.0%} of each class, held out with --data.split-seed {seed}")
        return "; ".join(lines + ([describe(self.left_out)] if self.left_out else []))

    def log(self) -> None:
        """Says what was opened, and warns of what a user may not expect."""
        logger.info("%s", self.describe())
        for line in self.warnings:
            logger.warning("%s: %s", self.name, line)


def open_dataset(config: DataConfig, record: dict[str, Any] | None = None, whole: bool = False) -> Dataset:
    """The data set that `config.name` names, or exactly the one in `record`.

    digits: 1,000 / 297 / 500 images in train / val / test. fashion-mnist: 55,000 / 5,000 / 10,000. cifar10, cifar100:
    45,834 / 4,166 / 10,000. glyphs: as its file says, by families of typefaces. These splits are fixed. folder:PATH is
    PATH/train and PATH/val and perhaps PATH/test, each with a folder for each class; or PATH with class folders, or
    PATH/train alone, of which `config.val_fraction` of each class is held out, drawn with `config.split_seed`. With
    `whole` nothing is held out of such a folder, and test is all of it, or PATH/test where there is one. See
    `riformer.data.folders` for names of splits that are understood.

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
        raise ValueError(f"data.name is {config.name!r}; allowed are {', '.join(DATASETS)}{hint}")
    if record is not None:
        _check_same(dataset, record)
    return dataset


def _check_same(dataset: Dataset, record: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: classes, names or contents differ from the record.
    """
    changed, different = [], []
    for split, before in record["splits"].items():
        images = dataset.splits.get(split)
        if images is None or images.sha256 != before["sha256"]:
            changed.append(split)
        if images is not None:
            known = contents_by_name(before)
            now = zip(images.names, images.contents, strict=True)
            different += [name for name, content in now if known and known.get(name) != content]
    if changed or list(dataset.classes) != record["classes"]:
        what = f"in {', '.join(changed)}" if changed else "its class names"
        example = f": {len(different):,} images, such as {different[0]}" if different else ""
        raise ValueError(
            f"{dataset.name} has changed since the run began ({what}{example}); restore it, or start a new run"
        )


def public_name(name: str) -> str:
    """The name of a data set; of a folder's path the last component, which reveals nothing of the machine."""
    if not name.startswith("folder:"):
        return name
    return f"folder:{PureWindowsPath(name.removeprefix('folder:')).name.strip('.') or 'unnamed'}"


def contents_by_name(split: dict[str, Any]) -> dict[str, str]:
    """The digest of each image of a recorded split; empty for a record of version 0.1, which has none."""
    contents = split.get("contents", {})
    return {
        name: content
        for group, names in split["images"].items()
        if group in contents
        for name, content in zip(names, contents[group].split(), strict=True)
    }


def _from_arrays(name: str, classes: tuple[str, ...], splits: dict[str, builtin.Arrays]) -> Dataset:
    lists = {}
    for split, (names, labels, pixels) in splits.items():
        contents = [hashlib.sha256(image.tobytes()).hexdigest() for image in pixels]
        lists[split] = _image_list(names, labels, pixels, contents)
    return Dataset(name, classes, lists)


def _folder(config: DataConfig, record: dict[str, Any] | None, whole: bool) -> Dataset:
    path = config.name.removeprefix("folder:")
    root = Path(path).expanduser()
    if not path or not os.path.isdir(root):  # Path.is_dir raises where it may not look
        moved = "; if it was moved: riformer train --resume RUN --data.name folder:PATH" if record else ""
        raise ValueError(f"data.name is {config.name!r}, but there is no folder {path!r}{moved}")
    layout = _recorded_layout(record) if record else find_splits(root)
    has_val = "val" in layout.images
    if record is None and has_val and config.val_fraction != DataConfig().val_fraction:
        raise ValueError(f"--data.val-fraction is {config.val_fraction}, but has no effect: {root} has a val folder")

    hashes, bad = check_files(root, [n for part in layout.images.values() for names in part.values() for n in names])
    if bad and (record is not None or config.on_bad == "error"):
        advice = "mend or remove them, or leave them out: --data.on-bad skip"
        if record is not None:
            advice = "if they were moved, riformer train --resume RUN --data.name folder:PATH; otherwise restore them"
        lines = [f"{name}: {reason}" for name, reason in bad.items()]
        lines[20:] = [f"... and {len(lines) - 20} more"] if len(lines) > 20 else []
        raise ValueError(
            f"{len(bad)} of {len(bad) + len(hashes)} images in {root} cannot be read; {advice}:\n  "
            + "\n  ".join(lines)
        )
    if bad:
        logger.warning("left out %d images in %s that cannot be read, such as %s", len(bad), root, next(iter(bad)))
    skipped = [{"path": name, "reason": reason} for name, reason in bad.items()]

    splits = _readable(root, layout.images, hashes)
    classes = tuple(splits["train"])
    held_out: dict[str, float] = record.get("held_out", {}) if record else {}
    if not has_val and whole:
        splits = splits if "test" in splits else {"test": splits["train"]}
    elif not has_val:
        splits["train"], splits["val"] = hold_out(splits["train"], config.val_fraction, config.split_seed, hashes)
        held_out = {"val_fraction": config.val_fraction, "split_seed": config.split_seed}
    lists = {split: _from_files(root, classes, part, hashes) for split, part in splits.items()}
    return Dataset(
        config.name, classes, lists, record["skipped"] if record else skipped, layout.left_out, layout.folders,
        held_out, [*layout.notes, *duplicates(splits, hashes)],
    )  # fmt: skip


def _recorded_layout(record: dict[str, Any]) -> Layout:
    images = {split: part["images"] for split, part in record["splits"].items()}
    return Layout(record.get("folders", {}), images, record.get("left_out", {}))


def _readable(root: Path, splits: dict[str, Split], hashes: dict[str, str]) -> dict[str, Split]:
    """The images that have a hash.

    Raises:
        ValueError: a class of train, or a whole split, has none.
    """
    kept = {split: {c: [n for n in names if n in hashes] for c, names in p.items()} for split, p in splits.items()}
    for split, part in kept.items():
        lost = [name for name, images in part.items() if not images]
        if lost and (split == "train" or len(lost) == len(part)):
            raise ValueError(f"none of the images in {split} of class {', '.join(lost)} in {root} can be read")
    return kept


def _from_files(root: Path, classes: tuple[str, ...], images: Split, hashes: dict[str, str]) -> ImageList:
    names = [path for name in classes for path in images.get(name, [])]
    labels = [label for label, name in enumerate(classes) for _ in images.get(name, [])]
    return _image_list(names, labels, root, [hashes[name] for name in names])


def _image_list(names: list[str], labels: list[int], source: Path | np.ndarray, hashes: list[str]) -> ImageList:
    digest = hashlib.sha256()
    for name, label, content in zip(names, labels, hashes, strict=True):
        digest.update(os.fsencode(f"{label} {content} {name}\n"))
    return ImageList(names, labels, source, digest.hexdigest(), [content[:NUM_DIGITS] for content in hashes])
