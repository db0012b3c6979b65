"""Files and folders that appear whole or not at all: written beside their place, flushed to disk, then renamed.

They are written in a working folder beside the destination, `.NAME.RANDOM.tmp`, which the writing process holds locked.
A process that is killed loses its lock, and the next write to the same destination removes its working folder. Nothing
else beside the destination is touched.
"""

import ctypes
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, and no working folder is taken for abandoned
    fcntl = None  # type: ignore[assignment]

NEW, OLD, OLDER, LOCK = "new", "old", "older", "lock"  # what a working folder may hold
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux


@contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path; on a clean exit the file that was written there becomes `path`.

    A file that is replaced gives its mode to the new one; otherwise the umask decides. A link stays a link: the file
    that it points to is replaced. A device or a pipe is written to.

    Raises:
        OSError: `path` cannot be written; the message names it and the cause.
    """
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        with tempfile.TemporaryDirectory() as temporary, _errors_within(path, Path(temporary)):
            yield (new := Path(temporary) / NEW)
            with open(new, "rb") as source, open(path, "wb") as destination:
                shutil.copyfileobj(source, destination)
        return
    with _working_folder(path) as (folder, destination, mode):
        yield (new := folder / NEW)
        os.chmod(new, _mode(destination) or mode)
        flush(new)
        os.replace(new, destination)
        flush(destination.parent)


def write_text(path: str | Path, text: str) -> None:
    """Replaces the file's content."""
    with replace_file(path) as new:
        new.write_text(text, encoding="utf-8")


@contextmanager
def replace_folder(path: str | Path, keep_previous: bool = False) -> Iterator[Path]:
    """Yields an empty temporary folder; on a clean exit it becomes `path`.

    Files get the mode that the umask says; a folder that is replaced gives its mode, and its hidden files, to the new
    one. A link stays a link: the folder that it points to is replaced. At every moment `path` is there and whole: on
    Linux the two folders are exchanged in one step. Where the file system cannot do that, there is a moment between two
    renames in which `path` is missing; after a kill in that moment `recover` puts it back.

    Args:
        path: the folder.
        keep_previous: what was at `path` becomes `previous(path)`, and replaces what was there.

    Raises:
        ValueError: `path` is the current folder or a mount point, which cannot be exchanged.
        OSError: `path` cannot be written; the message names it and the cause.
    """
    path = Path(path)
    if path.is_dir() and (os.path.samefile(path, os.curdir) or os.path.ismount(path)):
        raise ValueError(
            f"{path} is the current folder or a mount point, which cannot be replaced: name a folder in it"
        )
    with _working_folder(path) as (folder, destination, mode):
        if destination.exists() and not destination.is_dir():
            raise NotADirectoryError(20, os.strerror(20), str(folder))
        new = folder / NEW
        new.mkdir()
        yield new
        if destination.is_dir():
            os.chmod(new, _mode(destination))
            _copy_hidden(destination, new)
        for inner in new.rglob("*"):
            if inner.is_symlink():
                continue
            if inner.is_file():
                os.chmod(inner, mode)
            flush(inner)
        flush(new)
        _put(new, destination, folder / OLD)
        flush(destination.parent)
        if keep_previous and (folder / OLD).exists():
            _put(folder / OLD, previous(destination), folder / OLDER)
            flush(destination.parent)


def previous(path: str | Path) -> Path:
    """Where `replace_folder` puts what it replaced, with `keep_previous`."""
    path = Path(path)
    return path.with_name(f"{path.name}.previous")


def recover(path: str | Path) -> Path:
    """The place of a folder that `replace_folder` writes: `path`, but after a kill between two renames.

    What was at `path` is then put back, or, on a disk that cannot be written, read where it lies.
    """
    path = Path(path)
    if path.exists():
        return path
    destination = Path(os.path.realpath(path))
    for folder in _working_folders(destination):
        if (folder / OLD).is_dir():
            with _claimed(folder) as abandoned, suppress(OSError):
                if abandoned:
                    _put_back(folder, destination)
            return path if path.exists() else folder / OLD
    return path


@contextmanager
def write_errors(path: str | Path) -> Iterator[None]:
    """Turns each OSError of its body into one that says that `path` cannot be written, and why."""
    try:
        yield
    except OSError as error:
        raise _named(error, Path(path)) from error


def flush(path: Path) -> None:
    """Waits until a file, or the list of what a folder holds, is on the disk."""
    if os.name == "nt":  # which opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# moves


def _put(new: Path, path: Path, old: Path) -> None:
    """Moves folder `new` to `path`, and what was there to `old`."""
    if not path.exists():
        os.rename(new, path)
    elif _exchange(new, path):
        os.rename(new, old)
    else:
        os.rename(path, old)
        os.rename(new, path)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two folders in one step; False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or an old C library
        return False
    return renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0


