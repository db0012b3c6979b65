"""A folder of class folders -> image files by split and class, each opened and decoded once before training.

Layout: PATH/train, PATH/val and perhaps PATH/test, each with a folder for each class; or PATH/train alone, or PATH with
the class folders themselves. Images lie in a class folder at any depth. Splits may have the usual other names, in any
case. Class names are in Unicode's composed form (NFC), in which names that look the same are the same.
"""

import hashlib
import json
import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import PIL

from riformer.atomic import write_text
from riformer.caches import cache_folder
from riformer.data.orders import natural_order
from riformer.images import read_image
from riformer.version import __version__
from riformer.walk import describe, folders_in, images_directly_in, images_in

logger = logging.getLogger(__name__)

CHUNK = 500  # images checked between two lines of progress

SPLITS = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "dev", "eval"),
    "test": ("test", "testing", "tst"),
}
"""Names of folders, in lower case, that hold a split."""

Split = dict[str, list[str]]
"""Class -> paths of its images, relative to the root and sorted."""


def find_splits(root: Path) -> tuple[dict[str, Split], Counter[str]]:
    """The image files of each split by class, classes in timm's natural order, and what was left out, by reason.

    Raises:
        ValueError: the folder has not the layout above, cannot be read, has fewer than two classes, a class without
            images, an image without a class, or a class that train lacks. The message names it.
    """
    left_out: Counter[str] = Counter()
    folders = _split_folders(root, left_out)
    found = {split: _find_classes(root, folder, left_out) for split, folder in folders.items()}
    if len(found["train"]) < 2:
        raise ValueError(f"{root} has one class only ({', '.join(found['train'])}); at least two are needed")
    for split, part in found.items():
        if unknown := sorted(part.keys() - found["train"].keys()):
            raise ValueError(f"classes in {folders[split]} that train lacks: {', '.join(unknown)}")
    return found, left_out


def _split_folders(root: Path, left_out: Counter[str]) -> dict[str, Path]:
    """The folder of each split; the root itself as train where it holds the class folders.

    Raises:
        ValueError: names that could be splits or classes, or two folders for one split.
    """
    inside = folders_in(root, left_out)
    named = {split: [name for name in inside if name.strip().lower() in names] for split, names in SPLITS.items()}
    named = {split: names for split, names in named.items() if names}
    for split, names in named.items():
        if len(names) > 1:
            raise ValueError(f"{root} has {', '.join(names)}, which all mean {split}; keep one of them")
    if not named:
        return {"train": root}
    as_classes = [name for (name,) in named.values() if images_directly_in(root / name, Counter())]
    others = [name for name in inside if [name] not in named.values()]
    if as_classes:
        raise ValueError(
            f"{root / as_classes[0]} is named like a split but holds images itself: if it is a class, rename it; if it "
            f"is a split, put its images into a folder for each class"
        )
    if "train" not in named:
        present = ", ".join(name for (name,) in named.values())
        raise ValueError(
            f"{root} has {present} but no train; rename what is to be train, or classes that are so called"
        )
    if others:
        logger.warning("%s: left out, as they are no splits: %s", root, ", ".join(others))
        left_out["folders beside the splits"] += len(others)
    return {split: root / name for split, (name,) in named.items()}


def _find_classes(root: Path, folder: Path, left_out: Counter[str]) -> Split:
    """The images in each class folder, at any depth."""
    if loose := images_directly_in(folder, left_out):
        raise ValueError(
            f"{folder} has {len(loose)} images that lie in no class folder, such as {loose[0]}; "
            f"move them into the folder of their class, or away"
        )
    images: Split = {}
    for name in folders_in(folder, left_out):
        paths = [path.relative_to(root).as_posix() for path in images_in(folder / name, left_out)]
        if not paths:
            others = f"; left out: {describe(left_out)}" if left_out else ""
            raise ValueError(f"class folder {folder / name} has no images; remove it or fill it{others}")
        images.setdefault(unicodedata.normalize("NFC", name), []).extend(paths)
    if not images:
        raise ValueError(f"{folder} has no class folders: images are expected in {folder}/CLASS/")
    return {name: sorted(images[name]) for name in natural_order(images)}


