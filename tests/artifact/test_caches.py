"""One cache folder, and none that somebody else could have filled."""

import os
import stat
import subprocess
import tempfile
from pathlib import Path

import pytest

from riformer_runtime.caches import cache_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The fallback in the system's folder of temporary files, with no other cache in reach."""
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp" / f"riformer-{os.getuid()}"


def test_the_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "riformer"
    for value in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_folder() == tmp_path / "home" / ".cache" / "riformer"
    assert cache_folder().is_dir()


def test_without_a_home_the_cache_is_a_private_folder(temporary: Path) -> None:
    assert cache_folder() == temporary
    assert stat.S_IMODE(temporary.stat().st_mode) == 0o700
    assert cache_folder() == temporary


@pytest.mark.parametrize("kind", ["open to all", "link", "of another user"])
def test_a_folder_that_others_may_have_filled_is_refused(temporary: Path, kind: str) -> None:
    if kind == "link":
        (temporary.parent / "elsewhere").mkdir(mode=0o700)
        temporary.symlink_to(temporary.parent / "elsewhere")
    else:
        temporary.mkdir(mode=0o700)
    if kind == "open to all":
        temporary.chmod(0o777)
    if kind == "of another user":
        if os.getuid():
            pytest.skip("only root can give a folder away")
        os.chown(temporary, 12345, 12345)
    with pytest.raises(OSError, match="no cache folder can be written; set XDG_CACHE_HOME"):
        cache_folder()


def test_no_other_file_of_the_package_looks_for_a_cache() -> None:
    command = ["grep", "-rlE", "XDG_CACHE|gettempdir", "riformer", "riformer_runtime", "--include=*.py"]
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert files == ["riformer_runtime/caches.py"]
