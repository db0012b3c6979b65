"""What a recipe names, built: the student, its teachers, what is compared between them, objective and optimiser."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from difflib import get_close_matches
from typing import Any, cast

import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn
from torch.optim import Optimizer

from riformer.config import Recipe
from riformer.data.batches import preprocessing
from riformer.data.dataset import Dataset
from riformer.data.orders import read_class_names
from riformer.distill.imitation import Imitation, match_blocks
from riformer.distill.objective import IMITATION, Objective
from riformer.distill.teachers import Ensemble, Teacher, build_teacher, open_model, takes
from riformer.model.start import start_at, start_from
from riformer.recipes import teacher_recipe
from riformer.train.outputs import teacher_cache
from riformer.train.run import Run


def build_model(recipe: Recipe, data: Dataset) -> nn.Module:
    """The recipe's network (riformer_* in training form), with the data's classes and preprocessing noted on it.

    Raises:
        ValueError: timm knows no such model, or it cannot be built with these arguments.
    """
    config = recipe.model
    if not timm.is_model(config.name):
        near = get_close_matches(config.name, timm.list_models()) or timm.list_models("riformer_*")
        raise ValueError(f"model.name is {config.name!r}, which timm does not know; did you mean one of {near}?")
    size = recipe.data.img_size
    noted = {
        **asdict(preprocessing(recipe.data)),  # whatever the weights of this name take
        "url": "",
        "license": None,  # weights trained here do not inherit it
        "label_names": data.classes,
    }
    args: dict[str, Any] = {}
    if config.name.startswith("riformer_"):
        names = ("mixer", "depths", "dims", "stem_patch", "stem_stride", "down_patch", "layer_scale_init")
        args |= {name: getattr(config, name) for name in names}
    args |= config.args
    try:
        if config.drop_path_rate or takes(config.name, "drop_path_rate", **args):
            args = {"drop_path_rate": config.drop_path_rate, **args}
        if takes(config.name, "img_size", **args):
            args["img_size"] = size
        model = timm.create_model(config.name, num_classes=len(data.classes), pretrained_cfg_overlay=noted, **args)
    except (TypeError, RuntimeError, AssertionError) as error:
        raise ValueError(f"{config.name} cannot be built with {args}: {error}") from error
    cast(dict, model.pretrained_cfg)["train_data"] = data.train_data
    return model.to(memory_format=_layout(recipe))  # which what it computes follows


def _layout(recipe: Recipe) -> torch.memory_format:
    return torch.channels_last if recipe.optim.channels_last else torch.preserve_format


def check_before_teacher(recipe: Recipe, run: Run, data: Dataset) -> None:
    """Fails at once, before its own teacher is trained for hours, where the student could not be trained after it.

    Raises:
        ValueError: an unknown mixer, positions that the student does not have, missing weights, no room for teacher
            outputs, and the like.
    """
    if cache := teacher_cache(recipe, run, data):
        cache.check_space()
    if start := recipe.model.start:
        start_at(build_model(recipe, data), open_model(start, recipe.data.img_size), start)
    for reference in {*recipe.distill.logit_teachers, recipe.distill.module_teacher} - {"", "own"}:
        open_model(reference, recipe.distill.teacher_img_size)
    with torch.device("meta"):
        student, teacher = build_model(recipe, data), build_model(teacher_recipe(recipe), data)
    build_optimizer(recipe, student, nn.ModuleDict())
    if recipe.distill.module_teacher == "own":
        match_blocks(student, teacher, recipe.research.positions)
        if recipe.distill.start_from_teacher:
            start_from(student, teacher)


def build_imitation(recipe: Recipe, model: nn.Module, module_teacher: Teacher | None) -> Imitation | None:
    """What the recipe compares between student and module teacher, if anything."""
    distill = recipe.distill
    terms = [name for name in IMITATION if distill.weights[name]]
    if not module_teacher or not terms:
        return None
    return Imitation(
        model, module_teacher, terms, recipe.data.img_size,
        recipe.research.positions, recipe.research.block_match, recipe.research.relation_tokens, recipe.seed,
    )  # fmt: skip


def build_objective(
    recipe: Recipe, student: nn.Module, logit_teacher: Teacher | Ensemble | None, imitation: Imitation | None
) -> Objective:
    """The recipe's loss; the student may be wrapped by DDP or torch.compile."""
    distill = recipe.distill
    smoothing = recipe.optim.label_smoothing
    return Objective(student, distill.weights, logit_teacher, imitation, distill.temperature, smoothing)


def build_optimizer(recipe: Recipe, model: nn.Module, projections: nn.Module) -> Optimizer:
    """The recipe's optimiser of the model, and of imitation's projections if there are any."""
    optim = recipe.optim
    optimizer = create_optimizer_v2(model, opt=optim.name, lr=optim.lr, weight_decay=optim.weight_decay)
    if parameters := list(projections.parameters()):
        optimizer.add_param_group({"params": parameters, "weight_decay": optim.weight_decay})
    return optimizer


def build_teachers(
    recipe: Recipe,
    run: Run,
    names: Sequence[str],
    device: torch.device,
    opened: Callable[[str, int], nn.Module] = open_model,
) -> tuple[Teacher | Ensemble | None, Teacher | None]:
    """Logit teacher and module teacher, None where the recipe names none; one object in both roles if named alike.

    Raises:
        ValueError: a teacher that cannot be read, or a logit teacher that does not know the classes `names`.
    """
    distill = recipe.distill
    stated = read_class_names(distill.teacher_classes, "--distill.teacher-classes")
    built: dict[str, Teacher] = {}
    for reference in dict.fromkeys((*distill.logit_teachers, distill.module_teacher)):
        if reference:
            path = str(run.path / "teacher") if reference == "own" else reference
            classes = names if reference in distill.logit_teachers else None
            built[reference] = build_teacher(
                path, classes, recipe.data.mean, recipe.data.std, distill.teacher_img_size,
                distill.compile_teachers, opened, stated,
            ).to(device).to(memory_format=_layout(recipe))  # fmt: skip
    logit_teachers = [built[reference] for reference in distill.logit_teachers]
    module_teacher = built.get(distill.module_teacher)
    if len(logit_teachers) > 1:
        return Ensemble(logit_teachers, recipe.research.logit_teacher_weights).to(device), module_teacher
    return (logit_teachers[0] if logit_teachers else None), module_teacher
