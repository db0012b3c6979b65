"""Teachers: built from a reference, frozen, given images at their own size under their own normalisation."""

import logging
import unicodedata
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from inspect import signature
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from timm.data import ImageNetInfo
from torch import Tensor, nn

from riformer.model.checkpoint import read_file, shorten
from riformer.model.description import read_description
from riformer.model.gfnet import GFNet
from riformer.model.hub import cache_if_offline
from riformer.model.keys import unwrap
from riformer.model.metaformer import MetaFormer
from riformer.model.weights import load

logger = logging.getLogger(__name__)


class Teacher(nn.Module):
    """A frozen model that sees the student's images at its own size, under its own mean and standard deviation.

    It stays in eval mode whatever `train()` is told, its parameters take no gradient, and its forward builds no graph.

    Choice: images of another size than the teacher's are resized bicubically, because a teacher is best at the size
    that it was trained for; another size can be asked for.

    Args:
        model: built by timm, so that it notes its normalisation and size.
        student_mean: of the pixels that it will be given.
        student_std: likewise.
        img_size: height and width at which it sees them, pixels; 0 takes what the model notes.
        compile: torch.compile it, at the first forward pass.
        class_order: the model's output for each class of the data; empty where the model has them in that order.

    Shape: [N, 3, H, W], normalised for the student -> [N, K] logits.
    """

    def __init__(
        self,
        model: nn.Module,
        student_mean: Sequence[float],
        student_std: Sequence[float],
        img_size: int = 0,
        compile: bool = False,
        class_order: Sequence[int] = (),
    ):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        config = cast(dict, model.pretrained_cfg)
        self.size = (img_size, img_size) if img_size else tuple(config["input_size"][-2:])
        self.to_compile = compile
        mean, std = torch.tensor(config["mean"]), torch.tensor(config["std"])
        scale = torch.tensor(student_std) / std
        self.register_buffer("scale", scale.view(-1, 1, 1))
        self.register_buffer("shift", ((torch.tensor(student_mean) - mean) / std).view(-1, 1, 1))
        self.reorders = bool(class_order)
        if self.reorders:
            self.register_buffer("class_order", torch.tensor(class_order))

    def train(self, mode: bool = True) -> "Teacher":
        return self

    def see(self, images: Tensor) -> Tensor:
        """The images as the teacher is given them. Shape: [N, 3, H, W] -> [N, 3, *size]."""
        if images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        return images * self.scale + self.shift

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        if self.to_compile:  # not sooner: what taps the modules must come before the first compiled call
            self.model.compile()
            self.to_compile = False
        logits = self.model(self.see(images))
        return logits[:, self.class_order] if self.reorders else logits


class Ensemble(nn.Module):
    """Several teachers as one: the logarithm of the weighted mean of their probabilities.

    The soft term to it differs from the weighted sum of the soft terms by a constant alone (at temperature 1).

    Shape: [N, 3, H, W] -> [N, K].

    Raises:
        ValueError: another number of weights than of teachers, or weights that are not positive.
    """

    def __init__(self, teachers: Sequence[Teacher], weights: Sequence[float] = ()):
        super().__init__()
        weights = tuple(weights) or (1.0,) * len(teachers)
        if len(weights) != len(teachers) or min(weights) <= 0:
            raise ValueError(f"{len(teachers)} logit teachers take as many positive weights, not {weights}")
        self.teachers = nn.ModuleList(teachers)
        self.register_buffer("log_weights", (torch.tensor(weights) / sum(weights)).log())

    def train(self, mode: bool = True) -> "Ensemble":
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        log_probabilities = torch.stack([teacher(images).float().log_softmax(1) for teacher in self.teachers])
        return (log_probabilities + self.log_weights.view(-1, 1, 1)).logsumexp(0)


def open_model(reference: str, img_size: int = 0, pretrained: bool = True) -> nn.Module:
    """The model that `reference` names, with its weights.

    - `timm:NAME` with timm's pretrained weights, `timm:NAME@FILE` with those in a checkpoint file
    - `local-dir:FOLDER`, as timm writes them, or `hf-hub:OWNER/NAME`, as timm reads them
    - a run folder, a model folder, or a checkpoint file of an architecture that this package knows

    Args:
        reference: as above.
        img_size: pixels that a model bound to a token grid is built for, its weights resampled; 0 keeps its own.
        pretrained: False gives `timm:` models random weights; no file is read and nothing fetched.

    Raises:
        ValueError: nothing can be read there.
    """
    if not reference.startswith(("timm:", "hf-hub:")):
        path = Path(reference.removeprefix("local-dir:"))
        model = load(path)
        sized = tuple(model.pretrained_cfg["input_size"][-2:])
        if not img_size or sized == (img_size, img_size) or isinstance(model, MetaFormer | GFNet):
            return model  # those of this package resample in each pass what is bound to a grid
        if path.is_file():
            raise ValueError(f"{reference} is for images of {sized} pixels; only from a folder is it built for others")
        reference = f"local-dir:{path / 'best' if (path / 'best').is_dir() else path}"
    name, file = reference, ""
    if reference.startswith("timm:"):
        name, _, file = reference.removeprefix("timm:").partition("@")
    args: dict[str, Any] = {}
    is_fetched = name.startswith("hf-hub:") or (pretrained and not file and not name.startswith("local-dir:"))
    try:
        with cache_if_offline() if is_fetched else nullcontext():
            if img_size and takes(name, "img_size"):
                args["img_size"] = img_size
            if file and pretrained:
                args |= _weights_of_file(name, file)
            model = timm.create_model(name, pretrained=pretrained, **args)
    except (RuntimeError, OSError, AssertionError, LookupError, TypeError) as error:  # of timm, the Hub or the system
        raise ValueError(shorten(f"{reference}: {error}", 2000)) from error
    model.pretrained_cfg.pop("state_dict", None)
    return model


