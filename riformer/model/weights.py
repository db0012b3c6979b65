"""Weights in and out: strict loading, and this package's own files and folders.

A saved file or folder describes the model it holds, and has checksums that every load compares.
"""

import logging
from collections.abc import Mapping
from difflib import get_close_matches
from functools import reduce
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from riformer.atomic import recover, replace_file, replace_folder
from riformer.model.checkpoint import CONFIG_KEY, Checkpoint, checksums, read_file, shorten, text_sum
from riformer.model.checkpoint import read_checkpoint as read_checkpoint
from riformer.model.description import MAX_CHARACTERS, Description, check_size, config_text, read_description
from riformer.model.keys import to_timm_keys
from riformer.model.variants import identify

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"  # the Hub's file names, which timm expects
MAX_DIFFERENCES = 200  # named in one message
logger = logging.getLogger(__name__)


def load_strict(model: nn.Module, state: Mapping[str, Tensor], source: str = "checkpoint") -> None:
    """Loads every tensor or none.

    Raises:
        ValueError: keys or shapes differ; the message names each.
    """
    check_fit(model, state, source)
    model.load_state_dict(state)


def check_fit(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Compares keys and shapes; the model may be on the meta device.

    Raises:
        ValueError: keys or shapes differ; the message names each.
    """
    own = model.state_dict()
    differences = [
        f"shape of {key}: {tuple(state[key].shape)}, in the model {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    differences += [
        f"type of {key}: {state[key].dtype}, in the model {own[key].dtype}"
        for key in own
        if key in state and own[key].is_floating_point() and not state[key].is_floating_point()
    ]
    differences += [f"missing: {key} {tuple(own[key].shape)}" for key in own if key not in state]
    differences += [f"unexpected: {key} {tuple(state[key].shape)}" for key in state if key not in own]
    if len(differences) > MAX_DIFFERENCES:
        differences[MAX_DIFFERENCES:] = [f"and {len(differences) - MAX_DIFFERENCES} more"]
    if differences:
        listed = "\n  ".join(differences)
        raise ValueError(shorten(f"{source} does not fit {type(model).__name__}; nothing was loaded:\n  {listed}"))


def save(model: nn.Module, path: str | Path) -> Path:
    """Writes weights, architecture, preprocessing and class names, to a `.safetensors` file or to a folder.

    A folder is written by `save_pretrained`. An existing file is replaced, at once and whole.

    Raises:
        ValueError: the model was not built by `timm.create_model`, which records name and arguments on it, or is
            wrapped; or `path` is a folder with other things in it, or a file of another kind.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        return save_pretrained(model, path)
    config, tensors = config_text(model), _tensors(model)
    with replace_file(path) as beside:
        _write(tensors, beside, {CONFIG_KEY: config, **checksums(tensors, config)})
    return path


def save_pretrained(model: nn.Module, folder: str | Path, card: str = "") -> Path:
    """Writes weights, architecture, preprocessing and class names to a folder in the Hub's layout; returns its path.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` reads it too. An existing model folder is replaced, at once
    and whole, its card included.

    Args:
        model: in any form, built by `timm.create_model`.
        folder: new, empty, or a model folder.
        card: the text of README.md; none is written when empty.

    Raises:
        ValueError: the model was not built by `timm.create_model` or is wrapped; or `folder` has other things in it, or
            is named like a file.
    """
    folder = Path(folder)
    config, tensors = config_text(model), _tensors(model)
    if folder.suffix in (".bin", ".ckpt", ".pt", ".pth", ".safetensors"):
        raise ValueError(f"{folder}: weights are written as .safetensors by save, or into a folder")
    if folder.is_file() or (folder.is_dir() and _others(folder)):
        raise ValueError(f"{folder} exists and is no model folder: save would replace it with all its content")
    with replace_folder(folder) as beside:
        (beside / CONFIG).write_text(config, encoding="utf-8")
        _write(tensors, beside / WEIGHTS, checksums(tensors, config))
        if card:
            (beside / CARD).write_text(card, encoding="utf-8")
    return folder


def _others(folder: Path) -> list[str]:
    """What a save would delete: a README.md without a model, a .git, every other file that is not hidden."""
    written = {CONFIG, WEIGHTS, CARD} if (folder / CONFIG).is_file() else {CONFIG, WEIGHTS}
    names = {file.name for file in folder.iterdir()} - written
    return [name for name in names if name == ".git" or not name.startswith(".")]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as safetensors accepts it: contiguous, and without shared memory."""
    tensors, seen = {}, set()
    for key, tensor in model.state_dict().items():
        shared = tensor.untyped_storage().data_ptr() in seen
        seen.add(tensor.untyped_storage().data_ptr())
        tensors[key] = tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
    return tensors


def _write(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Writes a safetensors file with the permissions of any other new file; safetensors gives it to its owner alone."""
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata=metadata)
    path.chmod(mode)


