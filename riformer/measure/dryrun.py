"""What a training will take here: all of it built, a few steps on synthetic images, and nothing written.

No data set and no weights are needed. Times and memory do not depend on weights, so timm's pretrained models have
random ones. What lies on disk is read, so that it is known to fit; a model on the Hub is fetched, since nothing else
tells its architecture. A step is timed without reading images.
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from torch import nn

from riformer.config import Recipe, check
from riformer.data.batches import TrainBatches
from riformer.data.builtin import FASHION_CLASSES
from riformer.data.dataset import Dataset, ImageList, open_dataset
from riformer.data.folders import find_splits
from riformer.data.splits import hold_out
from riformer.distill.cache import TeacherCache
from riformer.distill.teachers import Ensemble, describe, open_model
from riformer.machine import cpu_name
from riformer.measure.cost import count_params
from riformer.recipes import teacher_recipe
from riformer.train.build import build_model
from riformer.train.run import Run
from riformer.train.step import backward, build, update

NUM_TIMED = 2  # steps, after one that warms up
CPU_PIXELS = 16 * 224 * 224  # most pixels that a processor is given at once: a step then takes seconds
IN_MEMORY = {
    "fashion-mnist": (FASHION_CLASSES, 55_000),
    "cifar10": (tuple(map(str, range(10))), 45_834),
    "cifar100": (tuple(map(str, range(100))), 45_834),
    "glyphs": (tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ23456789"), 43_010),
}
"""Classes and training images of data sets that need not be there; of glyphs, as Debian's fonts gave them."""
RUN = Run(os.devnull)  # stands for the folder in which a training would have its own teacher


@dataclass(frozen=True)
class Projection:
    """What one training will take. Only the seconds of `timed_images` and of an update were measured, and memory."""

    name: str
    model: str
    num_params: int
    teachers: list[str]
    """a line about each"""
    pairs: list[str]
    """a line for each pair of blocks that is compared"""
    notes: list[str]
    """what could not be as in the training"""
    device: str
    memory: int
    """bytes: most ever allocated on the GPU, or most ever resident of this process"""
    batch_size: int
    timed_images: int
    """images forward and backward at once: a part of the batch, or less of it on a processor"""
    timed_seconds: float
    """their forward and backward pass, teachers included"""
    update_seconds: float
    """the optimiser's update"""
    steps_per_epoch: int
    epochs: int

    @property
    def step_seconds(self) -> float:
        """A step of the optimiser: the passes as often as the batch holds `timed_images`, and one update."""
        return self.batch_size / self.timed_images * self.timed_seconds + self.update_seconds

    @property
    def epoch_seconds(self) -> float:
        return self.steps_per_epoch * self.step_seconds

    @property
    def total_seconds(self) -> float:
        return self.epochs * self.epoch_seconds


