"""Which settings of a recipe contradict each other, and which have no effect."""

from collections.abc import Iterator
from dataclasses import fields

from riformer.config.knobs import (
    BUILT_IN,
    WITH_ROOT,
    AugmentConfig,
    Recipe,
    TeacherConfig,
    default_of,
    option,
    value_of,
    with_value,
)
from riformer_runtime.validate import refusals

TIMM_POLICY = tuple(f"augment.{f.name}" for f in fields(AugmentConfig) if f.name != "policy")
SIZES = ("mixer", "depths", "dims", "stem_patch", "stem_stride", "down_patch", "layer_scale_init")
SET_ELSEWHERE = {
    **{name: f"--model.{name.replace('_', '-')}" for name in (*SIZES, "drop_path_rate")},
    **dict.fromkeys(("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path"), "--model.start"),
    "num_classes": "the data",
    "img_size": "--data.img-size",
    "in_chans": "the data",
}
"""Arguments of networks that a recipe sets in another place."""
OWN_TEACHER = tuple(f"teacher.{f.name}" for f in fields(TeacherConfig))


def check(recipe: Recipe) -> None:
    """Refuses values that are not allowed, settings that contradict each other, and settings without effect.

    Raises:
        ValueError: names the settings, their values and what is allowed.
    """
    reasons = refusals(recipe)
    if not reasons:  # the rules need values of the right types
        pairs = [*_contradictions(recipe), *unused_settings(recipe)]
        reasons = [f"{option(knob)} is {value_of(recipe, knob)!r}, but {why}" for knob, why in pairs]
    if reasons:
        raise ValueError(f"recipe {recipe.name!r}:\n  " + "\n  ".join(reasons))


def unused_settings(recipe: Recipe) -> list[tuple[str, str]]:
    """Knobs that are not at their defaults and have no effect in this recipe, each with the reason."""
    data, augment, model, teacher, distill = recipe.data, recipe.augment, recipe.model, recipe.teacher, recipe.distill
    warps, riformers, own = augment.policy == "warp", model.name.startswith("riformer_"), distill.trains_teacher
    jitters = not augment.auto_augment or "3a" in augment.auto_augment  # timm jitters beside its policy 3a alone
    teachers, imitates, caches = distill.logit_teachers, distill.imitates, distill.cache_augmentations
    first_phase, others = distill.schedule == "first_phase", set(teachers) - {"own"}
    rules: list[tuple[tuple[str, ...], object, str]] = [  # knobs, whether they have an effect, and why they have none
        (("data.root",), data.name in WITH_ROOT, f"only {', '.join(WITH_ROOT)} have one"),
        (("data.on_bad",), data.name not in BUILT_IN, f"{data.name} is no folder of images"),
        (("data.val_fraction", "data.split_seed"), data.name not in BUILT_IN, f"{data.name} has splits of its own"),
        (TIMM_POLICY, not warps, "--augment.policy is warp"),
        (("augment.color_jitter",), warps or jitters, "--augment.auto-augment is set, which changes colours itself"),
        (tuple(f"model.{name}" for name in SIZES), riformers, f"{model.name} is no riformer_*; use --model.args"),
        (OWN_TEACHER, own, "this run trains no teacher of its own"),
        (("teacher.mixer",), not own or not teacher.name, "--teacher.name is set; use --teacher.args"),
        (("teacher.args",), not own or teacher.name, "--teacher.name is empty"),
        (("distill.teacher_classes", "distill.trust_teacher"), others, "no logit teacher from elsewhere is named"),
        (("distill.teacher_img_size",), teachers or distill.module_teacher, "no teacher is named"),
        (("distill.compile_teachers",), teachers or distill.module_teacher, "no teacher is named"),
        (("distill.cache_augmentations",), teachers, "no logit teacher is named"),
        (("distill.temperature",), distill.soft_weight, "--distill.soft-weight is 0"),
        (("distill.schedule",), imitates, "the weights of imitation are 0"),
        (("optim.label_smoothing",), own or distill.label_weight, "--distill.label-weight is 0"),
        (("research.fit_affine_batches",), distill.module_teacher, "no module teacher is named"),
        (("research.positions",), imitates, "the weights of imitation are 0"),
        (("research.block_match",), distill.block_weight, "--distill.block-weight is 0"),
        (("research.relation_tokens",), distill.relation_weight, "--distill.relation-weight is 0"),
        (("research.phase",), imitates and first_phase, "--distill.schedule is not first_phase"),
        (("research.logit_teacher_weights",), len(teachers) > 1, "they are for several logit teachers"),
        (("research.cache_top_k",), teachers and caches, "--distill.cache-augmentations is 0"),
    ]
    unused = [(knob, f"has no effect: {why}") for knobs, effect, why in rules if not effect for knob in knobs]
    return [(knob, why) for knob, why in unused if value_of(recipe, knob) != default_of(knob)]


