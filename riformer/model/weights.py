"""Weights in and out: key maps of other projects, strict loading, safetensors, the start from a teacher.

The state dict has timm's keys (`stem.conv`, `stages.i.blocks.j.*`, `head.*`), that of a GFNet its authors'. Read are
mmpretrain's RIFormer (training and deploy form) and PoolFormer, the PoolFormer and the GFNet-H of their authors, timm's
PoolFormer, and what this module wrote.
"""

import json
import re
from collections.abc import Mapping
from difflib import get_close_matches
from functools import reduce
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models._hub import _parse_model_cfg, save_config_for_hf
from torch import Tensor, nn

from riformer.atomic import replace_file, replace_folder
from riformer.model.gfnet import resample_state
from riformer.model.metaformer import MetaFormer

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"  # the Hub's file names, which timm expects

_KEY_RULES: list[tuple[str, Any]] = [  # pattern, replacement (a string or a function of the match)
    (r"^backbone\.", ""),
    (r"^patch_embed\.proj\.", "stem.conv."),
    (r"^network\.([135])\.proj\.", lambda m: f"stages.{(int(m[1]) + 1) // 2}.downsample.conv."),
    (r"^network\.([0246])\.(\d+)\.", lambda m: f"stages.{int(m[1]) // 2}.blocks.{m[2]}."),
    (r"\.norm_reparam\.", ".norm1."),
    (r"\.token_mixer\.affine\.", ".token_mixer."),
    (r"\.layer_scale_([12])$", r".layer_scale\1.scale"),
    (r"^norm6?\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]


def to_timm_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under timm's keys, from any of the layouts that this module reads.

    GFNet's keys stay the authors'.

    Shape: mmpretrain's affine weights [C, 1, 1, 1] become [C]; all others stay.

    Raises:
        ValueError: two keys would get one name.
    """
    if _is_gfnet(state):
        return dict(state)
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        key = name
        for pattern, replacement in _KEY_RULES:
            key = re.sub(pattern, replacement, key)
        is_affine = key.endswith("token_mixer.weight") and tensor.shape[1:] == (1, 1, 1)
        if key in renamed:
            raise ValueError(f"{name!r} and an earlier key of the checkpoint both mean {key!r}")
        renamed[key] = tensor.flatten() if is_affine else tensor
    return renamed


def _is_gfnet(state: Mapping[str, Tensor]) -> bool:
    return any(key.endswith(".filter.complex_weight") for key in state)


def fit_state(file: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint gives `model`: keys of a MetaFormer renamed, filters and GFNet's positions on its grid."""
    for name in ("state_dict", "model"):
        file = file.get(name, file)
    return resample_state(to_timm_keys(file) if isinstance(model, MetaFormer) else file, model)


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a `.safetensors` file or a PyTorch checkpoint, keys as they are in the file.

    PyTorch files are read with `weights_only=True`. Foreign Python objects beside the tensors (training logs and the
    like) are replaced by inert placeholders: nothing in the file is imported or executed. Files from before PyTorch 1.6
    (no zip archives) are read only if they hold no foreign objects.

    Raises:
        ValueError: the file is missing, is no checkpoint, or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no checkpoint file at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([(_Inert, name) for name in _foreign_globals(path)]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file can make the readers raise almost anything
        raise ValueError(f"{path} is not a checkpoint that can be read safely: {error}") from error
    for name in ("state_dict", "model"):
        content = content.get(name, content) if isinstance(content, dict) else content
    entries = content.items() if isinstance(content, dict) else ()
    if not entries or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in entries):
        raise ValueError(f"{path} holds no state dict (looked for 'state_dict', 'model' and a plain dict of tensors)")
    return dict(entries)


class _Inert:
    """Stands in for every foreign class of a checkpoint; takes anything and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _foreign_globals(path: Path) -> list[str]:
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except ValueError:  # a file of the time before zip archives: torch.load then refuses every foreign class
        return []


def identify(state: Mapping[str, Tensor]) -> tuple[str, dict]:
    """timm's model name and the arguments that differ from its defaults, told from a checkpoint's keys and shapes.

    A checkpoint without mixer weights is a deploy form if it has mmpretrain's `norm_reparam`, otherwise a PoolFormer.

    Raises:
        ValueError: the sizes are those of no variant, or the mixers have weights of an unknown kind.
    """
    from riformer.model.variants import GFNETS, VARIANTS  # which imports this module's key map

    renamed, is_gfnet = to_timm_keys(state), _is_gfnet(state)
    block, variants = ("blocks.{}.{}.", GFNETS) if is_gfnet else ("stages.{}.blocks.{}.", VARIANTS)
    pattern = re.escape(block).replace(r"\{\}", r"(\d+)")
    blocks = {m.groups() for key in renamed if (m := re.match(pattern, key))}
    depths = tuple(sum(stage == str(i) for stage, _ in blocks) for i in range(len({stage for stage, _ in blocks})))
    dims = tuple(_numel(renamed, block.format(i, 0) + "norm2.weight") for i in range(len(depths)))
    sizes = {name: (size["depths"], size["dims"]) for name, size in variants.items()}
    if (depths, dims) not in sizes.values():
        raise ValueError(
            f"no variant has depths {depths} and dims {dims}, which is what keys like {sorted(state)[:3]} say; "
            f"known are {sizes}"
        )
    name = next(name for name, size in sizes.items() if size == (depths, dims))

    mixer_keys = {key.split("token_mixer.")[1] for key in renamed if "token_mixer." in key}
    args: dict[str, Any] = {}
    if is_gfnet:
        height = len(renamed["blocks.0.0.filter.complex_weight"])
        args = {"img_size": (4 * height, 4 * _numel(renamed, "pos_embed") // (dims[0] * height))}
        args = {} if args["img_size"] == (224, 224) else args
    elif not mixer_keys:
        args = {"mixer": "identity" if any(".norm_reparam." in key for key in state) else "pooling"}
    elif mixer_keys != {"weight", "bias"}:
        raise ValueError(f"mixer weights named {sorted(mixer_keys)} belong to no mixer that checkpoints are read for")
    if not is_gfnet and not any("layer_scale" in key for key in renamed):
        args["layer_scale_init"] = 0
    stem = renamed.get("patch_embed.0.proj.weight" if is_gfnet else "stem.conv.weight")
    if stem is not None and stem.ndim == 4 and stem.shape[1] != 3:
        args["in_chans"] = stem.shape[1]
    if (num_classes := _numel(renamed, "head.bias" if is_gfnet else "head.fc.bias")) != 1000:
        args["num_classes"] = num_classes
    return name, args


def _numel(state: Mapping[str, Tensor], key: str) -> int:
    return state[key].numel() if key in state else 0


def load_strict(model: nn.Module, state: Mapping[str, Tensor], source: str = "checkpoint") -> None:
    """Loads every tensor or none.

    Raises:
        ValueError: keys or shapes differ; the message names each.
    """
    own = model.state_dict()
    differences = [
        f"shape of {key}: {tuple(state[key].shape)}, in the model {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    differences += [f"missing: {key} {tuple(own[key].shape)}" for key in own if key not in state]
    differences += [f"unexpected: {key} {tuple(state[key].shape)}" for key in state if key not in own]
    if differences:
        named = "\n  ".join(differences)
        raise ValueError(f"{source} does not fit {type(model).__name__}; nothing was loaded:\n  {named}")
    model.load_state_dict(state)


def start_from(student: nn.Module, teacher_state: Mapping[str, Tensor]) -> None:
    """Gives the student every tensor of its module teacher but the mixers' (the paper's weight initialisation).

    The student's own mixers keep their fresh values, and so does a classifier for another number of classes.

    Raises:
        ValueError: anything else differs between the two.
    """
    mixers = {key: tensor for key, tensor in student.state_dict().items() if ".token_mixer." in key}
    taken = {key: tensor for key, tensor in fit_state(teacher_state, student).items() if ".token_mixer." not in key}
    source = "module teacher, from whose weights the student is to start,"
    load_strict(student, {**taken, **_other_classifier(student, taken), **mixers}, source)


def start_at(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Gives the model the weights that training is to start from: global filters and GFNet's positions resampled.

    A classifier for another number of classes keeps its fresh values.

    Raises:
        ValueError: anything else differs.
    """
    state = fit_state(state, model)
    load_strict(model, {**state, **_other_classifier(model, state)}, source)


def _other_classifier(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's own classifier, where the one in `state` is for another number of classes."""
    named = model.pretrained_cfg["classifier"]
    heads = (named,) if isinstance(named, str) else named
    own = {key: tensor for key, tensor in model.state_dict().items() if key.rpartition(".")[0] in heads}
    return {key: tensor for key, tensor in own.items() if key in state and state[key].shape != tensor.shape}


def save(model: nn.Module, path: str | Path) -> Path:
    """Writes weights, architecture, preprocessing and class names, to a `.safetensors` file or to a folder.

    A folder is written by `save_pretrained`. A file that was there is replaced, at once and whole.

    Raises:
        ValueError: the model was not built by `timm.create_model`, which notes name and arguments on it, or is wrapped;
            or `path` is a folder with other things in it, or a file of another kind.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        return save_pretrained(model, path)
    config, tensors = _contents(model)
    with replace_file(path) as beside:
        save_file(tensors, beside, metadata={"riformer": config})
    return path


def save_pretrained(model: nn.Module, folder: str | Path, card: str = "") -> Path:
    """Writes weights, architecture, preprocessing and class names to a folder in the Hub's layout; returns its path.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` reads it too. A model folder that was there is replaced, at
    once and whole, its card included.

    Args:
        model: in any form, built by `timm.create_model`.
        folder: new, empty, or a model folder.
        card: the text of README.md; none is written when empty.

    Raises:
        ValueError: the model was not built by `timm.create_model` or is wrapped; or `folder` has other things in it, or
            is named like a file.
    """
    folder = Path(folder)
    config, tensors = _contents(model)
    if folder.suffix in (".bin", ".ckpt", ".pt", ".pth", ".safetensors"):
        raise ValueError(f"{folder}: weights are written as .safetensors by save, or into a folder")
    if folder.is_file() or (folder.is_dir() and _others(folder)):
        raise ValueError(f"{folder} exists and is no model folder: save would replace it with all its content")
    with replace_folder(folder) as beside:
        (beside / CONFIG).write_text(config, encoding="utf-8")
        save_file(tensors, beside / WEIGHTS)
        if card:
            (beside / CARD).write_text(card, encoding="utf-8")
    return folder


def _others(folder: Path) -> list[str]:
    """What a save would lose: a README.md without a model, a .git, all that is neither ours nor hidden."""
    ours = {CONFIG, WEIGHTS, CARD} if (folder / CONFIG).is_file() else {CONFIG, WEIGHTS}
    names = {file.name for file in folder.iterdir()} - ours
    return [name for name in names if name == ".git" or not name.startswith(".")]


def _contents(model: nn.Module) -> tuple[str, dict[str, Tensor]]:
    """The text of config.json, and the tensors.

    Raises:
        ValueError: the model was not built by `timm.create_model`, or is wrapped.
    """
    if not hasattr(model, "pretrained_cfg") or hasattr(model, "_orig_mod"):
        raise ValueError(
            f"save takes a model built by timm.create_model, not {type(model).__name__}: unwrap it first "
            f"(.module of DDP and EMA, ._orig_mod of torch.compile)"
        )
    with TemporaryDirectory() as folder:
        save_config_for_hf(model, f"{folder}/{CONFIG}", **hub_config(model))
        config = (Path(folder) / CONFIG).read_text(encoding="utf-8")
    return config, {key: tensor.contiguous() for key, tensor in model.state_dict().items()}


def hub_config(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What timm's functions for the Hub have to be told of a model: its class names and its form."""
    args: dict[str, Any] = {}
    if isinstance(model, MetaFormer):  # fuse and fold change the form that timm noted when it built the model
        args["mixer"] = model.mixers[0] if len(set(model.mixers)) == 1 else model.mixers
        if isinstance(model.get_submodule("stages.0.blocks.0.layer_scale1"), nn.Identity):
            args["layer_scale_init"] = 0
    return {"model_config": {"label_names": model.pretrained_cfg.get("label_names")}, "model_args": args}


def load(path: str | Path) -> nn.Module:
    """The model in a run folder (its best), a folder or file written by `save`, or a foreign checkpoint; in eval mode.

    Choice: nothing is lost, so float64 weights give a float64 model; half precision is widened to float32.

    Raises:
        ValueError: nothing there can be read, or it does not fit the architecture that it names.
    """
    return _load(Path(path))


def convert(source: str | Path, destination: str | Path, model_name: str | None = None) -> Path:
    """Reads any checkpoint that `load` reads and writes it with `save`; weights keep `load`'s precision.

    Args:
        source: the checkpoint.
        destination: a `.safetensors` file or a folder, as for `save`.
        model_name: the architecture it has to be; otherwise told from its keys and shapes, as the form is in any case.

    Raises:
        ValueError: the source cannot be read or does not fit; nothing is written then.
    """
    return save(_load(Path(source), model_name), destination)


def _load(path: Path, model_name: str | None = None) -> nn.Module:
    if (path / "best").is_dir():
        path = path / "best"
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise ValueError(f"{path} is neither a run folder nor a model folder: it has no best/ and no {CONFIG}")
        state, noted = read_checkpoint(path / WEIGHTS), (path / CONFIG).read_text(encoding="utf-8")
    else:
        state, noted = read_checkpoint(path), None
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                noted = (file.metadata() or {}).get("riformer")
    if noted is not None:
        try:
            pretrained_cfg, name, args = _parse_model_cfg(json.loads(noted), {})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} describes no model: {error!r}") from error
        args.setdefault("num_classes", pretrained_cfg.get("num_classes"))
    else:
        (name, args), state, pretrained_cfg = identify(state), to_timm_keys(state), None
    name = model_name or name
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models()) or timm.list_models("riformer_*")
        raise ValueError(f"{path}: model {name!r} is unknown; did you mean one of {near}?")
    try:
        model = timm.create_model(name, pretrained_cfg=pretrained_cfg, **args)
    except (TypeError, RuntimeError, AssertionError) as error:
        raise ValueError(f"{path}: {name} cannot be built with {args}: {error}") from error
    model.to(reduce(torch.promote_types, (tensor.dtype for tensor in state.values()), torch.float32))
    load_strict(model, state, str(path))
    return model.eval()
