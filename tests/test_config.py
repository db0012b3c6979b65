"""Values and combinations that a recipe may have, wherever it comes from: Python, a file or the command line."""

import dataclasses
import json
import math
from dataclasses import fields, is_dataclass, replace
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest

from riformer.config import (
    AugmentConfig,
    DataConfig,
    DistillConfig,
    ModelConfig,
    OptimConfig,
    Recipe,
    ResearchConfig,
    TeacherConfig,
    check,
    from_dict,
    reset_unused,
    to_dict,
    upgrade,
)
from riformer.config.knobs import option, value_of, with_value
from riformer.recipes import FULL, LABELS, RECIPES, quickstart

KNOBS = {"name": str, "seed": int}
for _section in fields(Recipe):
    if is_dataclass(kind := get_type_hints(Recipe)[_section.name]):
        hints = get_type_hints(kind, include_extras=True)
        KNOBS |= {f"{_section.name}.{name}": hint for name, hint in hints.items()}


def wrong_values(hint: Any) -> list[Any]:
    """Values that are near to what the hint allows, and are not allowed."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        ranges = [args[1]]
        outside = [end for span in ranges for end in (span.low - 1, span.high + 1, span.above, span.below)]
        kind = int if args[0] is int else float
        return wrong_values(args[0]) + [kind(value) for value in outside if math.isfinite(value)]
    if origin is Literal:
        return [None, args[0].upper(), args[0][:-1], f"{args[0]} ", "", 0]
    if origin is tuple:
        inner = [wrong for wrong in wrong_values(args[0]) if wrong is not None] + [None]
        length = 2 if args[-1] is Ellipsis else len(args)
        right = 1 if float not in get_args(args[0]) and args[0] is not float else 0.5
        right = "last" if args[0] is str else right
        fixed = [] if args[-1] is Ellipsis else [(right,) * (length - 1), (right,) * (length + 1), ()]
        return [*fixed, right, [right] * length, *((right,) * (length - 1) + (value,) for value in inner)]
    if origin in (Union, UnionType):
        arms = [arm for arm in args if arm is not type(None)]
        return [] if str in arms else [wrong for wrong in wrong_values(arms[0]) if wrong is not None]
    if origin is dict:
        return [None, [], "{}", {1: 2}, {"a": math.nan}, {"a": object()}, {"a": {"b": {3}}}]
    if hint is float:
        return [None, "0.5", True, math.nan, math.inf, -math.inf, (0.5,), 1j]
    if hint is int:
        return [None, "1", True, 1.0, 1.5, math.nan, (1,)]
    if hint is bool:
        return [None, 0, 1, "true", ""]
    assert hint is str, hint
    return [None, 0, ("a",), b"digits"]


@pytest.mark.parametrize("knob", KNOBS)
def test_a_value_that_the_type_of_its_knob_does_not_allow_is_refused_and_named(knob):
    wrong = wrong_values(KNOBS[knob])
    assert wrong or knob in ("model.mixer", "distill.logit_teacher", "research.positions")
    for value in wrong or [None, 0, ("a", 1), ["a"], ("a", None)]:
        recipe = with_value(Recipe(), knob, value)
        with pytest.raises(ValueError, match="but must be") as error:
            check(recipe)
        assert f"{option(knob)} is {value!r}, but must be" in str(error.value)
        if not isinstance(value, list):  # which in a file is a tuple
            with pytest.raises(ValueError, match="but must be"):
                from_dict(with_lists(to_dict(recipe)))


def with_lists(values: dict) -> dict:
    """The values as a file holds them, with lists for tuples."""
    return {
        name: list(value) if isinstance(value, tuple) else with_lists(value) if isinstance(value, dict) else value
        for name, value in values.items()
    }


@pytest.mark.parametrize(
    ("knob", "value", "message"),
    [
        ("research.block_match", "normalized", "must be 'normalised' or 'raw'; did you mean 'normalised'?"),
        ("distill.schedule", "linear", "must be 'constant' or 'cosine' or 'first_phase'"),
        ("optim.precision", "fp16", "must be 'fp32' or 'bf16'; did you mean 'bf16'?"),
        ("data.on_bad", "ignore", "must be 'error' or 'skip'"),
        ("augment.policy", "Timm", "must be 'timm' or 'warp'; did you mean 'timm'?"),
        ("data.std", (0.2, 0.0, 0.2), "must be 3 numbers above 0 and at most 1"),
        ("data.mean", (123.7, 116.3, 103.5), "must be 3 numbers at least 0 and at most 1"),
        ("data.mean", [0.5, 0.5, 0.5], "must be 3 numbers at least 0 and at most 1; give a tuple"),
        ("augment.crop_scale", (1.0, 0.1), "the smaller share comes first"),
        ("augment.crop_scale", (0.0, 1.0), "must be 2 numbers above 0 and at most 1"),
        ("model.depths", (2, 0), "must be whole numbers at least 1 or null"),
        ("model.args", {"init_std": math.nan}, "must be a dict of JSON values"),
        ("model.args", {"mixer": "pooling"}, "mixer is set by --model.mixer"),
        ("model.args", {"pretrained": True}, "pretrained is set by --model.start"),
        ("model.args", {"num_classes": 7}, "num_classes is set by the data"),
        ("distill.logit_teacher", ("timm:a", "timm:a"), "names one twice"),
        ("name", "", "names a folder: it must not be empty"),
        ("name", "../elsewhere", "names a folder: it must not be empty, nor have slashes"),
        ("seed", 0.5, "must be a whole number"),
        ("seed", -1, "must be a whole number at least 0 and below 4,294,967,296"),
    ],
)
def test_what_is_allowed_is_said(knob, value, message):
    with pytest.raises(ValueError, match="but") as error:
        check(with_value(Recipe(), knob, value))
    assert message in str(error.value)


def test_a_section_of_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"--optim is \{'lr': 1\}, but must be a OptimConfig"):
        check(Recipe(optim={"lr": 1}))
    with pytest.raises(ValueError, match="optim is 3, but must be an object with name, lr"):
        from_dict({"optim": 3})
    with pytest.raises(ValueError, match="Recipe is None, but must be an object with name, seed"):
        from_dict(upgrade(None))


def test_the_right_values_are_taken():
    """The negative control of the refusals."""
    recipe = Recipe(
        data=DataConfig(mean=(0, 0.5, 1), std=(1, 1, 1)),
        model=ModelConfig(mixer=("pooling", "affine"), depths=(1, 1), dims=None, args={"a": [1, {"b": None}]}),
        augment=AugmentConfig(crop_scale=(1.0, 1.0)),
        optim=OptimConfig(lr=1, warmup_epochs=0),
    )
    check(recipe)
    assert from_dict(json.loads(json.dumps(to_dict(recipe)))) == recipe


FROM_OWN = replace(FULL, block_weight=0.0, mixer_weight=0.0, relation_weight=0.0, schedule="constant")
RESNET = TeacherConfig(name="resnet18")
IDLE = [  # a recipe in which each of these changes nothing, and what gives them an effect
    (Recipe(), "teacher.name", "resnet18", {"distill": FULL}),
    (Recipe(), "teacher.mixer", "attention", {"distill": FULL}),
    (Recipe(), "teacher.epochs", 5, {"distill": FULL}),
    (Recipe(), "teacher.lr", 0.1, {"distill": FULL}),
    (
        Recipe(distill=FULL, teacher=TeacherConfig(name="resnet18")),
        "teacher.mixer",
        "attention",
        {"teacher": TeacherConfig()},
    ),
    (Recipe(distill=FULL), "teacher.args", {"a": 1}, {"teacher": RESNET}),
    (
        Recipe(distill=DistillConfig(logit_teacher="a", label_weight=0.0, soft_weight=1.0)),
        "optim.label_smoothing",
        0.3,
        {"distill": FULL},
    ),
    (Recipe(), "augment.color_jitter", 0.1, {"augment": AugmentConfig(auto_augment="")}),
    (Recipe(), "augment.color_jitter", 0.0, {"augment": AugmentConfig(auto_augment="3a")}),
    (Recipe(augment=AugmentConfig(policy="warp")), "augment.hflip", 0.0, {"augment": AugmentConfig()}),
    (Recipe(), "data.on_bad", "skip", {"data": DataConfig(name="folder:photos")}),
    (Recipe(), "data.val_fraction", 0.5, {"data": DataConfig(name="folder:photos")}),
    (Recipe(), "data.root", "/data", {"data": DataConfig(name="cifar10")}),
    (Recipe(model=ModelConfig(name="resnet18")), "model.depths", (1, 1), {"model": ModelConfig()}),
    (Recipe(distill=FROM_OWN), "distill.schedule", "cosine", {"distill": FULL}),
    (Recipe(), "distill.temperature", 2.0, {"distill": FULL}),
    (Recipe(distill=FULL), "distill.trust_teacher", True, {"distill": replace(FULL, logit_teacher="timm:resnet18")}),
    (Recipe(distill=FULL), "distill.teacher_classes", "names.txt", {"distill": replace(FULL, logit_teacher="a.pth")}),
    (Recipe(), "distill.compile_teachers", True, {"distill": FULL}),
    (Recipe(distill=FULL), "research.phase", 0.3, {"distill": replace(FULL, schedule="first_phase")}),
    (Recipe(), "research.phase", 0.3, {"distill": replace(FULL, schedule="first_phase")}),
    (Recipe(distill=FROM_OWN), "research.positions", "all", {"distill": FULL}),
    (Recipe(), "research.fit_affine_batches", 8, {"distill": FULL}),
    (Recipe(distill=FULL), "research.logit_teacher_weights", (1.0,), None),
]


@pytest.mark.parametrize(("recipe", "knob", "value", "elsewhere"), IDLE)
def test_a_setting_without_effect_is_refused_where_it_has_none_and_nowhere_else(recipe, knob, value, elsewhere):
    check(recipe)
    changed = with_value(recipe, knob, value)
    with pytest.raises(ValueError, match="but has no effect: ") as error:
        check(changed)
    assert f"{option(knob)} is {value!r}, but has no effect: " in str(error.value)
    assert reset_unused(changed) == recipe
    assert reset_unused(changed, since=recipe) == changed  # it was set on purpose
    if elsewhere:
        check(with_value(replace(recipe, **elsewhere), knob, value))


def test_what_a_change_makes_idle_goes_back_to_its_default_and_nothing_else():
    before = replace(quickstart(), data=DataConfig(root="/data"))  # idle before, and to be refused
    after = replace(before, distill=LABELS, optim=replace(before.optim, label_smoothing=0.2))
    settled = reset_unused(after, since=before)
    assert settled == replace(after, teacher=TeacherConfig())
    assert before.teacher != TeacherConfig()


@pytest.mark.parametrize("name", RECIPES)
def test_no_recipe_has_a_setting_without_effect(name):
    recipe = RECIPES[name]()
    check(recipe)
    assert reset_unused(recipe) == recipe
    assert value_of(recipe, "name") == name


@pytest.mark.parametrize(
    ("distill", "message"),
    [
        ({"label_weight": 0.0}, "the other weights are 0 too: nothing would be learned"),
        ({"label_weight": 0.0, "mixer_weight": 1.0, "module_teacher": "own"}, "the classifier would learn nothing"),
        ({"soft_weight": -1.0}, r"--distill\.soft-weight is -1\.0, but must be a number at least 0"),
        ({"mixer_weight": float("nan")}, r"--distill\.mixer-weight is nan, but must be a number"),
        ({"hard_weight": 1.0}, "logit-teacher is '', but --distill.soft-weight or --distill.hard-weight needs one"),
        ({"logit_teacher": "own"}, "soft-weight and --distill.hard-weight are 0"),
        ({"block_weight": 1.0}, "module-teacher is '', but imitation and"),
        ({"start_from_teacher": True}, "module-teacher is ''"),
        ({"module_teacher": "own"}, "has no effect: nothing imitates it"),
        ({"schedule": "cosine"}, "has no effect: the weights of imitation are 0"),
        ({"temperature": 2.0}, "has no effect: --distill.soft-weight is 0"),
        ({"temperature": 0.0}, "temperature is 0.0, but must be a number above 0"),
        ({"teacher_img_size": 64}, "has no effect: no teacher is named"),
        ({"compile_teachers": True}, "has no effect: no teacher is named"),
        ({"cache_augmentations": 2}, r"cache-augmentations is 2, but has no effect: no logit teacher is named"),
        ({"cache_augmentations": -1}, r"cache-augmentations is -1, but must be a whole number at least 0"),
        (
            {"soft_weight": 1.0, "logit_teacher": "own", "cache_augmentations": 2},
            r"augment\.mixup 0 and --augment\.cutmix 0",
        ),
        ({"soft_weight": 1.0, "logit_teacher": "own", "cache_augmentations": 300}, "must be below the 300 epochs"),
    ],
)
def test_contradictions_in_distill_are_named(distill, message):
    with pytest.raises(ValueError, match=message):
        check(Recipe(distill=DistillConfig(**distill)))


TWO_TEACHERS = DistillConfig(logit_teacher=("a", "b"), soft_weight=1.0)


@pytest.mark.parametrize(
    ("research", "distill", "message"),
    [
        ({"positions": "all"}, LABELS, "has no effect: the weights of imitation are 0"),
        ({"block_match": "raw"}, LABELS, "has no effect: --distill.block-weight is 0"),
        ({"relation_tokens": 9}, LABELS, "has no effect: --distill.relation-weight is 0"),
        ({"phase": 0.3}, LABELS, "has no effect: --distill.schedule is not first_phase"),
        ({"phase": 2.0}, LABELS, "phase is 2.0, but must be a number above 0 and at most 1"),
        ({"cache_top_k": 5}, LABELS, "is 5, but has no effect: --distill.cache-augmentations is 0"),
        ({"logit_teacher_weights": (1.0,)}, TWO_TEACHERS, "there are 2 logit teachers"),
        ({"logit_teacher_weights": (1.0, 0.0)}, TWO_TEACHERS, "must be numbers above 0"),
    ],
)
def test_contradictions_in_research_are_named(research, distill, message):
    with pytest.raises(ValueError, match=message):
        check(Recipe(distill=distill, research=ResearchConfig(**research)))


@pytest.mark.parametrize(
    ("knobs", "sound"),
    [
        ({"module_teacher": "own"}, False),
        ({"module_teacher": "own", "schedule": "cosine"}, False),
        ({"module_teacher": "own", "schedule": "first_phase", "research": ResearchConfig(phase=1.0)}, False),
        ({"module_teacher": "own", "schedule": "first_phase"}, True),
        ({"module_teacher": "timm:another"}, True),
        ({"module_teacher": "own", "logit_teacher": ("own", "timm:another")}, True),
    ],
)
def test_keeping_outputs_of_a_teacher_that_runs_in_every_step_all_the_same_is_refused(knobs, sound):
    still = dataclasses.replace(Recipe().augment, mixup=0.0, cutmix=0.0)
    kept = {"logit_teacher": "own", "soft_weight": 1.0, "block_weight": 1.0, "cache_augmentations": 9, **knobs}
    recipe = Recipe(research=kept.pop("research", ResearchConfig()), distill=DistillConfig(**kept), augment=still)
    if sound:
        check(recipe)
    else:
        with pytest.raises(ValueError, match="which imitation needs in every step"):
            check(recipe)


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        ({"epochs": 0}, r"--optim\.epochs is 0, but must be a whole number at least 1"),
        ({"lr": -1.0}, r"optim\.lr is -1\.0"),
        ({"lr": 1e-3, "min_lr": 1e-2}, r"--optim\.min-lr is 0\.01, but must be at most --optim\.lr, 0\.001"),
        ({"label_smoothing": 5.0}, r"--optim\.label-smoothing is 5\.0"),
        ({"clip_grad": -1.0}, r"--optim\.clip-grad is -1\.0"),
        ({"batch_size": 10, "accumulation": 3}, "does not divide by --optim.accumulation, 3"),
        ({"batch_size": 6, "accumulation": 2}, "need an even number of images in each part, not 3"),
        ({"epochs": 5, "warmup_epochs": 5}, "must be below --optim.epochs, 5"),
        ({"ema_decay": 1.0}, "ema-decay is 1.0"),
    ],
)
def test_contradictions_in_optim_are_named(optim, message):
    with pytest.raises(ValueError, match=message):
        check(Recipe(optim=OptimConfig(**optim)))


def test_contradictions_elsewhere_are_named():
    with pytest.raises(ValueError, match=r"data\.img-size is 0(.|\n)*data\.num-workers is -2"):
        check(Recipe(data=DataConfig(img_size=0, num_workers=-2)))
    with pytest.raises(ValueError, match=r"only fashion-mnist, cifar10, cifar100, glyphs have one"):
        check(Recipe(data=DataConfig(root="/somewhere")))


def test_the_defaults_are_sound():
    check(Recipe())


@pytest.mark.parametrize("value", ["ten", 1.5, True, None])
def test_a_value_of_another_type_in_a_file_is_named(value):
    with pytest.raises(ValueError, match=r"--optim\.epochs is .*, but must be a whole number"):
        from_dict({"optim": {"epochs": value}})


def test_a_knob_that_moved_is_named_with_its_place_and_upgraded():
    old = {"distill": {"positions": "all", "label_weight": 0.5}, "seed": 3}
    with pytest.raises(ValueError, match=r"distill\.positions is now research\.positions"):
        from_dict(old)
    recipe = from_dict(upgrade(old))
    assert (recipe.research.positions, recipe.distill.label_weight, recipe.seed) == ("all", 0.5, 3)
    assert "positions" in old["distill"]
    assert upgrade(to_dict(recipe)) == to_dict(recipe)


def test_an_unknown_knob_in_a_file_is_named():
    with pytest.raises(ValueError, match="optim has no 'learning_rate'; it has name, lr, weight_decay"):
        from_dict({"optim": {"learning_rate": 1}})
    with pytest.raises(ValueError, match="optim has no 'epoch'; did you mean 'epochs'"):
        from_dict({"optim": {"epoch": 1}})
    with pytest.raises(ValueError, match="Recipe has no 'optimizer'"):
        from_dict({"optimizer": {}})


def test_a_start_that_the_teachers_weights_would_overwrite_is_refused():
    recipe = quickstart()
    started = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, start="runs/first"))
    with pytest.raises(
        ValueError, match=r"model\.start is 'runs/first', but --distill\.start-from-teacher would overwrite it"
    ):
        check(started)
