"""Files and folders that appear whole or not at all: written beside, flushed to disk, then renamed.

What is written follows symbolic links, has the permissions that the user's umask gives, and touches nothing else in the
folder. Names that start with a dot and end in `.riformer-tmp` or `.riformer-old` are this module's own.
"""

import ctypes
import errno
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_WRITER_MESSAGES = ("PytorchStreamWriter", "unexpected pos", "basic_ios", "iostream", "file write failed", "I/O error")
"""How torch.save and safetensors report that a file could not be written."""


@contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on a clean exit what was written there becomes `path`.

    Raises:
        OSError: it cannot be written; the message names `path` and the cause, and what was there stays.
    """
    path = _real(path)
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = _temporary(path, "tmp")
        try:
            beside.touch(exist_ok=False)
            mode = path.stat().st_mode if path.exists() else beside.stat().st_mode
            yield beside
            os.chmod(beside, mode & 0o7777)
            flush(beside)
            os.replace(beside, path)
            flush(path.parent)
        finally:
            beside.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Replaces the file's content."""
    with replace_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


@contextmanager
def replace_folder(path: str | Path, keep_previous: bool = False) -> Iterator[Path]:
    """Yields an empty temporary folder beside `path`; on a clean exit it becomes `path`.

    On Linux the two are exchanged at once. Elsewhere there is a moment without `path`, after which `recover` brings the
    former folder back.

    Args:
        path: the folder to replace, with all its content.
        keep_previous: keep the former folder as `previous(path)`, instead of deleting it.

    Raises:
        OSError: it cannot be written; the message names `path` and the cause, and what was there stays.
    """
    path = _real(path)
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        beside, former = _temporary(path, "tmp"), _temporary(path, "old")
        beside.mkdir()
        try:
            mode = beside.stat().st_mode
            yield beside
            for file in beside.rglob("*"):
                os.chmod(file, mode & (0o777 if file.is_dir() else 0o666))
                flush(file)
            flush(beside)
            if path.exists():
                if _exchange(beside, path):
                    os.rename(beside, former)
                else:
                    os.rename(path, former)
                    os.rename(beside, path)
            else:
                os.rename(beside, path)
            flush(path.parent)
            if former.exists() and keep_previous:
                shutil.rmtree(previous(path), ignore_errors=True)
                os.rename(former, previous(path))
        finally:
            shutil.rmtree(beside, ignore_errors=True)
            if path.exists():
                shutil.rmtree(former, ignore_errors=True)


def previous(path: str | Path) -> Path:
    """Where `replace_folder` keeps the former folder, if it is told to."""
    path = Path(path)
    return path.with_name(f"{path.name}.previous")


def recover(path: str | Path) -> Path:
    """The folder, brought back if a process was killed between the two renames that replace it."""
    path = Path(path)
    if not path.exists():
        for former in _own(_real(path), "old"):
            os.rename(former, path)
            break
    return path


def _real(path: str | Path) -> Path:
    """Where the path leads, so that a link stays and what it points to is replaced."""
    return Path(os.path.realpath(path))


def _temporary(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.riformer-{kind}")


def _own(path: Path, kind: str) -> list[Path]:
    return sorted(path.parent.glob(f".{glob.escape(path.name)}.*.riformer-{kind}"))


def _remove_leftovers(path: Path) -> None:
    """Removes what processes that were killed left beside `path`; those that still run need theirs."""
    recover(path)
    for folder in (*_own(path, "tmp"), *_own(path, "old")):
        pid = folder.name.split(".")[-2]
        if not pid.isdecimal() or int(pid) == os.getpid() or not _runs(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it runs, but belongs to somebody else
    return True


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two paths at once; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    at_cwd, exchange = -100, 2
    return renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns what goes wrong while `path` is written into an OSError that names it and the cause."""
    try:
        yield
    except OSError as error:
        if str(error).startswith("cannot write"):
            raise
        raise _cannot_write(path, error.strerror or str(error), error.errno) from error
    except Exception as error:
        text = str(error)
        if type(error).__name__ != "SafetensorError" and not any(message in text for message in _WRITER_MESSAGES):
            raise
        full = shutil.disk_usage(path.parent).free < 2**20 or "os error 28" in text
        reason = os.strerror(errno.ENOSPC) if full else text.splitlines()[0]
        raise _cannot_write(path, reason, errno.ENOSPC if full else errno.EIO) from error


def _cannot_write(path: Path, reason: str, number: int | None) -> OSError:
    error = OSError(f"cannot write {path}: {reason}")
    error.errno = number
    return error


def flush(path: Path) -> None:
    """Waits until the file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
