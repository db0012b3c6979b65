"""One walk over image files, for training, evaluation and prediction: what counts as an image, and what is left out.

Left out are hidden files and folders, folders in which systems keep thumbnails and deleted files, and files without the
suffix of an image. Links are followed, but no folder is entered twice. Everything that is left out is counted. What has
the suffix of an image and is none, such as a broken link, is not left out: reading it says what is wrong.
"""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from riformer.images import EXTENSIONS

SYSTEM_FOLDERS = frozenset(
    (
        *("@eadir", "@tmp", "#recycle", "#snapshot", "$recycle.bin", "system volume information", "lost+found"),
        *("__macosx", "__pycache__", "thumbs", "_thumbs", "thumbnails", ".thumbnails", ".ds_store"),
    )
)
"""Names, in lower case, of folders that systems and their viewers make beside images."""

SYSTEM_FILES = frozenset(("thumbs.db", "desktop.ini", "ehthumbs.db", "icon\r"))


def folders_in(folder: Path, left_out: Counter[str]) -> list[str]:
    """Names of the folders directly inside one, but hidden ones and those of systems, which are counted.

    Raises:
        ValueError: the folder cannot be read.
    """
    names = []
    with _readable(folder) as entries:
        for entry in entries:
            if entry.is_dir() and _is_wanted(entry.name, left_out, is_folder=True):
                names.append(entry.name)
    return sorted(names)


def images_directly_in(folder: Path, left_out: Counter[str]) -> list[str]:
    """Names of the images directly inside a folder; other files are counted.

    Raises:
        ValueError: the folder cannot be read.
    """
    with _readable(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.is_dir() and _is_image(entry, left_out))


def images_in(folder: Path, left_out: Counter[str]) -> list[Path]:
    """The images in a folder, at any depth, sorted by path; what is left out is counted.

    Raises:
        ValueError: a folder cannot be read.
    """
    above = folder.parent.resolve()
    return sorted(_walk(folder, {str(above), *map(str, above.parents)}, left_out))


def find_images(paths: list[str | Path], left_out: Counter[str]) -> list[Path]:
    """The files among the paths, whatever their suffix, and the images in the folders among them.

    A path that leads nowhere stays in the list: reading it says what is wrong.

    Raises:
        ValueError: a folder without images.
    """
    images: list[Path] = []
    for path in map(Path, paths):
        if not os.path.isdir(path):
            images.append(path)
            continue
        inside = images_in(path, left_out)
        if not inside:
            raise ValueError(f"no images in {path}" + (f"; left out: {describe(left_out)}" if left_out else ""))
        images += inside
    return images


def describe(left_out: Counter[str]) -> str:
    """What was left out, the most frequent first, such as `3 .heic, 2 hidden`."""
    return ", ".join(f"{count:,} {reason}" for reason, count in left_out.most_common())


def _walk(folder: Path, seen: set[str], left_out: Counter[str]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in seen:
        left_out["links to a folder that was visited"] += 1
        return
    seen.add(real)
    with _readable(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_dir():
            if _is_wanted(entry.name, left_out, is_folder=True):
                yield from _walk(folder / entry.name, seen, left_out)
        elif _is_image(entry, left_out):
            yield folder / entry.name


def _is_image(entry: os.DirEntry, left_out: Counter[str]) -> bool:
    if not _is_wanted(entry.name, left_out, is_folder=False):
        return False
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix not in EXTENSIONS:
        left_out[suffix or "without suffix"] += 1
        return False
    return True


def _is_wanted(name: str, left_out: Counter[str], is_folder: bool) -> bool:
    kind = "folders" if is_folder else "files"
    if name.lower() in (SYSTEM_FOLDERS if is_folder else SYSTEM_FILES):
        left_out[f"{kind} of the system"] += 1
    elif name.startswith("."):
        left_out[f"hidden {kind}"] += 1
    else:
        return True
    return False


def _readable(folder: Path) -> "os._ScandirIterator[str]":
    try:
        return os.scandir(folder)
    except OSError as error:
        raise ValueError(f"cannot read folder {folder}: {error.strerror}") from error