def check_files(root: Path, names: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """SHA-256 of each file that decodes in full, and for each other one why it does not.

    Files of unchanged size and time are known from an index of earlier checks, which lies in the user's cache folder.
    """
    key = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
    index_file = cache_folder() / f"index-{key}.json"
    reader = f"riformer {__version__}, Pillow {PIL.__version__}"
    known: dict[str, list] = {}  # name -> size, time, SHA-256
    try:
        index = json.loads(index_file.read_text(encoding="utf-8"))
        known = index["files"] if index["reader"] == reader else {}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no index yet, or a damaged one: everything is checked

    stamps = {name: _stamp(root / name) for name in names}
    hashes = {name: known[name][2] for name in names if name in known and known[name][:2] == stamps[name]}
    fresh = [name for name in names if name not in hashes]
    bad = {}
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(fresh), CHUNK):
                chunk = fresh[start : start + CHUNK]
                checks = pool.map(_check_file, [root / name for name in chunk])
                for name, (digest, reason) in zip(chunk, checks, strict=True):
                    if reason:
                        bad[name] = reason
                    else:
                        hashes[name] = digest
                logger.info("checked %d of %d images in %s", start + len(chunk), len(fresh), root)
    finally:  # also what an interrupted scan has checked
        checked = {name: [*stamps[name], hashes[name]] for name in fresh if name in hashes}
        if checked:
            _write_index(index_file, {"reader": reader, "files": {**known, **checked}})
    return hashes, bad


def _write_index(file: Path, index: dict) -> None:
    try:
        write_text(file, json.dumps(index))
    except OSError as error:
        logger.warning("cannot write %s (%s): the next start will check all images again", file, error)


def _stamp(path: Path) -> list[int]:
    """Size and time of change; empty where there is no file to ask, which reading it will explain."""
    try:
        status = path.stat()
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]


def _check_file(path: Path) -> tuple[str, str]:
    """The file's SHA-256 and an empty string, or an empty string and why it cannot be read."""
    try:
        read_image(path)
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest(), ""
    except (ValueError, OSError) as error:
        return "", str(error).removeprefix(f"{path}: ")


def hold_out(images: Split, fraction: float, seed: int, contents: Mapping[str, str]) -> tuple[Split, Split]:
    """Train and val of each class: about the share `fraction` of it, but at least one image, goes to val.

    Images of equal content go to the same side, also when they are in different classes.

    Args:
        images: by class.
        fraction: between 0 and 1.
        seed: of the draw; that of the split, which is not the seed of the training.
        contents: something for each image that is equal where the contents are.

    Raises:
        ValueError: a class has a single image, or copies of one image alone.
    """
    train: Split = {}
    val: Split = {}
    in_val: dict[str, bool] = {}  # by content
    for name, paths in images.items():
        if len(paths) < 2:
            raise ValueError(f"class {name!r} has a single image, {paths[0]}; one for train and one for val are needed")
        copies = Counter(contents[path] for path in paths)
        wanted = min(max(round(len(paths) * fraction), 1), len(paths) - 1)
        taken = sum(count for content, count in copies.items() if in_val.get(content))
        free = {contents[path]: path for path in reversed(paths) if contents[path] not in in_val}
        ranks = dict(zip(free, hash_ranks(list(free.values()), [0] * len(free), seed), strict=True))
        for content in sorted(ranks, key=lambda content: ranks[content]):
            in_val[content] = taken < wanted and taken + copies[content] < len(paths)
            taken += copies[content] * in_val[content]
        train[name] = [path for path in paths if not in_val[contents[path]]]
        val[name] = [path for path in paths if in_val[contents[path]]]
        if not train[name] or not val[name]:
            raise ValueError(
                f"class {name!r} cannot be split into train and val: of its {len(paths)} images, {len(copies)} are "
                f"different; give it more images, or a val folder"
            )
    return train, val


def hash_ranks(names: Sequence[str], labels: Sequence[int], seed: int = 0) -> list[int]:
    """Each image's place within its class, in an order drawn by hashing, which no library's version changes."""
    drawn = sorted(range(len(names)), key=lambda i: hashlib.sha256(os.fsencode(f"{seed} {names[i]}")).digest())
    counts: Counter[int] = Counter()
    ranks = [0] * len(names)
    for i in drawn:
        ranks[i] = counts[labels[i]]
        counts[labels[i]] += 1
    return ranks