def reset_unused(recipe: Recipe, since: Recipe | None = None) -> Recipe:
    """The recipe with unused knobs back at their defaults.

    With `since`, the recipe before a change, only knobs that the change left unused without setting them; what was
    set, or was unused before, stays for `check` to refuse.
    """
    before = {knob for knob, _ in unused_settings(since)} if since else set()
    for knob, _ in unused_settings(recipe):
        if since is None or (knob not in before and value_of(recipe, knob) == value_of(since, knob)):
            recipe = with_value(recipe, knob, default_of(knob))
    return recipe


def _contradictions(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Knobs that contradict others, each with the reason."""
    yield from _in_training(recipe)
    yield from _between_student_and_teachers(recipe)
    yield from _about_kept_outputs(recipe)


def _in_training(recipe: Recipe) -> Iterator[tuple[str, str]]:
    optim, (low, high) = recipe.optim, recipe.augment.crop_scale
    if not recipe.name or recipe.name in (".", "..") or {"/", "\\", "\0"} & set(recipe.name):
        yield "name", "names a folder: it must not be empty, nor have slashes"
    for knob, has_sizes in (("model.args", recipe.model.name.startswith("riformer_")), ("teacher.args", False)):
        for argument in value_of(recipe, knob):
            if argument in SET_ELSEWHERE and (has_sizes or argument not in SIZES):
                yield knob, f"{argument} is set by {SET_ELSEWHERE[argument]}"
    part, rest = divmod(optim.batch_size, optim.accumulation)
    if low > high:
        yield "augment.crop_scale", "the smaller share comes first"
    if optim.min_lr > optim.lr:
        yield "optim.min_lr", f"must be at most --optim.lr, {optim.lr:g}"
    if optim.warmup_epochs >= optim.epochs:
        yield "optim.warmup_epochs", f"must be below --optim.epochs, {optim.epochs}"
    if rest:
        yield "optim.batch_size", f"does not divide by --optim.accumulation, {optim.accumulation}"
    elif part % 2 and recipe.augment.mixes:
        yield "optim.batch_size", f"mixup and cutmix need an even number of images in each part, not {part}"


def _between_student_and_teachers(recipe: Recipe) -> Iterator[tuple[str, str]]:
    model, distill, research = recipe.model, recipe.distill, recipe.research
    learns, teachers = distill.soft_weight or distill.hard_weight, distill.logit_teachers
    fits = research.fit_affine_batches and distill.module_teacher
    num_shares = len(research.logit_teacher_weights)
    needed = distill.imitates or distill.start_from_teacher
    if not any(distill.weights.values()):
        yield "distill.label_weight", "the other weights are 0 too: nothing would be learned"
    elif not learns and not distill.label_weight:
        yield "distill.label_weight", "the soft and hard weights are 0 too: the classifier would learn nothing"
    if learns and not teachers:
        yield "distill.logit_teacher", "--distill.soft-weight or --distill.hard-weight needs one"
    if teachers and not learns:
        yield "distill.logit_teacher", "has no effect: --distill.soft-weight and --distill.hard-weight are 0"
    if len(set(teachers)) < len(teachers):
        yield "distill.logit_teacher", "names one twice; --research.logit-teacher-weights gives shares"
    if len(teachers) > 1 and num_shares not in (0, len(teachers)):
        yield "research.logit_teacher_weights", f"there are {len(teachers)} logit teachers; give each a weight"
    if needed and not distill.module_teacher:
        yield "distill.module_teacher", "imitation and --distill.start-from-teacher need one"
    if distill.module_teacher and not needed:
        yield "distill.module_teacher", "has no effect: nothing imitates it, and --distill.start-from-teacher is off"
    if model.start and distill.start_from_teacher:
        yield "model.start", "--distill.start-from-teacher would overwrite it; set one of the two"
    if fits and ("affine" not in model.mixer or not model.name.startswith("riformer_")):
        yield "research.fit_affine_batches", f"{model.name} has no affine here"
    if fits and not distill.start_from_teacher:
        yield (
            "research.fit_affine_batches",
            "affines are fitted behind the teacher's norms: set --distill.start-from-teacher",
        )


def _about_kept_outputs(recipe: Recipe) -> Iterator[tuple[str, str]]:
    distill, knob = recipe.distill, "distill.cache_augmentations"
    imitates_to_the_end = distill.imitates and (distill.schedule != "first_phase" or recipe.research.phase == 1)
    if not distill.cache_augmentations:
        return
    if recipe.augment.mixes:
        yield knob, "mixup and cutmix mix images of a batch: set --augment.mixup 0 and --augment.cutmix 0"
    if distill.cache_augmentations >= recipe.optim.epochs:
        yield knob, f"must be below the {recipe.optim.epochs} epochs: the logit teacher would run in each of them"
    if imitates_to_the_end and set(distill.logit_teachers) == {distill.module_teacher}:
        yield (
            knob,
            "has no effect: the logit teacher is the module teacher, which imitation needs in every step; let "
            "imitation end (--distill.schedule first_phase and --research.phase below 1), or set its weights to 0",
        )