def load(path: str | Path, form: str = "", use_ema: bool = True, verify: bool = True) -> nn.Module:
    """The model in a run folder (its best), a folder or file written by `save`, or a foreign checkpoint; in eval mode.

    Choice: nothing is lost, so float64 weights give a float64 model; half precision is widened to float32.

    Args:
        path: the folder or file.
        form: what a checkpoint that does not say it holds: "deploy", "poolformer", "timm-poolformer" or "deleted",
            which have the same keys.
        use_ema: False takes the plain weights of a checkpoint that also has EMA weights.
        verify: False reads what differs from the checksum that it was written with, such as an edited config.json.

    Raises:
        ValueError: nothing there can be read, it is damaged, does not fit the architecture that it names, or may be
            several networks.
    """
    return _load(Path(path), None, form, use_ema, verify)


def convert(
    source: str | Path,
    destination: str | Path,
    model_name: str | None = None,
    form: str = "",
    use_ema: bool = True,
    verify: bool = True,
) -> Path:
    """Reads any checkpoint that `load` reads and writes it with `save`; weights keep `load`'s precision.

    Args:
        source: the checkpoint.
        destination: a `.safetensors` file or a folder, as for `save`.
        model_name: the architecture it has to be; otherwise recognised by its keys and shapes.
        form: as for `load`.
        use_ema: as for `load`.
        verify: as for `load`.

    Raises:
        ValueError: the source cannot be read or does not fit; nothing is written then.
    """
    return save(_load(Path(source), model_name, form, use_ema, verify), destination)


def _load(
    path: Path, model_name: str | None = None, form: str = "", use_ema: bool = True, verify: bool = True
) -> nn.Module:
    path = recover(path)
    if (best := recover(path / "best")).is_dir():
        path = best
    elif (path / "recipe.json").is_file():
        raise ValueError(f"{path} has no best/ yet: train it first")
    config_file = path / CONFIG
    if path.is_dir() and not config_file.is_file():
        raise ValueError(f"{path} is neither a run folder nor a model folder: it has no best/ and no {CONFIG}")
    file = read_file(_weights_file(path) if path.is_dir() else path, use_ema, verify)
    try:
        text = _read_text(config_file) if path.is_dir() else file.config
        state, description = _described(file, text, form)
        name = model_name or description.name
        model = _built(name, description, state)
        if verify and text is not None and file.config_sum not in (None, text_sum(text)):
            raise ValueError(
                f"{CONFIG} is not what was written with the weights beside it: it is damaged or was edited. To read it "
                f"as it is, load with verify=False; `riformer convert OLD NEW --unverified` writes it anew"
            )
    except ValueError as error:
        raise ValueError(shorten(f"{path}: {error}")) from error
    model.pretrained_cfg.update(description.more)
    if file.label_names and len(file.label_names) == model.num_classes:
        model.pretrained_cfg.update(label_names=file.label_names)
    elif file.label_names:
        logger.warning("%s: left out its %d names of %d classes", path, len(file.label_names), model.num_classes)
    return model.eval()


def _weights_file(folder: Path) -> Path:
    """The folder's weights: safetensors, or else the older name that timm and the Hub know."""
    older = folder / "pytorch_model.bin"
    return older if older.is_file() and not (folder / WEIGHTS).is_file() else folder / WEIGHTS


def _read_text(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return file.read(MAX_CHARACTERS + 1)


def _described(file: Checkpoint, text: str | None, form: str) -> tuple[dict[str, Tensor], Description]:
    """The state dict under this package's keys, and what the model is: by its config.json or else by the keys."""
    if text is None:
        name, args = identify(file.state, form)
        return to_timm_keys(file.state), Description(name, args, {}, {})
    if form:
        raise ValueError(f"form is {form!r}, but this model says itself which form it has")
    return file.state, read_description(text)


def _built(name: str, description: Description, state: Mapping[str, Tensor]) -> nn.Module:
    """The network with its weights. Keys and shapes are compared on the meta device first, which takes no memory."""
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models()) or timm.list_models("riformer_*")
        raise ValueError(f"model {name!r} is unknown; did you mean one of {near}?")
    check_size(description.args, state)

    def build() -> nn.Module:
        try:
            return timm.create_model(name, pretrained_cfg=description.pretrained_cfg or None, **description.args)
        except Exception as error:  # arguments from a file can make a constructor raise anything
            args = shorten(str(description.args), 300)
            raise ValueError(f"{name} cannot be built with {args}: {shorten(str(error), 300)}") from error

    with torch.device("meta"):
        model = build()
    check_fit(model, state, "what it holds")
    names = model.pretrained_cfg.get("label_names") or ()
    if model.num_classes and names and len(names) != model.num_classes:
        raise ValueError(f"label_names has {len(names)} names for {model.num_classes} classes")
    model = build()
    model.to(reduce(torch.promote_types, (tensor.dtype for tensor in state.values()), torch.float32))
    load_strict(model, state)
    return model
