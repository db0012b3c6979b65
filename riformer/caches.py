"""The user's cache folder, for what this package can make again: indexes of images, compiled libraries, downloads."""

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/riformer or ~/.cache/riformer; if that cannot be written, a private folder in the system's /tmp.

    Raises:
        OSError: no folder can be written.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    user = os.getuid() if hasattr(os, "getuid") else 0
    for folder in (
        (Path(base) if base else Path.home() / ".cache") / "riformer",
        Path(tempfile.gettempdir()) / f"riformer-{user}",
    ):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if os.access(folder, os.W_OK) and (user == 0 or folder.stat().st_uid == user):
                return folder
        except OSError:
            continue
    raise OSError("no cache folder can be written; set XDG_CACHE_HOME")