def takes(name: str, argument: str, **args: Any) -> bool:
    """Whether the constructor behind timm's model of this name has this argument, such as `img_size`."""
    with torch.device("meta"):
        classes = type(timm.create_model(name, **args)).__mro__
    return any(argument in signature(cls).parameters for cls in classes if issubclass(cls, nn.Module))


def _weights_of_file(name: str, file: str) -> dict[str, Any]:
    """Arguments with which `timm.create_model` builds the network with a file's weights and class names."""
    read = read_file(file)
    if read.config is not None and (said := read_description(read.config).name) != name.partition(".")[0]:
        raise ValueError(f"{file} holds a {said}, not a {name}: give the file without timm:{name}@")
    with torch.device("meta"):
        keys = timm.create_model(name).state_dict().keys()
    state = unwrap(read.state, keys.__contains__)
    classes: dict[str, Any] = _num_classes(name, state)
    names = {"label_names": read.label_names} if len(read.label_names or ()) == classes.get("num_classes") else {}
    return {**classes, "pretrained_cfg_overlay": {"state_dict": state, **classes, **names}}


def _num_classes(name: str, state: dict[str, Tensor]) -> dict[str, int]:
    """As an argument, when the checkpoint's classifier tells it."""
    classifier = timm.get_pretrained_cfg_value(name, "classifier")
    weight = state.get(f"{classifier if isinstance(classifier, str) else classifier[0]}.weight")
    return {} if weight is None else {"num_classes": len(weight)}


def build_teacher(
    reference: str,
    classes: Sequence[str] | None,
    student_mean: Sequence[float],
    student_std: Sequence[float],
    img_size: int = 0,
    compile: bool = False,
    opened: Callable[[str, int], nn.Module] = open_model,
    stated_classes: Sequence[str] = (),
) -> Teacher:
    """The teacher that `reference` names, as `opened` opens it; `img_size` and `compile` as for `Teacher`.

    A teacher whose class names are known answers in the order of the data's, whatever its own is, and may know more
    classes than the data has.

    Args:
        classes: the data's, in their order; None for a teacher whose logits do not matter.
        stated_classes: class names of a teacher that carries none, in the order of its outputs.

    Raises:
        ValueError: nothing can be read there, or it does not know the data's classes, or takes other images than RGB.
    """
    model = opened(reference, img_size)
    if (channels := model.pretrained_cfg["input_size"][0]) != 3:
        raise ValueError(f"teacher {reference} takes images of {channels} channels, but the student's have 3")
    order = [] if classes is None else _class_order(reference, model, classes, stated_classes)
    return Teacher(model, student_mean, student_std, img_size, compile, order)


def _class_order(reference: str, model: nn.Module, classes: Sequence[str], stated: Sequence[str]) -> list[int]:
    """The model's output for each of the data's classes; empty where it has them in that order, or names none."""
    names = known_names(model, classes, stated)
    if stated and len(names) != model.num_classes:
        raise ValueError(
            f"--distill.teacher-classes has {len(names)} names, but {reference} {model.num_classes} outputs"
        )
    if names == list(classes):
        return []
    if len(set(names)) == len(names) and set(classes) <= set(names):
        logger.info(
            "teacher %s has its %d classes in another order than the data: matched by name", reference, len(names)
        )
        return [names.index(name) for name in classes]
    if model.num_classes != len(classes):
        missing = f", and does not know {sorted(set(classes) - set(names))[:5]}" if names else " without names"
        raise ValueError(
            f"teacher {reference} has {model.num_classes} classes{missing}, but the data has {len(classes)}: train one "
            f'on this data, state its classes with --distill.teacher-classes FILE, or name it "own"'
        )
    if names:
        unknown = next(name for name in classes if name not in names)
        logger.warning("teacher %s names its classes otherwise than the data: it has no %r", reference, unknown)
    return []


def class_names(model: nn.Module) -> tuple[str, ...]:
    """The class names that a model carries, in the order of its outputs; none where it carries none."""
    names = model.pretrained_cfg.get("label_names") or ()
    return tuple(unicodedata.normalize("NFC", str(name)) for name in names)


def known_names(model: nn.Module, classes: Sequence[str], stated: Sequence[str] = ()) -> list[str]:
    """The names of the model's outputs: its own, else the stated ones, else ImageNet's if the data's classes are those.

    Args:
        model: any network with `pretrained_cfg`.
        classes: the data's.
        stated: names of a model that carries none.
    """
    names = list(class_names(model) or stated)
    if not names and model.num_classes == 1000 and set(classes) <= set(synsets := ImageNetInfo().label_names()):
        return list(synsets)
    return names


def describe(model: nn.Module) -> str:
    """Architecture and token mixers, such as `riformer_s12 affine`; those of all members of an ensemble."""
    if isinstance(model, Ensemble):
        return " + ".join(map(describe, model.teachers))
    model = model.model if isinstance(model, Teacher) else model
    mixers = dict.fromkeys(model.mixers) if isinstance(model, MetaFormer) else {}
    return " ".join([str(model.pretrained_cfg["architecture"]), *mixers])
