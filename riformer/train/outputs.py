"""A run's cache of teacher outputs: its size from the recipe, and what its outputs depend on."""

from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from riformer.config import Recipe
from riformer.data.dataset import Dataset
from riformer.distill.cache import TeacherCache, fingerprint
from riformer.distill.teachers import Ensemble, Teacher
from riformer.train.run import Run

LIBRARIES = ("torch", "torchvision", "timm", "numpy", "pillow")  # which draw and apply the augmentations


def teacher_cache(recipe: Recipe, run: Run, data: Dataset) -> TeacherCache | None:
    """The cache in the run folder, neither created nor opened yet; None where the recipe wants none.

    Raises:
        ValueError: as many probabilities are to be kept as there are classes, or more.
    """
    distill = recipe.distill
    if not distill.cache_augmentations:
        return None
    num_images = len(data.splits["train"])
    folder = run.path / "teacher_outputs"
    return TeacherCache(folder, distill.cache_augmentations, num_images, len(data.classes), recipe.research.cache_top_k)


def origin(recipe: Recipe, data: Dataset, teacher: Teacher | Ensemble) -> dict[str, Any]:
    """All that the outputs of this logit teacher on the augmented training images depend on, by name."""
    teachers = [module for module in teacher.modules() if isinstance(module, Teacher)]
    return {
        "teachers": recipe.distill.logit_teachers,
        "teachers_sha256": fingerprint(teacher),
        "teachers_img_size": [one.size for one in teachers],
        "precision": recipe.optim.precision,
        "train_sha256": data.splits["train"].sha256,
        "seed": recipe.seed,
        **{name: getattr(recipe.data, name) for name in ("img_size", "mean", "std")},
        **asdict(recipe.augment),
        **{f"version of {name}": version(name) for name in LIBRARIES},
    }
