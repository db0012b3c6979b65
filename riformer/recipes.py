"""Functions that return a Recipe, and the rungs: what a comparison changes in a recipe.

`RECIPES` has what `riformer train --recipe NAME` takes, `RUNGS` what `riformer ladder --rungs NAME` runs. A recipe is a
complete configuration, of which anything can be overridden; a rung turns one recipe into another.
"""

from collections.abc import Callable
from dataclasses import replace

from riformer.config import AugmentConfig, DataConfig, DistillConfig, ModelConfig, OptimConfig, Recipe, TeacherConfig

LABELS = DistillConfig()
# The paper's paradigm: soft labels without ground truth, the teacher's weights, imitation. One network in both teacher
# roles. Choice: equal weights of the terms, and imitation fading out, because the paper gives no values.
FULL = DistillConfig(
    logit_teacher="own",
    module_teacher="own",
    start_from_teacher=True,
    label_weight=0.0,
    soft_weight=1.0,
    block_weight=1.0,
    mixer_weight=1.0,
    relation_weight=1.0,
    schedule="cosine",
)


def quickstart() -> Recipe:
    """Tiny images of up to 16 pixels: the built-in digits, minutes on a processor, with a GFNet-like teacher."""
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
        # A stem without overlap and few stages keep the receptive field small, so that token mixing has work to do.
        model=ModelConfig(name="riformer_micro"),
        teacher=TeacherConfig(mixer="global_filter", epochs=25, lr=8e-3),
        distill=FULL,
        optim=OptimConfig(lr=8e-3, epochs=25, warmup_epochs=1, batch_size=50, label_smoothing=0.0, precision="fp32"),
    )


def small_images() -> Recipe:
    """Images of up to about 32 pixels, such as Fashion-MNIST: a small network, light augmentation."""
    return Recipe(
        name="small-images",
        data=DataConfig(name="fashion-mnist", img_size=32, crop_pct=1.0),
        augment=AugmentConfig(
            crop_scale=(0.5, 1.0), color_jitter=0.2, auto_augment="", random_erasing=0.1, mixup=0.0, cutmix=0.0
        ),
        model=ModelConfig(name="riformer_mini"),
        teacher=TeacherConfig(mixer="global_filter", epochs=20, lr=4e-3),
        distill=FULL,
        optim=OptimConfig(lr=4e-3, epochs=20, warmup_epochs=1, batch_size=128, label_smoothing=0.0),
    )


def photos() -> Recipe:
    """Photographs at 224 pixels: RIFormer-S12 from a PoolFormer of its size that the run trains first; for a GPU."""
    return Recipe(
        name="photos",
        data=DataConfig(name="", num_workers=8),
        model=ModelConfig(drop_path_rate=0.1),
        teacher=TeacherConfig(mixer="pooling", epochs=120, lr=1e-3),
        distill=FULL,
        optim=OptimConfig(lr=1e-3, epochs=120, batch_size=1024, clip_grad=1.0, ema_decay=0.9995),
    )


def labels(recipe: Recipe) -> Recipe:
    """The same network on labels alone, for as many steps."""
    return replace(recipe, name=f"{recipe.name}-labels", distill=LABELS)


def labels_long(recipe: Recipe) -> Recipe:
    """The same network on labels alone, the steps of the teacher's training spent on it as well."""
    epochs = recipe.optim.epochs + recipe.teacher.epochs
    return replace(labels(recipe), name=f"{recipe.name}-labels-long", optim=replace(recipe.optim, epochs=epochs))


def full(recipe: Recipe) -> Recipe:
    """The recipe as it is."""
    return recipe


def teacher_recipe(recipe: Recipe) -> Recipe:
    """The training of a run's own teacher: the student's sizes with a token mixer or a named model, on labels alone."""
    teacher = recipe.teacher
    if teacher.name:
        model = ModelConfig(name=teacher.name, drop_path_rate=recipe.model.drop_path_rate, args=teacher.args)
    else:
        model = replace(recipe.model, mixer=teacher.mixer, start="")
    return replace(
        recipe,
        name=f"{recipe.name}-teacher",
        model=model,
        distill=LABELS,
        optim=replace(recipe.optim, epochs=recipe.teacher.epochs, lr=recipe.teacher.lr),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "quickstart": quickstart,
    "small-images": small_images,
    "photos": photos,
}

RUNGS: dict[str, Callable[[Recipe], Recipe]] = {
    "labels": labels,
    "labels-long": labels_long,
    "full": full,
}
