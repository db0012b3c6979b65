"""Weights in and out: key maps of other projects, strict loading, safetensors, the start from a teacher.

The state dict has timm's keys (`stem.conv`, `stages.i.blocks.j.*`, `head.*`). Read are: mmpretrain's RIFormer (training
and deploy form) and PoolFormer, the authors' PoolFormer, timm's PoolFormer, and what this module wrote.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from riformer.atomic import replace_file, replace_folder
from riformer.model.mixers import MIXERS

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

    Shape: mmpretrain's affine weights [C, 1, 1, 1] become [C]; all others stay.
    """
    renamed = {}
    for key, tensor in state.items():
        for pattern, replacement in _KEY_RULES:
            key = re.sub(pattern, replacement, key)
        is_affine = key.endswith("token_mixer.weight") and tensor.shape[1:] == (1, 1, 1)
        renamed[key] = tensor.flatten() if is_affine else tensor
    return renamed


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a `.safetensors` file or a PyTorch checkpoint, keys as they are in the file.

    PyTorch files are read with `weights_only=True`. Foreign Python objects beside the tensors (training logs and the
    like) are replaced by inert placeholders: nothing in the file is imported or executed.

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
    except (UnpicklingError, RuntimeError, EOFError, SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is not a checkpoint that can be read safely: {error}") from error
    for name in ("state_dict", "model"):
        content = content.get(name, content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path} holds no state dict (looked for 'state_dict', 'model' and a plain dict of tensors)")
    return content


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
    from riformer.model.variants import VARIANTS  # which imports this module's key map

    renamed = to_timm_keys(state)
    blocks = {m.groups() for key in renamed if (m := re.match(r"stages\.(\d+)\.blocks\.(\d+)\.", key))}
    depths = tuple(sum(stage == str(i) for stage, _ in blocks) for i in range(len({stage for stage, _ in blocks})))
    dims = tuple(len(renamed.get(f"stages.{i}.blocks.0.norm2.weight", ())) for i in range(len(depths)))
    sizes = {name: (size["depths"], size["dims"]) for name, size in VARIANTS.items()}
    if (depths, dims) not in sizes.values():
        raise ValueError(f"no variant has depths {depths} and dims {dims}; known are {sizes}")
    name = next(name for name, size in sizes.items() if size == (depths, dims))

    mixer_keys = {key.split("token_mixer.")[1] for key in renamed if "token_mixer." in key}
    if mixer_keys == {"weight", "bias"}:
        args: dict[str, Any] = {}
    elif not mixer_keys:
        args = {"mixer": "identity" if any(".norm_reparam." in key for key in state) else "pooling"}
    else:
        raise ValueError(f"mixer weights named {sorted(mixer_keys)} belong to no mixer that checkpoints are read for")
    if not any("layer_scale" in key for key in renamed):
        args["layer_scale_init"] = 0
    num_classes = len(renamed["head.fc.weight"]) if "head.fc.weight" in renamed else 0
    return name, args if num_classes == 1000 else {**args, "num_classes": num_classes}


def load_strict(model: nn.Module, state: Mapping[str, Tensor], source: str = "checkpoint") -> None:
    """Loads every tensor or none.

    Raises:
        ValueError: keys or shapes differ; the message names each.
    """
    own = model.state_dict()
    differences = [f"missing in {source}: {key} {tuple(own[key].shape)}" for key in own if key not in state]
    differences += [f"unexpected in {source}: {key} {tuple(state[key].shape)}" for key in state if key not in own]
    differences += [
        f"shape of {key}: {tuple(state[key].shape)} in {source}, {tuple(own[key].shape)} in the model"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if differences:
        named = "\n  ".join(differences)
        raise ValueError(f"{source} does not fit {type(model).__name__}; nothing was loaded:\n  {named}")
    model.load_state_dict(state)


def start_from(student: nn.Module, teacher_state: Mapping[str, Tensor]) -> None:
    """Gives the student every tensor of its module teacher but the mixers' (the paper's weight initialisation).

    The student's own mixers keep their fresh values.

    Raises:
        ValueError: anything but the mixers differs between the two.
    """
    mixers = {key: tensor for key, tensor in student.state_dict().items() if ".token_mixer." in key}
    taken = {key: tensor for key, tensor in to_timm_keys(teacher_state).items() if ".token_mixer." not in key}
    load_strict(student, {**taken, **mixers}, "module teacher")


def save(model: nn.Module, path: str | Path) -> Path:
    """Writes weights, architecture, preprocessing and class names, to a `.safetensors` file or to a folder.

    A folder has the Hub's layout: `timm.create_model("local-dir:FOLDER", pretrained=True)` reads it too. The model must
    have been built by `timm.create_model`, which notes its name and arguments on it. An existing folder is kept as
    `previous(path)`.
    """
    path = Path(path)
    tensors = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    if path.suffix == ".safetensors":
        with replace_file(path) as beside:
            config = beside.with_suffix(".json")
            _write_config(model, config)
            save_file(tensors, beside, metadata={"riformer": config.read_text()})
            config.unlink()
    else:
        with replace_folder(path) as beside:
            _write_config(model, beside / "config.json")
            save_file(tensors, beside / "model.safetensors")
    return path


def _write_config(model: nn.Module, path: Path) -> None:
    args: dict[str, Any] = {}
    if hasattr(model, "stages"):  # fuse and fold change the form that timm noted when it built the model
        blocks = [stage.blocks[0] for stage in model.stages]
        names = {cls: name for name, cls in MIXERS.items()}
        mixers = [names[type(block.token_mixer)] for block in blocks]
        args["mixer"] = mixers[0] if len(set(mixers)) == 1 else mixers
        if isinstance(blocks[0].layer_scale1, nn.Identity):
            args["layer_scale_init"] = 0
    label_names = model.pretrained_cfg.get("label_names")
    save_config_for_hf(model, str(path), model_config={"label_names": label_names}, model_args=args)


def load(path: str | Path) -> nn.Module:
    """The model in a run folder (its best), a folder or file written by `save`, or a foreign checkpoint; in eval mode.

    Raises:
        ValueError: nothing there can be read, or it does not fit the architecture that it names.
    """
    path = Path(path)
    if (path / "best").is_dir():
        path = path / "best"
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} is neither a run folder nor a model folder: it has no best/ and no config.json")
        model = timm.create_model(f"local-dir:{path}")
        load_strict(model, read_checkpoint(path / "model.safetensors"), str(path))
        return model.eval()

    state = read_checkpoint(path)
    noted = None
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            noted = (file.metadata() or {}).get("riformer")
    if noted:
        config = json.loads(noted)
        name, args, overlay = config["architecture"], config.get("model_args", {}), config["pretrained_cfg"]
        overlay = {**overlay, "label_names": config.get("label_names")}
        args.setdefault("num_classes", config["num_classes"])
    else:
        (name, args), overlay = identify(state), None
    model = timm.create_model(name, pretrained_cfg_overlay=overlay, **args)
    load_strict(model, to_timm_keys(state), str(path))
    return model.eval()