def _put_back(folder: Path, path: Path) -> None:
    """Undoes the first of two renames where the second did not happen."""
    if (folder / OLD).is_dir() and not os.path.lexists(path):
        os.rename(folder / OLD, path)


def _copy_hidden(source: Path, destination: Path) -> None:
    """Copies the hidden files and folders, such as .gitattributes, that `destination` does not have."""
    for entry in source.iterdir():
        copy = destination / entry.name
        if not entry.name.startswith(".") or copy.exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, copy, symlinks=True)
        else:
            shutil.copy2(entry, copy, follow_symlinks=False)


def _mode(path: Path) -> int:
    """Its permissions; 0 where there is nothing."""
    return stat.S_IMODE(path.stat().st_mode) if path.exists() else 0


# working folders


@contextmanager
def _working_folder(path: Path) -> Iterator[tuple[Path, Path, int]]:
    """An empty folder beside `path`, removed at the end; `path` with links resolved; the mode of new files."""
    destination = Path(os.path.realpath(path))
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(destination)
        folder, lock = _make_working_folder(destination)
    except OSError as error:
        raise _named(error, path, f" in {destination.parent}") from error
    try:
        with _errors_within(path, folder):
            yield folder, destination, _mode(folder / LOCK)
    finally:
        with suppress(OSError):
            _remove(folder, destination)
        os.close(lock)


def _make_working_folder(path: Path) -> tuple[Path, int]:
    """A new working folder, and the descriptor that holds its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        try:
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another process has just taken it for abandoned
            continue
        if fcntl:
            with suppress(OSError):  # a file system without locks: nobody takes the folder for abandoned
                fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / LOCK).exists():
            return folder, lock
        os.close(lock)


def _working_folders(path: Path) -> list[Path]:
    """Those for `path`, of living and of killed processes."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]+\.tmp")
    folders = []
    for name in filter(pattern.fullmatch, os.listdir(path.parent) if path.parent.is_dir() else []):
        folder = path.parent / name
        with suppress(OSError):  # a file, another user's folder, or one that was just removed
            if not folder.is_symlink() and set(os.listdir(folder)) <= {NEW, OLD, OLDER, LOCK}:
                folders.append(folder)
    return folders


def _remove_abandoned(path: Path) -> None:
    """Removes the working folders that killed processes have left, after putting back what they have moved away."""
    for folder in _working_folders(path):
        with _claimed(folder) as abandoned, suppress(OSError):
            if abandoned:
                _remove(folder, path)
            else:
                os.rmdir(folder)  # empty: the process was killed before it made or after it removed the lock


def _remove(folder: Path, path: Path) -> None:
    """Removes a working folder, the lock last, so that a kill in between leaves one that is known as abandoned."""
    _put_back(folder, path)
    for name in (NEW, OLD, OLDER, LOCK):
        if (inner := folder / name).is_dir():
            shutil.rmtree(inner)
        else:
            inner.unlink(missing_ok=True)
    os.rmdir(folder)


@contextmanager
def _claimed(folder: Path) -> Iterator[bool]:
    """Locks a working folder during its body; False where its process lives, or nothing can be locked."""
    try:
        lock = os.open(folder / LOCK, os.O_RDWR)
    except OSError:
        yield False
        return
    try:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        yield False
    else:
        yield bool(fcntl)
    finally:
        os.close(lock)


# errors


@contextmanager
def _errors_within(path: Path, folder: Path) -> Iterator[None]:
    """Like `write_errors`, for a body that writes into `folder` by any library and may fail for other reasons too."""
    try:
        yield
    except Exception as error:
        if cause := _cause(error, folder):
            raise _named(cause, path) from error
        raise


def _cause(error: Exception, folder: Path) -> OSError | None:
    """Why something could not be written into `folder`; None if `error` is about something else.

    safetensors has the system's number in its text. torch says nothing, so writing is tried once more.
    """
    if isinstance(error, OSError) and error.errno is not None:
        names = [os.fsdecode(name) for name in (error.filename, error.filename2) if name is not None]
        is_here = any(Path(name) == folder.parent or Path(name).is_relative_to(folder) for name in names)
        return error if is_here or not names else None
    if number := re.search(r"\(os error (\d+)\)", str(error)):
        return OSError(int(number[1]), os.strerror(int(number[1])))
    try:
        for file in [file for file in folder.rglob("*") if file.is_file()]:
            with open(file, "ab") as more:
                more.write(bytes(2**20))
    except OSError as cause:
        return cause
    return None


def _named(error: OSError, path: Path, where: str = "") -> OSError:
    """The same kind of error, saying that `path` cannot be written and why."""
    named = type(error)(f"cannot write {path}: {error.strerror or error}{where}")
    named.errno = error.errno
    return named
