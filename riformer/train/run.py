"""The run folder: all that is needed to repeat, resume, evaluate and use one training.

- recipe.json: the resolved configuration; `riformer train --config` reads it
- env.json: versions, machine and date
- data.json: class names, the split and skipped images
- inputs.json: checksums of the teachers and of the weights to start from
- metrics.jsonl: a line for each optimiser step and each epoch
- best/: the best model so far: config.json and model.safetensors, in the Hub's layout
- last/: the state to resume from, with its checksum; last.previous/ is the state before it
- teacher_outputs/: teacher outputs that later epochs read; not needed once the run is finished
- teacher/: the run of its own teacher, where it trained one
- evaluation.json: accuracy, parity and speed of the finished model
- .lock: held by the process that trains here
"""

import hashlib
import json
import logging
import os
import pickle
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite, nan
from pathlib import Path
from typing import Any

import torch

from riformer.atomic import flush, previous, recover, replace_file, replace_folder, write_errors, write_text
from riformer.config import MOVABLE, Recipe, from_dict, reset_unused, to_dict, upgrade
from riformer.machine import environment

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

REPAIR = {  # what to do about a damaged file; the others are written again
    "recipe.json": "restore it from a copy, or train into another --out",
    "data.json": "the class names and the split are in it; restore it from a copy, or train into another --out",
    "inputs.json": "the checksums of the teachers are in it; restore it from a copy, or train into another --out",
    "evaluation.json": "delete it and run `riformer eval` on the run",
}


