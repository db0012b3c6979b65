"""A folder of class folders -> image files by split and class, each opened and decoded once before training.

Layout: PATH/train, PATH/val (or valid, validation) and perhaps PATH/test, each with a folder for each class; or
PATH/train alone, or PATH with the class folders themselves. Images lie in a class folder at any depth.
"""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import PIL

from riformer.atomic import write_text
from riformer.caches import cache_folder
from riformer.data.orders import natural_order
from riformer.images import EXTENSIONS, read_image
from riformer.version import __version__

logger = logging.getLogger(__name__)

VAL_FOLDERS = ("val", "valid", "validation")

Split = dict[str, list[str]]
"""Class -> paths of its images, relative to the root and sorted."""


def find_images(root: Path) -> tuple[dict[str, Split], int]:
    """The image files of each split, and the number of other files beside them; hidden files do not count.

    Raises:
        ValueError: the folder has not the layout above, cannot be read, has fewer than two classes, a class without
            images, an image without a class, or a class that train lacks. The message names it.
    """
    _, subfolders, _ = next(os.walk(root, onerror=_refuse))
    present = [name for name in ("train", *VAL_FOLDERS, "test") if name in subfolders]
    if present and "train" not in present:
        raise ValueError(f"{root} has {', '.join(present)} but no train")
    if len(set(present) & set(VAL_FOLDERS)) > 1:
        raise ValueError(f"{root} has {', '.join(present)}; keep one of {', '.join(VAL_FOLDERS)}")
    folders = {"val" if name in VAL_FOLDERS else name: root / name for name in present} or {"train": root}
    found, num_ignored = {}, 0
    for split, folder in folders.items():
        found[split], num_others = _find_classes(root, folder)
        num_ignored += num_others
    if len(found["train"]) < 2:
        raise ValueError(f"{root} has one class only ({', '.join(found['train'])}); at least two are needed")
    for split, part in found.items():
        if unknown := sorted(part.keys() - found["train"].keys()):
            raise ValueError(f"classes in {split} of {root} that train lacks: {', '.join(unknown)}")
    if num_ignored:
        logger.info("ignored %d files in %s that are no images by their suffix", num_ignored, root)
    return found, num_ignored


def _find_classes(root: Path, folder: Path) -> tuple[Split, int]:
    """The images in each class folder, at any depth, and the number of other files."""
    _, class_folders, files = next(os.walk(folder, onerror=_refuse))
    loose = [name for name in files if _is_image(name)]
    if loose:
        raise ValueError(
            f"{folder} has {len(loose)} images that lie in no class folder, such as {min(loose)}; "
            f"move them into the folder of their class, or away"
        )
    num_ignored = sum(not name.startswith(".") for name in files)
    found = {}
    for name in natural_order(name for name in class_folders if not name.startswith(".")):
        paths = [path.relative_to(root).as_posix() for path in _files(folder / name)]
        found[name] = sorted(path for path in paths if _is_image(path))
        if not found[name]:
            raise ValueError(f"class folder {folder / name} has no images; remove it or fill it")
        num_ignored += len(paths) - len(found[name])
    if not found:
        raise ValueError(f"{folder} has no class folders: images are expected in {folder}/CLASS/")
    return found, num_ignored


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder but hidden ones. Links are followed, but into no folder twice and into none above."""
    above = folder.parent.resolve()
    seen = {str(above), *map(str, above.parents)}
    for path, folders, files in os.walk(folder, followlinks=True, onerror=_refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        real = os.path.realpath(path)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(path, name) for name in files if not name.startswith("."))


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS


def _refuse(error: OSError) -> None:
    raise ValueError(f"cannot read folder {error.filename}: {error.strerror}") from error


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
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(fresh), 1000):
            chunk = fresh[start : start + 1000]
            for name, (digest, reason) in zip(
                chunk, pool.map(_check_file, [root / name for name in chunk]), strict=True
            ):
                if reason:
                    bad[name] = reason
                else:
                    hashes[name] = digest
            logger.info("checked %d of %d images in %s", start + len(chunk), len(fresh), root)
    if fresh:
        files = {**known, **{name: [*stamps[name], hashes[name]] for name in fresh if name in hashes}}
        try:
            write_text(index_file, json.dumps({"reader": reader, "files": files}))
        except OSError as error:
            logger.warning("cannot write %s (%s): the next start will check all images again", index_file, error)
    return hashes, bad


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


def hold_out(images: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Train and val of each class: the share `fraction` of it, but at least one image, goes to val.

    Raises:
        ValueError: a class has a single image.
    """
    train, val = {}, {}
    for name, paths in images.items():
        if len(paths) < 2:
            raise ValueError(f"class {name!r} has a single image, {paths[0]}; one for train and one for val are needed")
        num_val = min(max(round(len(paths) * fraction), 1), len(paths) - 1)
        ranks = hash_ranks(paths, [0] * len(paths), seed)
        train[name] = [path for path, rank in zip(paths, ranks, strict=True) if rank >= num_val]
        val[name] = [path for path, rank in zip(paths, ranks, strict=True) if rank < num_val]
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
