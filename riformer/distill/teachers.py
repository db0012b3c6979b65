"""Teachers: built from a reference, frozen, given images under their own normalisation; and where their modules are."""

import re
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import cast

import timm
import torch
from torch import Tensor, nn

from riformer.model.weights import load

# Class name -> pattern of a block's module name (stage, index), and the mixer's name inside a block. Ours and timm's
# MetaFormer share both the class name and the module names.
TEACHER_MODULES = {"MetaFormer": (r"stages\.(\d+)\.blocks\.(\d+)", "token_mixer")}


class Teacher(nn.Module):
    """A frozen model that sees the student's images under its own mean and standard deviation.

    It stays in eval mode whatever `train()` is told, its parameters take no gradient, and its forward builds no graph.

    Shape: [N, 3, H, W], normalised for the student -> [N, K] logits.
    """

    def __init__(self, model: nn.Module, student_mean: Sequence[float], student_std: Sequence[float]):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        config = cast(dict, model.pretrained_cfg)
        mean, std = torch.tensor(config["mean"]), torch.tensor(config["std"])
        scale = torch.tensor(student_std) / std
        self.register_buffer("scale", scale.view(-1, 1, 1))
        self.register_buffer("shift", ((torch.tensor(student_mean) - mean) / std).view(-1, 1, 1))

    def train(self, mode: bool = True) -> "Teacher":
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.model(images * self.scale + self.shift)


def build_teacher(
    reference: str, num_classes: int | None, student_mean: Sequence[float], student_std: Sequence[float]
) -> Teacher:
    """The teacher that `reference` names: `timm:NAME` (pretrained), or a run folder, model folder or checkpoint file.

    `num_classes` is that of the data, or None for a teacher whose logits do not matter.

    Raises:
        ValueError: nothing can be read there, or it knows another number of classes than the data.
    """
    if reference.startswith("timm:"):
        model = timm.create_model(reference.removeprefix("timm:"), pretrained=True)
    else:
        model = load(Path(reference))
    if num_classes is not None and model.num_classes != num_classes:
        raise ValueError(
            f"teacher {reference} has {model.num_classes} classes, but the data has {num_classes}: "
            f'train one on this data, or name it "own"'
        )
    return Teacher(model, student_mean, student_std)


def block_names(model: nn.Module) -> list[list[str]]:
    """Module names of the blocks, a list for each stage.

    Raises:
        ValueError: the model's class is not in TEACHER_MODULES.
    """
    pattern, _ = _modules_of(model)
    stages: dict[int, list[str]] = {}
    for name, _ in model.named_modules():
        if found := re.fullmatch(pattern, name):
            stages.setdefault(int(found[1]), []).append(name)
    return [stages[i] for i in sorted(stages)]


def mixer_name(model: nn.Module, block: str) -> str:
    """Module name of the token mixer inside the block."""
    return f"{block}.{_modules_of(model)[1]}"


def _modules_of(model: nn.Module) -> tuple[str, str]:
    name = type(model).__name__
    if name not in TEACHER_MODULES:
        raise ValueError(f"{name} is not known as a module teacher; known are {sorted(TEACHER_MODULES)}")
    return TEACHER_MODULES[name]


def match_blocks(student: nn.Module, teacher: nn.Module, positions: str | Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of block names (student's, teacher's) that imitation compares.

    `positions` is "last" (of each stage), "all", or a list of the student's block names. Where a stage of the teacher
    has another depth, a block imitates the teacher's block at the same relative depth.

    Choice: "last" as default; the authors' figure draws one position a stage.

    Raises:
        ValueError: the two have different numbers of stages, or a position is not a block of the student.
    """
    own, other = block_names(student), block_names(teacher)
    if len(own) != len(other):
        raise ValueError(f"the student has {len(own)} stages and the module teacher {len(other)}; imitation pairs them")
    pairs = {
        block: theirs[ceil((j + 1) * len(theirs) / len(stage)) - 1]
        for stage, theirs in zip(own, other, strict=True)
        for j, block in enumerate(stage)
    }
    if positions == "all":
        chosen = list(pairs)
    elif positions == "last":
        chosen = [stage[-1] for stage in own]
    else:
        chosen = [positions] if isinstance(positions, str) else list(positions)
    unknown = [block for block in chosen if block not in pairs]
    if unknown or not chosen:
        raise ValueError(f"positions {unknown or chosen} are no blocks of the student; use last, all or {list(pairs)}")
    return [(block, pairs[block]) for block in chosen]
