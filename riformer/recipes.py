"""Functions that return a Recipe, and the rungs: what a comparison changes in a recipe. published.py has more recipes.

`RECIPES` has what `riformer train --recipe NAME` takes, `RUNGS` what `riformer ladder --rungs NAME` runs. A recipe is a
complete configuration, of which anything can be overridden; a rung turns one recipe into another.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from riformer import published
from riformer.config import (
    AugmentConfig,
    DataConfig,
    DistillConfig,
    ModelConfig,
    OptimConfig,
    Recipe,
    TeacherConfig,
    reset_unused,
)
from riformer.config.rules import SIZES
from riformer.published import PARADIGM
from riformer.sizes import VARIANTS
from riformer_runtime.validate import build

Rung = Callable[[Recipe], Recipe]

LABELS = DistillConfig()
# The paper's paradigm with one network, trained in the same run, in both teacher roles.
FULL = replace(PARADIGM, logit_teacher="own", module_teacher="own")


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


def glyphs_overlap() -> Recipe:
    """Letters in hundreds of typefaces at 32 pixels: kernels that overlap, on labels alone.

    More accurate there than the paper's paradigm after as many steps, and without a teacher: docs/results.md.
    """
    return replace(overlap(glyphs_riformer()), name="glyphs-overlap")


def glyphs_riformer() -> Recipe:
    """Letters by the paper's paradigm; without mixing a token sees 8 of 32 pixels, as in an S12 63 of 224."""
    return Recipe(
        name="glyphs-riformer",
        data=DataConfig(name="glyphs", img_size=32, crop_pct=1.0),
        augment=AugmentConfig(policy="warp"),
        # Patches without overlap, in the stem and between the stages: only mixers carry anything from one to another.
        model=ModelConfig(
            name="riformer_micro",
            depths=(2, 2),
            dims=(24, 48),
            stem_patch=4,
            stem_stride=4,
            down_patch=2,
            args={"init_std": 0.12},
        ),
        teacher=TeacherConfig(mixer="token_matrix", epochs=9, lr=6e-3),
        distill=FULL,
        optim=OptimConfig(
            lr=6e-3,
            epochs=9,
            warmup_epochs=0.5,
            batch_size=64,
            label_smoothing=0.0,
            precision="fp32",
            channels_last=True,
        ),
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


def at_budget(recipe: Recipe, times: int) -> Recipe:
    """The recipe for so many times its epochs, warm-up and its own teacher's epochs included.

    Raises:
        ValueError: `times` is below 1.
    """
    if times < 1:
        raise ValueError(f"a budget is {times}; it must be 1 or more times the recipe's epochs")
    optim, teacher = recipe.optim, recipe.teacher
    return replace(
        recipe,
        name=f"{recipe.name}-{times}x",
        teacher=replace(teacher, epochs=times * teacher.epochs),
        optim=replace(optim, epochs=times * optim.epochs, warmup_epochs=times * optim.warmup_epochs),
    )


def labels(recipe: Recipe) -> Recipe:
    """The same network on labels alone, for as many steps."""
    return reset_unused(replace(recipe, name=f"{recipe.name}-labels", distill=LABELS), since=recipe)


def labels_long(recipe: Recipe) -> Recipe:
    """The same network on labels alone, for the steps of the recipe and of its own teacher's training together."""
    epochs = recipe.optim.epochs + recipe.teacher.epochs * recipe.distill.trains_teacher
    return replace(labels(recipe), name=f"{recipe.name}-labels-long", optim=replace(recipe.optim, epochs=epochs))


def mixer(recipe: Recipe) -> Recipe:
    """The network that keeps its token mixer, the teacher's, on labels alone; the paper's is a PoolFormer."""
    return _rung(recipe, "mixer", recipe.teacher.mixer, LABELS)


def identity(recipe: Recipe) -> Recipe:
    """The network with an identity as token mixer, on labels alone."""
    return _rung(recipe, "identity", "identity", LABELS)


def deleted(recipe: Recipe) -> Recipe:
    """The network whose blocks are MLPs alone, on labels: identity computes x + norm(x), this leaves x as it is."""
    return _rung(recipe, "deleted", "nothing", LABELS)


def hard(recipe: Recipe) -> Recipe:
    """Identity, on labels and the logit teacher's decisions, half each."""
    return _rung(recipe, "hard", "identity", _logits_alone(recipe, label=0.5, hard=0.5))


def hard_alone(recipe: Recipe) -> Recipe:
    """Identity, on the logit teacher's decisions without labels."""
    return _rung(recipe, "hard-alone", "identity", _logits_alone(recipe, hard=1.0))


def soft(recipe: Recipe) -> Recipe:
    """Identity, on the logit teacher's probabilities without labels."""
    return _rung(recipe, "soft", "identity", _logits_alone(recipe, soft=1.0))


def soft_labels(recipe: Recipe) -> Recipe:
    """Identity, on labels and the logit teacher's probabilities, half each."""
    return _rung(recipe, "soft-labels", "identity", _logits_alone(recipe, label=0.5, soft=0.5))


def affine(recipe: Recipe) -> Recipe:
    """Soft, with an affine as token mixer, which a fuse merges into the norm before it."""
    return _rung(recipe, "affine", "affine", _logits_alone(recipe, soft=1.0))


def imitation(recipe: Recipe) -> Recipe:
    """The recipe from random weights: it imitates the teacher's modules but does not start from their weights."""
    return _rung(recipe, "imitation", recipe.model.mixer, replace(recipe.distill, start_from_teacher=False))


def start(recipe: Recipe) -> Recipe:
    """The recipe without imitation: it starts from the teacher's weights."""
    distill = replace(recipe.distill, block_weight=0.0, mixer_weight=0.0, relation_weight=0.0)
    return _rung(recipe, "start", recipe.model.mixer, replace(distill, schedule="constant"))


def mixer_first(recipe: Recipe) -> Recipe:
    """The mixer kept in the first stage alone, an affine in the others, on labels: not in the paper."""
    return _mixer_in(recipe, "mixer-first", 0)


def mixer_last(recipe: Recipe) -> Recipe:
    """The mixer kept in the last stage alone, where tokens are fewest, an affine in the others, on labels."""
    return _mixer_in(recipe, "mixer-last", -1)


def _mixer_in(recipe: Recipe, name: str, stage: int) -> Recipe:
    mixers = ["affine"] * len(_depths(recipe))
    mixers[stage] = recipe.teacher.mixer
    return _rung(recipe, name, tuple(mixers), LABELS)


def overlap(recipe: Recipe) -> Recipe:
    """Deleted, with kernels twice as wide between the stages, so that these few convolutions mix tokens."""
    model = replace(recipe.model, down_patch=2 * (recipe.model.down_patch or 3))
    return replace(deleted(replace(recipe, model=model)), name=f"{recipe.name}-overlap")


def deeper(recipe: Recipe) -> Recipe:
    """Deleted, with a block more in the deepest stage, about as slow as the network with its mixers."""
    depths = list(_depths(recipe))
    depths[depths.index(max(depths))] += 1
    model = replace(recipe.model, depths=tuple(depths))
    return replace(deleted(replace(recipe, model=model)), name=f"{recipe.name}-deeper")


def fitted(recipe: Recipe) -> Recipe:
    """The recipe with affines that are first fitted to the teacher's mixers by least squares."""
    return replace(recipe, name=f"{recipe.name}-fitted", research=replace(recipe.research, fit_affine_batches=8))


def _softer(temperature: float) -> Rung:
    def rung(recipe: Recipe) -> Recipe:
        distill = replace(_logits_alone(recipe, soft=1.0), temperature=temperature)
        return _rung(recipe, f"soft-t{temperature:g}", "identity", distill)

    rung.__doc__ = f"Soft, at temperature {temperature:g}."
    return rung


def _imitating(term: str) -> Rung:
    def rung(recipe: Recipe) -> Recipe:
        others = {f"{name}_weight": 0.0 for name in ("block", "mixer", "relation") if name != term}
        return _rung(recipe, f"imitation-{term}", recipe.model.mixer, replace(imitation(recipe).distill, **others))

    rung.__doc__ = f"Imitation, its {term} term alone."
    return rung


def _scheduled(schedule: Literal["constant", "first_phase"]) -> Rung:
    def rung(recipe: Recipe) -> Recipe:
        distill = replace(imitation(recipe).distill, schedule=schedule)
        return _rung(recipe, f"imitation-{schedule.replace('_', '-')}", recipe.model.mixer, distill)

    rung.__doc__ = f"Imitation, with the schedule {schedule}."
    return rung


def full(recipe: Recipe) -> Recipe:
    """The recipe as it is."""
    return recipe


def _depths(recipe: Recipe) -> tuple[int, ...]:
    if recipe.model.name not in VARIANTS:
        raise ValueError(f"model.name is {recipe.model.name!r}, but this rung is of {', '.join(VARIANTS)}")
    return recipe.model.depths or VARIANTS[recipe.model.name]["depths"]


def _rung(recipe: Recipe, name: str, mixer: str | tuple[str, ...], distill: DistillConfig) -> Recipe:
    """The recipe with this mixer and loss. Knobs without effect in it go back to their defaults."""
    changed = replace(recipe, name=f"{recipe.name}-{name}", model=replace(recipe.model, mixer=mixer), distill=distill)
    return reset_unused(changed, since=recipe)


def _logits_alone(recipe: Recipe, label: float = 0.0, hard: float = 0.0, soft: float = 0.0) -> DistillConfig:
    """What the recipe learns from, with these terms instead of its own: no module teacher, no imitation."""
    alone = start(imitation(recipe)).distill
    return replace(alone, module_teacher="", label_weight=label, hard_weight=hard, soft_weight=soft)


def teacher_recipe(recipe: Recipe) -> Recipe:
    """The training of a run's own teacher: the student's sizes with a token mixer or a named model, on labels alone."""
    teacher = recipe.teacher
    if teacher.name:
        knobs = SIZES if teacher.name.startswith("riformer_") else ()
        values = {name: value for name, value in teacher.args.items() if name in knobs}
        args = {name: value for name, value in teacher.args.items() if name not in knobs}
        drop_path_rate = recipe.model.drop_path_rate
        model = build(dict(name=teacher.name, drop_path_rate=drop_path_rate, args=args, **values), ModelConfig)
    else:
        model = replace(recipe.model, mixer=teacher.mixer, start="")
    optim = replace(recipe.optim, epochs=teacher.epochs, lr=teacher.lr)
    training = replace(recipe, name=f"{recipe.name}-teacher", model=model, distill=LABELS, optim=optim)
    return reset_unused(training, since=recipe)


RECIPES: dict[str, Callable[[], Recipe]] = {
    "quickstart": quickstart,
    "small-images": small_images,
    "glyphs-overlap": glyphs_overlap,
    "glyphs-riformer": glyphs_riformer,
    "photos": photos,
    **published.RECIPES,
}

RENAMED = {"glyphs": "glyphs-overlap", "glyphs-paper": "glyphs-riformer"}  # names in earlier versions, and today's
RUNGS: dict[str, Rung] = {  # in the order of tables and pages
    "labels": labels,
    "labels-long": labels_long,
    "mixer": mixer,
    "identity": identity,
    "deleted": deleted,
    "hard": hard,
    "soft": soft,
    "affine": affine,
    "imitation": imitation,
    "full": full,
    "start": start,
    "hard-alone": hard_alone,
    "soft-labels": soft_labels,
    "soft-t2": _softer(2),
    "soft-t4": _softer(4),
    **{f"imitation-{term}": _imitating(term) for term in ("block", "mixer", "relation")},
    "imitation-constant": _scheduled("constant"),
    "imitation-first-phase": _scheduled("first_phase"),
    "mixer-first": mixer_first,
    "mixer-last": mixer_last,
    "overlap": overlap,
    "deeper": deeper,
    "fitted": fitted,
}
DEFAULT_RUNGS = ("labels", "labels-long", "full")
RUNG_GROUPS = {
    "the paper's ladder": ("identity", "hard", "soft", "affine", "imitation", "full"),
    "controls, on labels alone": ("mixer", "labels", "labels-long", "deleted"),
}
RUNG_GROUPS["research"] = tuple(name for name in RUNGS if name not in sum(RUNG_GROUPS.values(), ()))
