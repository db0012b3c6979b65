"""Files and folders that appear whole or not at all: written beside, flushed to disk, then renamed."""

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on a clean exit what was written there becomes `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        _flush(beside)
        os.replace(beside, path)
        _flush(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Replaces the file's content."""
    with replace_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


@contextmanager
def replace_folder(path: str | Path, keep_previous: bool = False) -> Iterator[Path]:
    """Yields an empty temporary folder beside `path`; on a clean exit it becomes `path`.

    The folder that was there before becomes `previous(path)`, so that at every moment one of the two is whole, and goes
    away at the end unless it is to be kept.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.mkdir()
    try:
        yield beside
        for file in beside.rglob("*"):
            _flush(file)
        _flush(beside)
        if path.exists():
            shutil.rmtree(previous(path), ignore_errors=True)
            os.rename(path, previous(path))
        os.rename(beside, path)
        _flush(path.parent)
        if not keep_previous:
            shutil.rmtree(previous(path), ignore_errors=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def previous(path: str | Path) -> Path:
    """Where `replace_folder` keeps the folder that it replaced."""
    path = Path(path)
    return path.with_name(f"{path.name}.previous")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
