"""Functions that return a Recipe: the quickstart, the paper's setting, the rungs of its ladder.

`RECIPES` maps the names that `riformer train --recipe NAME` takes to these functions; `LADDERS` maps names of
comparisons to the recipes that they run. A recipe is a complete configuration; anything in it can be overridden.
"""

from collections.abc import Callable
from dataclasses import replace

from riformer.config import AugmentConfig, DataConfig, DistillConfig, ModelConfig, OptimConfig, Recipe, TeacherConfig

# Small images: a 2-pixel stem without overlap keeps the receptive field small, so that token mixing has work to do.
SMALL_NET = ModelConfig(name="riformer_s12", depths=(2, 2), dims=(32, 64), stem_patch=2, stem_stride=2)
LABELS = DistillConfig()
FULL_DISTILLATION = DistillConfig(
    logit_teacher="own",
    module_teacher="own",
    start_from_teacher=True,
    label_weight=0.0,
    soft_weight=1.0,
    block_weight=1.0,
    mixer_weight=1.0,
    relation_weight=1.0,
)


def quickstart() -> Recipe:
    """RIFormer's whole training on the built-in digits: own teacher, its weights, soft labels, imitation."""
    return Recipe(
        name="quickstart",
        data=DataConfig(name="digits", img_size=16, crop_pct=1.0),
        augment=AugmentConfig(
            crop_scale=(0.6, 1.0),
            hflip=0.0,
            color_jitter=0.0,
            auto_augment="",
            random_erasing=0.0,
            mixup=0.0,
            cutmix=0.0,
        ),
        model=replace(SMALL_NET, layer_scale_init=0.1),
        teacher=TeacherConfig(mixer="attention", epochs=20, lr=2e-3),
        distill=FULL_DISTILLATION,
        optim=OptimConfig(lr=2e-3, epochs=20, warmup_epochs=2, batch_size=100, label_smoothing=0.0, precision="fp32"),
    )


def quickstart_labels() -> Recipe:
    """The quickstart's network on labels alone, for as many steps as the RIFormer."""
    return replace(quickstart(), name="quickstart-labels", distill=LABELS)


def quickstart_labels_long() -> Recipe:
    """The quickstart's network on labels alone, with the teacher's steps spent on it as well."""
    recipe = quickstart_labels()
    epochs = recipe.optim.epochs + recipe.teacher.epochs
    return replace(recipe, name="quickstart-labels-long", optim=replace(recipe.optim, epochs=epochs))


def teacher_recipe(recipe: Recipe) -> Recipe:
    """The training of a run's own teacher: the student's sizes with a token mixer, on labels alone."""
    return replace(
        recipe,
        name=f"{recipe.name}-teacher",
        model=replace(recipe.model, mixer=recipe.teacher.mixer),
        distill=LABELS,
        optim=replace(recipe.optim, epochs=recipe.teacher.epochs, lr=recipe.teacher.lr),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "quickstart": quickstart,
    "quickstart-labels": quickstart_labels,
    "quickstart-labels-long": quickstart_labels_long,
}

LADDERS: dict[str, tuple[str, ...]] = {
    "quickstart": ("quickstart-labels", "quickstart-labels-long", "quickstart"),
}
