"""What a training takes from outside its data: teachers, and weights to start from. Recorded, and tried first."""

import hashlib
import logging
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import nn

from riformer.config import Recipe
from riformer.data.batches import eval_batches, preprocessing
from riformer.data.dataset import Dataset, ImageList
from riformer.data.orders import ORDERS, top1_in_order
from riformer.distill.cache import fingerprint
from riformer.distill.teachers import Ensemble, Teacher, class_names
from riformer.model.start import classifier_names
from riformer.train.evaluate import Evaluation, evaluate
from riformer.train.run import Run
from riformer.train.step import Training

logger = logging.getLogger(__name__)

MAX_IMAGES = 2000  # of the validation split, spread over it, on which a teacher is measured


def logit_teachers(training: Training) -> dict[str, Teacher]:
    """The logit teachers by the names that the recipe gives them."""
    teacher = training.logit_teacher
    members = list(teacher.teachers) if isinstance(teacher, Ensemble) else [teacher] if teacher else []
    return dict(zip(training.recipe.distill.logit_teachers, members, strict=True))


def record_inputs(run: Run, training: Training) -> None:
    """Writes SHA-256 of all teachers and of a file to start from into the run folder, or checks those that are there.

    Raises:
        ValueError: one of them has changed since the run began; the message names it.
    """
    recipe = training.recipe
    teachers = logit_teachers(training)
    if training.module_teacher:
        teachers[recipe.distill.module_teacher] = training.module_teacher
    inputs: dict[str, Any] = {name: fingerprint(teacher.model) for name, teacher in teachers.items()}
    if file := _weights_file(recipe.model.start):
        with open(file, "rb") as content:
            inputs[recipe.model.start] = hashlib.file_digest(content, "sha256").hexdigest()
    before = run.read("inputs.json")
    if before is None:
        run.write("inputs.json", inputs)
        return
    changed = [name for name, digest in inputs.items() if before.get(name, digest) != digest]
    if changed:
        raise ValueError(
            f"{', '.join(changed)} changed since {run.path} began, whose training would go on with other weights: "
            f"restore the file, or train into another --out"
        )


def _weights_file(reference: str) -> Path | None:
    """The local file behind the name of a model to start from, if it is one and there."""
    path = Path(reference.removeprefix("local-dir:").rpartition("@")[2] or ".")
    for file in (path, path / "best" / "model.safetensors", path / "model.safetensors"):
        if reference and file.is_file():
            return file
    return None


def check_teachers(training: Training, data: Dataset, rank: int = 0, world_size: int = 1) -> None:
    """Measures every logit teacher that the run did not train itself on validation images, and says how it did.

    Raises:
        ValueError: one is near chance, or clearly better if its outputs mean the classes in another usual order: it was
            trained on other classes, or on the same in another order. `distill.trust_teacher` accepts it all the same.
    """
    recipe = training.recipe
    for name, teacher in logit_teachers(training).items():
        if name == "own":
            continue
        result = _measure(teacher, recipe, data, rank, world_size)
        logger.info("teacher %s: top-1 %.2f %% on %d validation images", name, result.top1, result.num_images)
        problem = "" if class_names(teacher.model) else wrong_order(result.confusion, data.classes, result.num_images)
        problem = problem or _near_chance(result.top1 / 100, len(data.classes), result.num_images)
        if not result.finite:
            problem = "its logits are not finite"
        if problem and recipe.distill.trust_teacher:
            logger.warning("teacher %s: %s; it is trusted all the same", name, problem)
        elif problem:
            raise ValueError(
                f"teacher {name}: {problem}. State its classes with --distill.teacher-classes FILE, take another "
                f"teacher, or train all the same with --distill.trust-teacher true"
            )


@torch.no_grad()
def order_start(model: nn.Module, recipe: Recipe, data: Dataset, rank: int = 0, world_size: int = 1) -> None:
    """Puts the classifier's rows into the data's order, where the start of a training clearly has another usual one.

    Choice: a start is mended where a teacher is refused, because the training goes on to correct what is wrong with it.
    """
    own_teacher = recipe.distill.module_teacher == "own"
    if not recipe.model.start and (own_teacher or not recipe.distill.start_from_teacher):
        return
    result = _measure(model, recipe, data, rank, world_size)
    problem, order = _better_order(result.confusion, data.classes, result.num_images)
    if not problem:
        return
    logger.warning("the start: %s. Its classifier is put into the data's order", problem)
    state = model.state_dict()
    rows = [order.index(name) for name in data.classes]
    for key, tensor in state.items():
        if key.rpartition(".")[0] in classifier_names(model):
            tensor.copy_(tensor[rows].clone())


def _measure(model: nn.Module, recipe: Recipe, data: Dataset, rank: int, world_size: int) -> Evaluation:
    images = _spread_over(data.splits["val"], MAX_IMAGES)
    size = max(1, recipe.optim.batch_size // world_size // recipe.optim.accumulation)
    batches = eval_batches(images, preprocessing(recipe.data), size, 0, rank, world_size)
    return evaluate(model, batches, len(data.classes), recipe.optim.precision)


def wrong_order(confusion: dict[int, dict[int, int]], classes: tuple[str, ...], num_images: int) -> str:
    """Why the model's outputs seem to mean the classes in another order than `classes`; empty where they do not."""
    return _better_order(confusion, classes, num_images)[0]


def _better_order(
    confusion: dict[int, dict[int, int]], classes: tuple[str, ...], num_images: int
) -> tuple[str, list[str]]:
    """What `wrong_order` returns, and the other order."""
    own = top1_in_order(confusion, classes, classes) / num_images
    for name, order in ORDERS.items():
        ordered = order(classes)
        other = top1_in_order(confusion, classes, ordered) / num_images
        error = sqrt((own * (1 - own) + other * (1 - other)) / num_images)
        if other > own + 3 * error and other > own + 0.02:
            return (
                f"its top-1 is {own:.2%} with the data's order of classes ({', '.join(classes[:3])}, ...), but "
                f"{other:.2%} with {name} ({', '.join(ordered[:3])}, ...)"
            ), ordered
    return "", list(classes)


def _near_chance(top1: float, num_classes: int, num_images: int) -> str:
    """Why the accuracy is one of guessing; empty where it is not, or where so few images cannot tell."""
    chance = 1 / num_classes
    error = sqrt(chance * (1 - chance) / num_images)
    if top1 > chance + 2 * error or 2 * error > (1 - chance) / 4:
        return ""
    return f"its top-1 is {top1:.2%}, where guessing among {num_classes} classes gives {chance:.2%}"


def _spread_over(images: ImageList, count: int) -> ImageList:
    """At most so many of the images, evenly spread over the list."""
    indices = torch.linspace(0, len(images) - 1, min(count, len(images))).round().long().tolist()
    source = images.source if isinstance(images.source, Path) else images.source[indices]
    names, labels = ([values[i] for i in indices] for values in (images.names, images.labels))
    return replace(images, names=names, labels=labels, source=source)
