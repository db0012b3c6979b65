"""Checkpoint files: read without executing anything, checked for damage, and the checksums that find it."""

import hashlib
import json
import logging
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from riformer.model.keys import EMA_NAMES, PLAIN_NAMES, choose_weights

logger = logging.getLogger(__name__)

CONFIG_KEY = "riformer"  # in a safetensors file's metadata: the text of config.json, where no folder has one
WEIGHTS_SUM, CONFIG_SUM = "riformer.weights_sha256", "riformer.config_sha256"


class Checkpoint(NamedTuple):
    """What a file holds: tensors, keys as in the file; and what it says about them, where it says anything.

    Attributes:
        state: the chosen state dict.
        config: the text of config.json in a safetensors file that `save` wrote.
        config_sum: SHA-256 of that text, or of the config.json beside the file.
        label_names: names of the classes.
    """

    state: dict[str, Tensor]
    config: str | None = None
    config_sum: str | None = None
    label_names: tuple[str, ...] | None = None


def read_checkpoint(path: str | Path, use_ema: bool = True) -> dict[str, Tensor]:
    """The state dict in a checkpoint file; arguments and errors as for `read_file`."""
    return read_file(path, use_ema).state


def read_file(path: str | Path, use_ema: bool = True, verify: bool = True) -> Checkpoint:
    """What a `.safetensors` file or a PyTorch checkpoint holds.

    PyTorch files are read with `weights_only=True`. Foreign Python objects beside the tensors (training logs and the
    like) are replaced by inert placeholders: nothing in the file is imported or executed. Files from before PyTorch 1.6
    (no zip archives) are read only if they hold no foreign objects.

    Choice: of several weights in one file the EMA weights are read, as by timm, and a log line says so.

    Args:
        path: the file.
        use_ema: False reads the plain weights of a file that also has EMA weights.
        verify: False reads a file of this package whose checksum differs.

    Raises:
        ValueError: the file is missing, is no checkpoint, holds no state dict, is damaged, or has weights that are not
            finite.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no checkpoint file at {path}")
    read = _read_safetensors if path.suffix.lower() == ".safetensors" else _read_torch
    try:
        content, metadata = read(path)
    except Exception as error:  # a damaged or hostile file can make the readers raise almost anything
        reason = _blocked(error) if isinstance(error, pickle.UnpicklingError) else str(error)
        raise ValueError(shorten(f"{path} is not a checkpoint that can be read safely: {reason}")) from error
    state, name, others = choose_weights(content, use_ema)
    entries = state.items() if isinstance(state, Mapping) else ()
    if not entries or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in entries):
        there = f"it has only {' and '.join(others)}, and use_ema is False" if others else _named_dicts(content)
        raise ValueError(
            f"{path} holds no state dict: neither a plain dict of tensors nor one named {', '.join(PLAIN_NAMES)}, or "
            f"{', '.join(EMA_NAMES)}; {there}"
        )
    if others:
        logger.warning("%s: read the weights named %s, not %s", path, name, " and ".join(others))
    if verify:
        _check_sums(path, metadata, state)
    _check_types(path, state)
    _check_finite(path, state)
    names = _label_names(content) if name else None
    return Checkpoint(dict(state), metadata.get(CONFIG_KEY), metadata.get(CONFIG_SUM), names)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    return load_file(path), metadata


def _read_torch(path: Path) -> tuple[Any, dict[str, str]]:
    with torch.serialization.safe_globals([(_Inert, name) for name in _foreign_globals(path)]):
        return torch.load(path, map_location="cpu", weights_only=True), {}


class _Inert:
    """Replaces every foreign class of a checkpoint; accepts any arguments and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _foreign_globals(path: Path) -> list[str]:
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except ValueError:  # a file of the time before zip archives: torch.load then refuses every foreign class
        return []


def _blocked(error: pickle.UnpicklingError) -> str:
    """Why torch refused a pickle, without its advice to read the file unsafely."""
    names = re.findall(r"GLOBAL (\S+)", str(error))
    return f"it would run {names[0]}" if names else "it holds more than tensors and plain data"


def _label_names(content: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Class names that a foreign checkpoint carries: those of mmpretrain's `meta`, or under a usual name."""
    meta = content.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    dataset = meta.get("dataset_meta")
    for place in (dataset if isinstance(dataset, Mapping) else {}, meta, content):
        for key in ("classes", "CLASSES", "class_names", "label_names", "class_to_idx"):
            names = place.get(key)
            if isinstance(names, Mapping) and sorted(map(str, names.values())) == sorted(map(str, range(len(names)))):
                names = sorted(names, key=lambda name: int(names[name]))
            if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
                return tuple(names)
    return None


def checksums(tensors: Mapping[str, Tensor], config: str) -> dict[str, str]:
    """SHA-256 of the tensors (names, types, shapes, values) and of the text of config.json, as metadata of a file."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        digest.update(json.dumps([key, str(tensor.dtype), tuple(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return {WEIGHTS_SUM: digest.hexdigest(), CONFIG_SUM: text_sum(config)}


def text_sum(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def _check_sums(path: Path, metadata: Mapping[str, str], state: Mapping[str, Tensor]) -> None:
    """Compares checksums. Files without any pass: those of others, and those that older versions wrote."""
    if not metadata.keys() & {WEIGHTS_SUM, CONFIG_SUM}:
        return
    expected = checksums(state, metadata.get(CONFIG_KEY, ""))
    if CONFIG_KEY not in metadata and CONFIG_SUM in metadata:  # the sum of a config.json, compared where that is read
        expected[CONFIG_SUM] = metadata[CONFIG_SUM]
    if {key: value for key, value in metadata.items() if key != CONFIG_KEY} != expected:
        raise ValueError(f"{path} is damaged: its content does not have the checksum that it was written with")


def _named_dicts(content: Any) -> str:
    """What a file without a usual state dict has, for a message."""
    if isinstance(content, _Inert):
        return "it holds a whole module: save its state_dict() instead"
    dicts = content.items() if isinstance(content, Mapping) else ()
    named = [str(name) for name, value in dicts if isinstance(value, Mapping) and value]
    return f"it has {', '.join(named[:10])}: save the one to read by itself" if named else "it has no dicts"


def _check_types(path: Path, state: Mapping[str, Tensor]) -> None:
    for key, value in state.items():
        kind = {
            "sparse": value.layout != torch.strided,
            "quantised": value.is_quantized,
            "complex": value.is_complex(),
            "without values": value.is_meta,
        }
        if found := [name for name, is_so in kind.items() if is_so]:
            raise ValueError(f"{path}: {key} is {found[0]} ({value.dtype}); the weights must be dense real numbers")


def _check_finite(path: Path, state: Mapping[str, Tensor]) -> None:
    floats = {key: value for key, value in state.items() if value.is_floating_point()}
    floats = {key: value if value.itemsize > 1 else value.float() for key, value in floats.items()}
    bad = [key for key, value in floats.items() if not value.isfinite().all()]
    if bad:
        raise ValueError(
            f"{path} has {len(bad)} tensors with values that are not finite (NaN or infinity), such as {bad[0]}"
        )


def shorten(text: str, limit: int = 30_000) -> str:
    """The text, or its beginning where it is longer than `limit` characters."""
    return text if len(text) <= limit else f"{text[:limit]} ... ({len(text)} characters)"
