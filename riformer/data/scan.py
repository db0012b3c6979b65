"""Each image file of a data set opened and decoded once before training; what was checked is remembered in an index.

The index lies in the user's cache folder, a line for each file. It grows while files are checked, so that an
interrupted scan goes on where it was.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import PIL

from riformer_runtime.caches import cache_folder
from riformer_runtime.images import read_image
from riformer_runtime.version import __version__

logger = logging.getLogger(__name__)

SAVE_SECONDS = 2.0  # a kill loses at most this much of a scan
REPORT_SECONDS = 10.0
READER = f"riformer {__version__}, Pillow {PIL.__version__}"  # of which entries in the index are valid

Entry = list[Any]
"""Size in bytes and time of change of a file, and its SHA-256."""


def check_files(root: Path, names: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """SHA-256 of each file that decodes in full, and for each other file the reason why it does not.

    Files of unchanged size and time are not read again.
    """
    index = _Index(root)
    stamps = {name: _stamp(root / name) for name in names}
    known = {name: entry for name in names if (entry := index.files.get(name)) and entry[:2] == stamps[name]}
    hashes = {name: entry[2] for name, entry in known.items()}
    fresh = [name for name in names if name not in known]
    bad = {}
    saved = reported = time.monotonic()
    try:
        for number, (name, digest, reason) in enumerate(_check_all(root, fresh), 1):
            if reason:
                bad[name] = reason
            else:
                hashes[name] = digest
                index.add(name, [*stamps[name], digest])
            if time.monotonic() - saved > SAVE_SECONDS:
                index.save()
                saved = time.monotonic()
            if time.monotonic() - reported > REPORT_SECONDS:
                logger.info("checked %d of %d images in %s", number, len(fresh), root)
                reported = time.monotonic()
    finally:
        index.save()
    if fresh:
        logger.info("checked %d images in %s", len(fresh), root)
    return hashes, bad


class _Index:
    """What is known of the files of one folder, by name, and the file in which it is kept."""

    def __init__(self, root: Path):
        self.files: dict[str, Entry] = {}
        self.unsaved: list[str] = []
        self.path: Path | None = None
        try:
            key = hashlib.sha256(os.fsencode(root.resolve()) + READER.encode()).hexdigest()[:16]
            self.path = cache_folder() / f"index-{key}.jsonl"
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.exists() else []
        except OSError as error:
            self._warn(error)
            return
        for line in lines:
            try:
                name, size, changed, digest = json.loads(line)
                self.files[name] = [size, changed, bytes.fromhex(digest).hex()]
            except (ValueError, TypeError):
                pass  # damaged, or cut short by a kill: that file is checked again

    def add(self, name: str, entry: Entry) -> None:
        self.unsaved.append(json.dumps([name, *entry]) + "\n")

    def save(self) -> None:
        """Appends what was added since; that it cannot be written costs a warning."""
        lines, self.unsaved = self.unsaved, []
        if not lines or self.path is None:
            return
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("\n" + "".join(lines))  # a line that a kill cut short ends here
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        self.path = None
        logger.warning("cannot write an index of checked images (%s): the next start checks all images again", error)


def _check_all(root: Path, names: list[str]) -> Iterator[tuple[str, str, str]]:
    """Name, SHA-256 and an empty reason of each file, or an empty SHA-256 and the reason."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(names), 1000):
            some = names[start : start + 1000]
            for name, result in zip(some, pool.map(_check_file, [root / name for name in some]), strict=True):
                yield name, *result


def _stamp(path: Path) -> list[int]:
    """Size and time of change; empty if the file cannot be asked, which reading it will explain."""
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
