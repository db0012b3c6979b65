"""The user's cache folder, for what this package can make again: indexes of images, compiled libraries, downloads."""

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/riformer or ~/.cache/riformer; if that cannot be written, a private folder in the system's /tmp.

    Libraries from this folder are loaded into the process. So it must belong to the user, except that root may use one
    in a home, as under sudo; and in /tmp it must be no link, and closed to others.

    Raises:
        OSError: no folder can be written.
    """
    user = os.getuid() if hasattr(os, "getuid") else 0
    base = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache")) / "riformer"
    temporary = Path(tempfile.gettempdir()) / f"riformer-{user}"
    if _is_writable(home) and user in (0, home.stat().st_uid):
        return home
    if _is_writable(temporary):
        status = temporary.lstat()
        if status.st_uid == user and not temporary.is_symlink() and not status.st_mode & 0o022:
            return temporary
    raise OSError("no cache folder can be written; set XDG_CACHE_HOME")


def _is_writable(folder: Path) -> bool:
    """Whether the folder can be written; it is made if it is not there."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)
