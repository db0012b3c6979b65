"""A folder in the Hub's place: what timm and the package call of the Hub's client, without a network."""

import shutil
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi


class FakeHub:
    """Keeps OWNER/NAME under `root`/OWNER/NAME; `private` and `revisions` say what was asked for."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch):
        self.root = root
        self.private: dict[str, bool] = {}
        self.revisions: list[str | None] = []
        for name in ("create_repo", "file_exists", "upload_folder", "upload_file", "snapshot_download"):
            monkeypatch.setattr(HfApi, name, getattr(self, name))
        monkeypatch.setattr("riformer.model.hub._is_reachable", lambda: True)
        monkeypatch.setattr("timm.models._hub.hf_hub_download", self.hf_hub_download)

    def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> SimpleNamespace:
        assert exist_ok
        self.private.setdefault(repo_id, private)
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=repo_id)

    def file_exists(self, repo_id: str, filename: str, **_: Any) -> bool:
        return (self.root / repo_id / filename).exists()

    def upload_folder(self, repo_id: str, folder_path: str, **_: Any) -> None:
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)

    def upload_file(self, path_or_fileobj: Path, path_in_repo: str, repo_id: str, **_: Any) -> None:
        shutil.copy(path_or_fileobj, self.root / repo_id / path_in_repo)

    def snapshot_download(self, repo_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        self.revisions.append(revision)
        if not (self.root / repo_id).is_dir():
            raise OSError(f"404: {repo_id}")
        snapshot = self.root / "cache" / repo_id
        snapshot.mkdir(parents=True, exist_ok=True)
        for file in (self.root / repo_id).iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, snapshot)
        return str(snapshot)

    def hf_hub_download(self, repo_id: str, filename: str, **_: Any) -> str:
        return str(self.root / repo_id / filename)