def dry_run(
    recipe: Recipe, progress: Callable[[str], None] = lambda text: None, device: torch.device | str | None = None
) -> list[Projection]:
    """What the recipe's training will take in one process; that of its own teacher comes first, where it has one.

    Args:
        recipe: the whole configuration.
        progress: called with what is being done.
        device: where to run; a GPU if there is one.

    Raises:
        ValueError: what `train` would refuse; a teacher that is not there and whose architecture nothing tells.
        RuntimeError: a part of the batch does not fit into the GPU's memory.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("a dry run is one process, without torchrun; several share the images of a step among them")
    recipes = [teacher_recipe(recipe), recipe] if recipe.distill.trains_teacher else [recipe]
    for one in recipes:
        check(one)
    data, note = count_data(recipe)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return [_project(one, data, note, progress, device) for one in recipes]


def _project(
    recipe: Recipe, data: Dataset, note: str, progress: Callable[[str], None], device: torch.device
) -> Projection:
    optim, distill, notes = recipe.optim, recipe.distill, [note] if note else []
    num_classes = len(data.classes)
    batches = TrainBatches(
        data.splits["train"], num_classes, replace(recipe.data, num_workers=0), recipe.augment, recipe.seed,
        optim.batch_size, optim.accumulation,
    )  # fmt: skip
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    # everything that takes part
    progress(f"{recipe.name}: building {recipe.model.name} and its teachers")
    start = _is_there(recipe.model.start)
    if recipe.model.start and not start:
        notes.append(f"{recipe.model.start}, from which training is to start, is not here yet")
    training = build(recipe, RUN, data, device, start=start, opened=_opener(recipe, data, notes))
    model = training.model

    # steps on noise
    size, num_images = recipe.data.img_size, batches.part_size
    if device.type == "cpu":
        num_images = min(num_images, max(2, CPU_PIXELS // size**2))
    if num_images < batches.part_size:
        notes.append(f"timed {num_images} images at once, not the {batches.part_size} of a part; the memory is theirs")
    if optim.batch_size > num_images:
        notes.append(f"one process takes {batches.part_size} images at once; N under torchrun take an Nth of them each")
    if distill.cache_augmentations:
        outputs = TeacherCache(
            "teacher_outputs", distill.cache_augmentations, batches.num_images, num_classes, recipe.research.cache_top_k
        )
        notes.append(f"teacher outputs to be kept: {outputs.describe()} of the run")
        notes.append(f"after {distill.cache_augmentations} epochs the logit teacher rests, and a step takes less")
    images = torch.randn(num_images, 3, size, size, device=device)
    targets = torch.rand(num_images, num_classes, device=device).softmax(1)
    parts = [(images, targets, torch.arange(num_images))]
    passes, updates = [], []
    model.train()
    with training.objective:
        for number in range(1 + NUM_TIMED):
            what = f"timing step {number} of {NUM_TIMED}" if number else "warming up"
            progress(f"{recipe.name}: {what}, {num_images} images at {size} px")
            began = _now(device)
            backward(training, parts)
            between = _now(device)
            update(training, number)
            training.optimizer.zero_grad(set_to_none=True)
            if number:
                passes.append(between - began)
                updates.append(_now(device) - between)

    logit_teacher = training.logit_teacher
    members = logit_teacher.teachers if isinstance(logit_teacher, Ensemble) else [logit_teacher]
    roles = [("logit teacher", teacher) for teacher in members] + [("module teacher", training.module_teacher)]
    teachers = [
        f"{role} {describe(teacher)}: {count_params(teacher):,} parameters, sees images at {teacher.size[0]} px"
        for role, teacher in roles
        if teacher
    ]
    return Projection(
        name=recipe.name,
        model=f"{describe(model)}: {count_params(model):,} parameters, images at {size} px, {num_classes} classes",
        num_params=count_params(model),
        teachers=teachers,
        pairs=training.imitation.describe() if training.imitation else [],
        notes=notes,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        memory=_peak_memory(device),
        batch_size=optim.batch_size,
        timed_images=num_images,
        timed_seconds=fmean(passes),
        update_seconds=fmean(updates),
        steps_per_epoch=batches.steps_per_epoch,
        epochs=optim.epochs,
    )


def count_data(recipe: Recipe) -> tuple[Dataset, str]:
    """Classes and number of training images, no image of a folder read; ImageNet's if there is no folder yet."""
    config = recipe.data
    path = config.name.removeprefix("folder:")
    if config.name.startswith("folder:") and os.path.isdir(os.path.expanduser(path)):
        images = find_splits(Path(path).expanduser()).images
        train = images["train"]
        if "val" not in images:
            train, _ = hold_out(train, config.val_fraction, config.split_seed, contents={})
        classes, num_images = tuple(train), sum(map(len, train.values()))
        note = f"counted the {num_images:,} training images in {path} by their names; not one was read"
    elif config.name in IN_MEMORY:
        classes, num_images, note = *IN_MEMORY[config.name], ""
    elif not config.name or config.name.startswith("folder:"):
        classes, num_images = tuple(map(str, range(1000))), 1_281_167
        note = (
            f"{config.name or 'no data set'} is not here: ImageNet-1k's 1,281,167 images of 1,000 classes are assumed"
        )
    else:
        return open_dataset(config), ""
    source = np.empty((0, 1, 1), np.uint8) if config.name in IN_MEMORY else Path()
    return Dataset(config.name, classes, {"train": ImageList([""] * num_images, [0] * num_images, source, "")}), note


def _opener(recipe: Recipe, data: Dataset, notes: list[str]) -> Callable[[str, int], nn.Module]:
    """How a dry run opens what a recipe names; it notes down whose weights are not the real ones."""

    def opened(reference: str, img_size: int = 0) -> nn.Module:
        if reference == str(RUN.path / "teacher"):
            return build_model(teacher_recipe(recipe), data)
        if reference.startswith("timm:"):
            name, _, file = reference.removeprefix("timm:").partition("@")
            if file and Path(file).is_file():
                return open_model(reference, img_size)
            model = open_model(reference, img_size, pretrained=False)
            if file:
                notes.append(f"{file} is not here yet: {name} has random weights")
                model.reset_classifier(len(data.classes))
            elif not model.pretrained_cfg.get("hf_hub_id") and not model.pretrained_cfg.get("url"):
                raise ValueError(f"timm has no weights of {name}; get a file with them and name it timm:{name}@FILE")
            else:
                notes.append(f"nothing is fetched: {name} has random weights")
            return model
        if not reference.startswith(("local-dir:", "hf-hub:")) and not Path(reference).exists():
            raise ValueError(
                f"{reference} is not there, and so nothing tells its architecture; a teacher still to come can be "
                f"named timm:NAME@{reference}"
            )
        return open_model(reference, img_size)

    return opened


def _is_there(reference: str) -> bool:
    """Whether weights of that name are there or can be fetched."""
    return reference.startswith(("timm:", "local-dir:", "hf-hub:")) or bool(reference and Path(reference).exists())


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0  # which Python's library does not tell there
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