class Run:
    """One run folder. Only the main process of a distributed run writes to it."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def begin(self, recipe: Recipe, world_size: int, moving: bool = False) -> None:
        """Writes the recipe and the environment into a new folder, or checks that an existing run has this recipe.

        A run that has not come as far as training anything makes way for one of another recipe. With `moving`, the
        knobs in `MOVABLE` may differ.

        Raises:
            ValueError: the folder holds other files, or a run of another recipe; the message names the differences.
        """
        if (self.path / "recipe.json").exists():
            differences = _differences(to_dict(self.recipe()), to_dict(recipe))
            if moving:
                differences = [line for line in differences if line.partition(":")[0] not in MOVABLE]
            trained = self.metrics() or any(
                (self.path / name).exists() for name in ("last", "last.previous", "teacher")
            )
            if differences and trained:
                listed = "\n  ".join(differences)
                raise ValueError(f"{self.path} holds a run of another recipe; choose another --out:\n  {listed}")
            if differences:
                for name in ("data.json", "inputs.json"):
                    (self.path / name).unlink(missing_ok=True)
                self.write("recipe.json", to_dict(recipe))
        elif self.path.is_dir() and any(not name.startswith(".") for name in os.listdir(self.path)):
            raise ValueError(f"{self.path} is not empty and not a run folder; choose another --out")
        else:
            self.write("recipe.json", to_dict(recipe))
        if self.read("env.json") is None:
            self.write("env.json", environment(world_size))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps a second training out of the folder. The lock ends with this process, even if it is killed.

        Raises:
            ValueError: another process trains in this folder.
        """
        if fcntl is None:
            yield
            return
        lock = self.path / ".lock"
        with write_errors(lock):
            self.path.mkdir(parents=True, exist_ok=True)
            file = open(lock, "w")  # noqa: SIM115
        with file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held by this process alone, not by its workers
            except BlockingIOError as error:
                text = f"another process trains in {self.path}: wait for it, or choose another --out"
                raise ValueError(text) from error
            try:
                yield
            finally:
                if not (self.path / "recipe.json").exists():  # no run has begun here: leave the folder as it was
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
        """Whether all its epochs are done; False where nothing has begun.

        The newest saved state says so. A run whose states were deleted, or saved by version 0.1, is judged by its
        metrics.
        """
        if self.read("recipe.json") is None:
            return False
        for folder in self._states():
            manifest = _manifest(folder)
            if "finished" in manifest:
                return bool(manifest["finished"])
        last_epoch = self.recipe().optim.epochs - 1
        return any(line["kind"] == "epoch" and line["epoch"] >= last_epoch for line in self.metrics())

    def best(self) -> Path:
        """The folder of the best model so far.

        Raises:
            ValueError: there is no run here, or it has trained nothing yet.
        """
        self.recipe()
        best = self.path / "best"
        for folder in (recover(best), previous(best)):  # the latter after a kill of version 0.1
            if (folder / "config.json").is_file():
                return folder
        raise ValueError(f"{self.path} has no best/ yet: train it first")

    def read(self, name: str) -> dict[str, Any] | None:
        """The content of a JSON file of this run, or None when it is not there yet.

        Raises:
            ValueError: the file is damaged; the message says what to do.
        """
        file = self.path / name
        if not file.is_file():
            return None
        repair = REPAIR.get(name, "delete it: it is written again")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not JSON ({error}): it is damaged; {repair}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{file} holds no JSON object: it is damaged; {repair}")
        return content

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Replaces a JSON file of this run."""
        write_text(self.path / name, json.dumps(content, indent=2))

    def log(self, line: dict[str, Any]) -> None:
        """Appends a line, with its checksum, to the metrics; numbers that are not finite are written as null.

        Raises:
            OSError: it cannot be written, or the run folder is gone.
        """
        line = {
            name: None if isinstance(value, float) and not isfinite(value) else value for name, value in line.items()
        }
        text = json.dumps({**line, "crc32": _crc32(line)}, allow_nan=False)
        file = self.path / "metrics.jsonl"
        if not self.path.is_dir():
            raise FileNotFoundError(f"the run folder {self.path} is gone: it was deleted or moved during the training")
        with write_errors(file), open(file, "a", encoding="utf-8") as lines:
            lines.write(text + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The metrics so far; what is null in the file is NaN here.

        Damaged lines are left out, with a warning that names them; a last line that a kill left half-written is not
        mentioned.
        """
        lines, damaged = self.read_metrics()
        if damaged:
            file, numbers = self.path / "metrics.jsonl", ", ".join(map(str, damaged))
            logger.warning("%s: damaged lines are left out: %s", file, numbers)
        return lines

    def read_metrics(self) -> tuple[list[dict[str, Any]], list[int]]:
        """The metrics so far, and the numbers, from 1, of the lines that are damaged."""
        texts = self._metrics_texts()
        parsed = [_parsed(text) for text in texts]
        damaged = [i for i, line in enumerate(parsed, 1) if line is None and texts[i - 1].endswith(b"\n")]
        return [line for line in parsed if line is not None], damaged

    def cut_metrics(self, step: int) -> None:
        """Drops the lines after `step`, which a resume is about to write again, and a last line that is half-written.

        All lines before stay as they are, byte for byte. Nothing is dropped from a finished run. Where lines before are
        lost, a warning says so: they were on the disk before the state of `step` was.
        """
        texts = self._metrics_texts()
        lines = [_parsed(text) for text in texts]
        last = max((line["step"] for line in lines if line), default=0)
        if last < step:
            file = self.path / "metrics.jsonl"
            logger.warning("%s ends at step %d, but the saved state is of step %d: lines were lost", file, last, step)
        if self.is_trained():
            return
        kept: list[bytes] = []
        for text, line in zip(texts, lines, strict=True):
            if line and line["step"] > step:
                break
            if line or text.endswith(b"\n"):
                kept.append(text.removesuffix(b"\n") + b"\n")
        if kept != texts:
            with replace_file(self.path / "metrics.jsonl") as new:
                new.write_bytes(b"".join(kept))

    def _metrics_texts(self) -> list[bytes]:
        """The lines of metrics.jsonl, with their ends."""
        file = self.path / "metrics.jsonl"
        return [text for text in re.findall(rb"[^\n]*\n?", file.read_bytes()) if text] if file.is_file() else []

    def save_state(self, state: dict[str, Any], finished: bool = False) -> None:
        """Replaces last/ by `state`; the state before becomes last.previous/.

        The metrics are on the disk first, so that not even after a power failure a state is ahead of them.

        Args:
            state: what a resume needs, with the weights as `model` and those of a moving average as `ema`.
            finished: whether this is the state after the last step.
        """
        if (metrics := self.path / "metrics.jsonl").exists():
            flush(metrics)
        with replace_folder(self.path / "last", keep_previous=True) as folder:
            torch.save(state, folder / "state.pt")
            manifest = {"state.pt": _sha256(folder / "state.pt"), "finished": finished}
            (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")

    def load_state(self) -> dict[str, Any] | None:
        """The newest state that is whole and finite, or None when nothing was saved yet.

        Raises:
            ValueError: states were saved but none of them can be used; warnings say why.
        """
        states = self._states()
        for folder in states:
            try:
                return _read_state(folder)
            except Exception as error:  # torch.load can raise almost anything for a damaged file
                is_pickle = isinstance(error, pickle.UnpicklingError)  # its text advises to read the file all the same
                reason = "state.pt cannot be unpickled" if is_pickle else str(error).partition("\n")[0]
                logger.warning("%s cannot be used (%s); falling back to the state before it", folder, reason)
        if states:
            raise ValueError(f"no saved state in {self.path} can be used; start anew with another --out")
        return None

    def _states(self) -> list[Path]:
        """The folders of the saved states, the newest first."""
        last = self.path / "last"
        return [folder for folder in (recover(last), previous(last)) if folder.exists()]


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


def _read_state(folder: Path) -> dict[str, Any]:
    """The state in a folder of `save_state`; raises if anything is wrong with it."""
    if not (expected := _manifest(folder).get("state.pt")):
        raise ValueError("its manifest.json is missing or damaged")
    if expected != _sha256(folder / "state.pt"):
        raise ValueError("its checksum differs")
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    tensors = [*state["model"].values(), *state.get("ema", {}).values()]
    if not all(t.isfinite().all() for t in tensors if t.is_floating_point()):
        raise ValueError("its weights are not finite")
    return state


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a saved state; empty if it cannot be read."""
    try:
        content = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _crc32(line: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(line).encode())


def _parsed(text: bytes) -> dict[str, Any] | None:
    """A line of the metrics; None if it is damaged. Lines of version 0.1 have no checksum."""
    try:
        line = json.loads(text)
        if "crc32" in line and line.pop("crc32") != _crc32(line):
            return None
        is_known = line["kind"] in ("step", "epoch")
        if not (is_known and isinstance(line[line["kind"]], int) and isinstance(line["step"], int)):
            return None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return {name: nan if value is None else value for name, value in line.items()}
