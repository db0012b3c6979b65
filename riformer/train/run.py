"""The run folder: all that is needed to repeat, resume, evaluate and use one training.

- recipe.json: the resolved configuration; `riformer train --config` takes it
- env.json: versions, machine and date
- inputs.json: checksums of the teachers and of the weights to start from
- data.json: class names, the split and skipped images
- metrics.jsonl: a line for each optimiser step and each epoch
- best/: the best model so far: config.json and model.safetensors, in the Hub's layout
- last/: the state to resume from, with checksums; last.previous/ is the one before
- teacher_outputs/: where they are kept for later epochs; not needed once it is finished
- teacher/: the run of its own teacher, where it trained one
- evaluation.json: accuracy, parity and speed of the finished model
- .lock: held by the process that trains here
"""

import hashlib
import json
import logging
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from riformer.atomic import flush, previous, recover, replace_file, replace_folder, write_text
from riformer.config import Recipe, from_dict, reset_unused, to_dict, upgrade
from riformer.version import __version__

logger = logging.getLogger(__name__)


class Run:
    """One run folder. Only the main process of a distributed run writes to it."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def begin(self, recipe: Recipe, world_size: int) -> None:
        """Writes the recipe and the environment into a new folder, or checks that an existing run has this recipe.

        A run that has not come as far as training anything makes way for one of another recipe.

        Raises:
            ValueError: the folder holds other files, or a run of another recipe; the message names the differences.
        """
        if (self.path / "recipe.json").exists():
            differences = _differences(to_dict(self.recipe()), to_dict(recipe))
            trained = self.metrics() or any(
                (self.path / name).exists() for name in ("last", "last.previous", "teacher")
            )
            if differences and trained:
                listed = "\n  ".join(differences)
                raise ValueError(f"{self.path} holds a run of another recipe; choose another --out:\n  {listed}")
            if differences:
                (self.path / "data.json").unlink(missing_ok=True)
                self.write("recipe.json", to_dict(recipe))
        elif self.path.is_dir() and any(not name.startswith(".") for name in os.listdir(self.path)):
            raise ValueError(f"{self.path} is not empty and not a run folder; choose another --out")
        else:
            self.write("recipe.json", to_dict(recipe))
        if self.read("env.json") is None:
            self.write("env.json", environment(world_size))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps a second training out of the folder until this process ends or leaves the context.

        Raises:
            ValueError: another process trains in this folder.
        """
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        lock = self.path / ".lock"
        self.path.mkdir(parents=True, exist_ok=True)
        with open(lock, "w") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process alone, not of its workers
            except BlockingIOError as error:
                text = f"another process trains in {self.path}: wait for it, or choose another --out"
                raise ValueError(text) from error
            try:
                yield
            finally:
                if not (self.path / "recipe.json").exists():  # no run: what is there is somebody else's
                    lock.unlink(missing_ok=True)

    def recipe(self) -> Recipe:
        """The recipe of this run.

        Raises:
            ValueError: there is no run here.
        """
        if (content := self.read("recipe.json")) is None:
            raise ValueError(f"{self.path} is not a run folder: it has no recipe.json")
        return reset_unused(from_dict(upgrade(content)))  # earlier versions kept settings without effect

    def is_trained(self) -> bool:
        """Whether all its epochs are done; False where nothing has begun."""
        if self.read("recipe.json") is None:
            return False
        epochs = [line["epoch"] + 1 for line in self.metrics() if line["kind"] == "epoch"]
        return max(epochs, default=0) >= self.recipe().optim.epochs or _manifest(self.path / "last").get(
            "finished", False
        )

    def best(self) -> Path:
        """The folder of the best model so far.

        Raises:
            ValueError: there is no run here, or it has trained nothing yet.
        """
        self.recipe()
        best = recover(self.path / "best")
        if not (best / "config.json").is_file():
            raise ValueError(f"{self.path} has no best/ yet: train it first")
        return best

    def read(self, name: str) -> dict[str, Any] | None:
        """The content of a JSON file of this run, or None when it is not there yet.

        Raises:
            ValueError: the file is damaged: no JSON, or no object.
        """
        file = self.path / name
        try:
            content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        except ValueError as error:
            raise ValueError(f"{file} is damaged, it is not JSON: {error}; restore it") from error
        if content is not None and not isinstance(content, dict):
            raise ValueError(f"{file} is damaged, it holds {type(content).__name__} instead of an object; restore it")
        return content

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Replaces a JSON file of this run."""
        write_text(self.path / name, json.dumps(content, indent=2))

    def log(self, line: dict[str, Any]) -> None:
        """Appends a line to the metrics; numbers that are not finite become null."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(
                json.dumps({name: _finite_or_none(value) for name, value in line.items()}, allow_nan=False) + "\n"
            )

    def metrics(self) -> list[dict[str, Any]]:
        """The metrics so far, without a last line that a kill cut short; damaged lines are named and left out."""
        lines = [line for _, line in self._read_metrics()]
        if damaged := [number + 1 for number, line in enumerate(lines[:-1]) if line is None]:
            _warn_once(
                f"{self.path / 'metrics.jsonl'} is damaged in line {', '.join(map(str, damaged))}, left out here"
            )
        return [line for line in lines if line is not None]

    def _read_metrics(self) -> list[tuple[bytes, dict[str, Any] | None]]:
        """Each line as it stands in the file, and its content, None where it is damaged."""
        file = self.path / "metrics.jsonl"
        raw_lines = file.read_bytes().splitlines(keepends=True) if file.is_file() else []
        return [(raw, _metrics_line(raw)) for raw in raw_lines]

    def cut_metrics(self, step: int) -> None:
        """Drops the lines after `step`, which a resume is about to write again, and leaves all others as they are."""
        lines = self._read_metrics()
        kept = [number for number, (_, line) in enumerate(lines) if line is not None and line["step"] <= step]
        last = kept[-1] if kept else -1
        content = b"".join(
            raw for number, (raw, line) in enumerate(lines) if number in set(kept) or (line is None and number < last)
        )
        if content != b"".join(raw for raw, _ in lines):
            with replace_file(self.path / "metrics.jsonl") as beside:
                beside.write_bytes(content)

    def save_state(self, state: dict[str, Any], finished: bool = False) -> None:
        """Replaces last/ by `state`, once the metrics are on the disk; the one before stays as last.previous/."""
        if (metrics := self.path / "metrics.jsonl").is_file():
            flush(metrics)
        with replace_folder(self.path / "last", keep_previous=True) as folder:
            torch.save(state, folder / "state.pt")
            manifest = {"state.pt": _sha256(folder / "state.pt"), "finished": finished}
            (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")

    def load_state(self) -> dict[str, Any] | None:
        """The newest state that is whole and finite, or None when nothing was saved yet.

        Raises:
            ValueError: states were saved but none of them is of use.
        """
        folders = [recover(self.path / "last"), previous(self.path / "last")]
        for folder in folders:
            if not folder.exists():
                continue
            try:
                if _manifest(folder).get("state.pt") != _sha256(folder / "state.pt"):
                    raise ValueError("its checksum is another")
                state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
                if not _is_finite(state["model"]) or not _is_finite(state.get("ema", {})):
                    raise ValueError("its weights are not finite")
                return state
            except Exception as error:  # a damaged file can make the readers raise almost anything
                reason = str(error).splitlines()[0] if isinstance(error, ValueError | OSError) else type(error).__name__
                logger.warning("%s cannot be used (%s); falling back to the state before it", folder, reason)
        if any(folder.exists() for folder in folders):
            raise ValueError(f"no saved state in {self.path} can be used; start anew with another --out")
        return None


def _metrics_line(raw: bytes) -> dict[str, Any] | None:
    """A line of the metrics, or None where it is damaged or incomplete."""
    try:
        line = json.loads(raw) if raw.endswith(b"\n") else None
    except ValueError:
        return None
    is_line = isinstance(line, dict) and isinstance(line.get("step"), int) and line.get("kind") in ("step", "epoch")
    return line if is_line else None


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not isfinite(value) else value


def _is_finite(state: dict[str, Any]) -> bool:
    return all(
        bool(t.isfinite().all()) for t in state.values() if isinstance(t, torch.Tensor) and t.is_floating_point()
    )


def _manifest(folder: Path) -> dict[str, Any]:
    """What was written beside a state; empty where it is damaged or not there."""
    try:
        content = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def environment(world_size: int) -> dict[str, Any]:
    """Date, versions and machine, for the record."""
    cuda = torch.cuda.is_available()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "riformer": __version__,
        "python": sys.version.split()[0],
        **{name: version(name) for name in ("torch", "torchvision", "timm")},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if cuda else cpu_name(),
        "num_threads": torch.get_num_threads(),
        "world_size": world_size,
    }


def cpu_name() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """The knobs that differ, as `section.knob: old, now new`."""
    lines = []
    for name in old.keys() | new.keys():
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += _differences(before, after, f"{prefix}{name}.")
        elif json.dumps(before) != json.dumps(after):
            lines.append(f"{prefix}{name}: {before!r} there, {after!r} now")
    return sorted(lines)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
