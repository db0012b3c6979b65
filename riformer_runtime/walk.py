"""Image files below a folder: one walk for training, evaluation and prediction.

The policy:
    - an image is what has a suffix of `riformer_runtime.images.EXTENSIONS` and is no folder; whether it can be read is
      for its reader to say, also of broken links, pipes and devices;
    - hidden files and folders are left out, and those that systems and file servers make, such as thumbnails;
    - links are followed, but into no folder twice and into none that holds the one where the walk began;
    - everything that is left out is counted by reason.
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from riformer_runtime.images import EXTENSIONS

logger = logging.getLogger(__name__)

SYSTEM_NAMES = frozenset(
    (
        *("@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "~snapshot"),  # file servers
        *("$recycle.bin", "recycler", "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini"),
        *("__macosx", "icon\r", "network trash folder", "temporary items", "lost+found", "__pycache__"),
    )
)
"""Names, in lower case, of files and folders that no user made. Most others of their kind are hidden."""

UNREAD_SUFFIXES = frozenset(
    (
        *(".heic", ".heif", ".hif", ".jxl", ".jxr", ".psd", ".svg", ".tga", ".exr", ".hdr", ".dcm", ".eps", ".ico"),
        *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2"),  # of cameras
    )
)
"""Suffixes of image formats that are not read, for which a conversion is advised."""


class Walk:
    """A walk over folders by the policy of this module.

    Attributes:
        left_out: how many files and folders were left out, by reason.
        errors: what could not be looked into, a message for each.
    """

    def __init__(self) -> None:
        self.left_out: Counter[str] = Counter()
        self.errors: list[str] = []

    def entries(self, folder: Path) -> tuple[list[str], list[str]]:
        """The names of the folders in a folder, and of its images, both sorted."""
        folders, images = [], []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if reason := _unwanted(entry.name):
                        self.left_out[reason] += 1
                    elif _is_folder(entry):
                        folders.append(entry.name)
                    elif is_image(entry.name):
                        images.append(entry.name)
                    else:
                        self.left_out[_reason(entry)] += 1
        except OSError as error:
            self.errors.append(f"cannot read folder {folder}: {error.strerror}")
        return sorted(folders), sorted(images)

    def images(self, folder: Path) -> list[Path]:
        """The images below a folder, at any depth, sorted."""
        above = folder.parent.resolve()
        visited = {str(above), *map(str, above.parents)}
        images: list[Path] = []
        waiting = [folder]
        while waiting:
            current = waiting.pop()
            real = os.path.realpath(current)
            if real in visited:
                self.left_out["linked again"] += 1
                continue
            visited.add(real)
            folders, names = self.entries(current)
            images += [current / name for name in names]
            waiting += [current / name for name in reversed(folders)]
        return sorted(images, key=os.fspath)


def find_images(paths: Iterable[str | Path]) -> tuple[list[Path], list[str]]:
    """The files among the paths and the images in the folders among them, and a message for each path without any.

    What is left out of a folder is logged.
    """
    images: list[Path] = []
    problems: list[str] = []
    for path in map(Path, paths):
        if os.path.isdir(path):
            walk = Walk()
            inside = walk.images(path)
            if walk.left_out:
                logger.info("%s: %s", path, describe(walk.left_out))
            problems += walk.errors or ([] if inside else [f"no images in {path}"])
            images += inside
        elif os.path.lexists(path):
            images.append(path)
        else:
            problems.append(f"no such file or folder: {path}")
    return images, problems


def describe(left_out: dict[str, int]) -> str:
    """One line about what was left out: how many files and folders for each reason, the most frequent reason first."""
    counts = sorted(left_out.items(), key=lambda pair: (-pair[1], pair[0]))
    line = f"left out {', '.join(f'{count:,} {reason}' for reason, count in counts)}"
    unread = [suffix for suffix in sorted(UNREAD_SUFFIXES) if f"with suffix {suffix}" in left_out]
    return f"{line}; to use {', '.join(unread)} files, convert them to JPEG or PNG" if unread else line


def is_image(name: str) -> bool:
    """Whether a file of that name counts as an image."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def _unwanted(name: str) -> str:
    """Why a file or folder of that name is left out; empty if it is not."""
    if name.startswith("."):
        return "hidden"
    if name.lower() in SYSTEM_NAMES or re.fullmatch(r"found\.\d{3}", name.lower()):
        return f"of the system ({name.strip()})"
    return ""


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # such as a link to itself
        return False


def _reason(entry: os.DirEntry[str]) -> str:
    """Why something that is neither a folder nor an image is left out."""
    if entry.is_symlink() and not os.path.exists(entry.path):
        return "with a broken link"
    if not os.path.isfile(entry.path):
        return "not regular"
    suffix = os.path.splitext(entry.name)[1].lower()
    return f"with suffix {suffix}" if suffix else "without a suffix"
