"""Recipes and the checks on them."""

import dataclasses
import json
import re

import pytest
import timm

import riformer
from riformer.config import DistillConfig, ModelConfig, OptimConfig, Recipe, check, from_dict, to_dict
from riformer.measure.cost import gpu_hours
from riformer.model.variants import VARIANTS
from riformer.recipes import (
    DEFAULT_RUNGS,
    DEPTHS,
    FULL,
    RECIPES,
    RUNGS,
    at_budget,
    labels,
    labels_long,
    teacher_recipe,
)


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("name", RECIPES)
def test_every_rung_of_every_recipe_is_sound_and_round_trips_or_says_why_not(name, rung):
    if rung in ("mixer-first", "mixer-last", "deeper") and name.startswith("gfnet"):
        with pytest.raises(ValueError, match=r"model\.name is 'gfnet_h_\w+', but this rung is of riformer_s12, "):
            RUNGS[rung](RECIPES[name]())
        return
    recipe = RUNGS[rung](RECIPES[name]())
    assert recipe.name.startswith(name)
    assert from_dict(json.loads(json.dumps(to_dict(recipe)))) == recipe
    check(teacher_recipe(recipe)) if recipe.distill.trains_teacher else None
    if rung in ("hard", "soft", "affine", "hard-alone", "soft-labels", "soft-t2", "soft-t4") and name in BASELINES:
        with pytest.raises(ValueError, match="logit_teacher is '', but soft_weight or hard_weight needs one"):
            check(recipe)
    elif rung == "imitation-first-phase" and (name in BASELINES or name.endswith("-384")):
        with pytest.raises(
            ValueError, match="schedule is 'first_phase', but has no effect: the imitation weights are 0"
        ):
            check(recipe)
    elif rung == "fitted" and (name in BASELINES or name.endswith("-384")):
        with pytest.raises(
            ValueError, match="fit_affine_batches is 8, but affines are fitted behind the teacher's norms"
        ):
            check(recipe)
    elif rung in OWN_MIXERS and name.startswith("gfnet"):
        with pytest.raises(ValueError, match=r"model\.mixer is .*gfnet_h_\w+ is no riformer_"):
            check(recipe)
    else:
        check(recipe)


OWN_MIXERS = ("mixer", "identity", "deleted", "overlap")
BASELINES = ("glyphs", "poolformer-s12", "identityformer-s12", "gfnet-h-ti", "gfnet-h-s", "gfnet-h-b")


def test_every_recipe_has_one_line_about_it_and_every_rung():
    for entry in (*RECIPES.values(), *RUNGS.values()):
        assert re.fullmatch(r"[^\n]{10,118}\.", entry.__doc__.splitlines()[0])


PUBLISHED = {  # top-1
    **{"s12": "76.90", "s24": "80.28", "s36": "81.29", "m36": "82.57", "m48": "82.75"},
    **{"s12-384": "78.29", "s24-384": "81.36", "s36-384": "82.22", "m36-384": "83.39", "m48-384": "83.70"},
    **{"s12-120": "75.36", "poolformer-s12": "77.2", "identityformer-s12": "74.6"},
    **{"gfnet-h-ti": "80.1", "gfnet-h-s": "81.5", "gfnet-h-b": "82.9"},
}


def test_published_rows_are_those_of_published_py():
    assert PUBLISHED.keys() == {name for name in RECIPES if RECIPES[name].__module__ == "riformer.published"}
    for name in PUBLISHED:
        assert RECIPES[name]().name == name


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_row_says_its_command_cost_and_result(name):
    text = RECIPES[name].__doc__
    assert re.search(r"Command: torchrun --nproc-per-node 8 -m riformer train --recipe ([\w-]+)", text)[1] == name
    assert re.search(r"Cost: ([\d,]+) GPU-hours on paper\.", text)[1] == f"{gpu_hours(RECIPES[name]()):,.0f}"
    assert re.search(r"Expected: .*?top-1 ([\d.]+\d), published", text)[1] == PUBLISHED[name]
    assert "Source: " in text


@pytest.mark.parametrize(
    ("name", "drop_path", "crop"),
    [("s12", 0.1, 0.9), ("s24", 0.1, 0.9), ("s36", 0.2, 0.9), ("m36", 0.3, 0.95), ("m48", 0.4, 0.95)],
)
def test_the_published_settings(name, drop_path, crop):
    first, second = RECIPES[name](), RECIPES[f"{name}-384"]()
    for recipe in (first, second):
        assert (recipe.model.name, recipe.model.mixer) == (f"riformer_{name}", "affine")
        assert (recipe.model.drop_path_rate, recipe.data.crop_pct) == (drop_path, crop)
        augment = recipe.augment
        assert (augment.mixup, augment.cutmix, augment.random_erasing) == (0.8, 1.0, 0.25)
        assert augment.auto_augment == "rand-m9-mstd0.5-inc1"
        assert (recipe.optim.name, recipe.optim.weight_decay, recipe.optim.min_lr) == ("adamw", 0.05, 1e-5)
        assert recipe.distill.label_weight == 0.0
        assert recipe.distill.logit_teacher == "timm:gfnet_h_b@gfnet-h-b.pth"
    assert (first.optim.epochs, first.data.img_size) == (600, 224)
    assert first.optim.lr / first.optim.batch_size == pytest.approx(1e-3 / 1024)
    assert first.distill.module_teacher == f"timm:poolformer_{name}"
    assert (second.optim.epochs, second.data.img_size) == (30, 384)
    assert second.model.start == f"runs/{first.name}-seed0"


def test_the_rungs_of_the_papers_ladder():
    recipe = RECIPES["s12-120"]()
    rungs = {name: RUNGS[name](recipe) for name in ("mixer", "identity", "hard", "soft", "affine", "imitation", "full")}
    mixers = {name: rung.model.mixer for name, rung in rungs.items()}
    assert mixers == {
        **dict.fromkeys(("identity", "hard", "soft"), "identity"),
        **dict.fromkeys(("affine", "imitation", "full"), "affine"),
        "mixer": "pooling",
    }
    weights = {
        name: (rung.distill.label_weight, rung.distill.hard_weight, rung.distill.soft_weight, rung.distill.mixer_weight)
        for name, rung in rungs.items()
    }
    assert weights == {
        **dict.fromkeys(("mixer", "identity"), (1, 0, 0, 0)),
        "hard": (0.5, 0.5, 0, 0),
        **dict.fromkeys(("soft", "affine"), (0, 0, 1, 0)),
        **dict.fromkeys(("imitation", "full"), (0, 0, 1, 1)),
    }
    assert [name for name, rung in rungs.items() if rung.distill.start_from_teacher] == ["full"]
    more = {name: RUNGS[name](recipe) for name in RUNGS if name not in ("labels", "labels-long", *rungs)}
    assert len(more) == 16
    assert more["mixer-first"].model.mixer == ("pooling", "affine", "affine", "affine")
    assert more["mixer-last"].model.mixer == ("affine", "affine", "affine", "pooling")
    assert (more["overlap"].model.mixer, more["overlap"].model.down_patch) == ("nothing", 6)
    assert (more["deeper"].model.mixer, more["deeper"].model.depths) == ("nothing", (2, 2, 7, 2))
    assert more["fitted"].distill == dataclasses.replace(recipe.distill, fit_affine_batches=8)
    assert more["deleted"].model.mixer == "nothing"
    assert (more["soft-labels"].distill.label_weight, more["soft-labels"].distill.soft_weight) == (0.5, 0.5)
    assert more["hard-alone"].distill.weights == {**rungs["hard"].distill.weights, "label": 0.0, "hard": 1.0}
    assert more["soft-t4"].distill == dataclasses.replace(rungs["soft"].distill, temperature=4.0)
    for term in ("block", "mixer", "relation"):
        weights = more[f"imitation-{term}"].distill.weights
        assert [name for name in ("block", "mixer", "relation") if weights[name]] == [term]
    imitation = rungs["imitation"].distill
    for schedule in ("constant", "first_phase"):
        varied = more[f"imitation-{schedule.replace('_', '-')}"].distill
        assert varied == dataclasses.replace(imitation, schedule=schedule)
    assert more["start"].distill == dataclasses.replace(
        rungs["affine"].distill, **{"module_teacher": recipe.distill.module_teacher, "start_from_teacher": True}
    )
    for rung in (*rungs.values(), *more.values()):  # and in nothing else
        changed = dataclasses.replace(rung, name=recipe.name, model=recipe.model, distill=recipe.distill)
        assert changed == recipe
    assert RUNGS["mixer"](RECIPES["quickstart"]()).model.mixer == "global_filter"


def test_rungs_know_the_depths_of_the_networks():
    assert {name: sizes["depths"] for name, sizes in VARIANTS.items()} == DEPTHS


def test_a_budget_multiplies_the_epochs_of_student_and_teacher():
    recipe = RECIPES["glyphs"]()
    long = at_budget(recipe, 3)
    assert (long.name, long.optim.epochs, long.teacher.epochs) == ("glyphs-3x", 27, 27)
    assert long.optim.warmup_epochs == pytest.approx(3 * recipe.optim.warmup_epochs)
    same = {"epochs": recipe.optim.epochs, "warmup_epochs": recipe.optim.warmup_epochs}
    back = dataclasses.replace(long, name=recipe.name, optim=dataclasses.replace(long.optim, **same))
    assert dataclasses.replace(back, teacher=recipe.teacher) == recipe
    with pytest.raises(ValueError, match="a budget is 0; it must be 1 or more"):
        at_budget(recipe, 0)


def test_the_rungs_of_a_ladder_are_the_controls_unless_told_otherwise():
    assert DEFAULT_RUNGS == ("labels", "labels-long", "full")
    assert RUNGS.keys() > set(DEFAULT_RUNGS)


def test_gpu_hours_add_up():
    recipe = RECIPES["s12"]()
    images = 600 * 1_281_167
    hours = images * (3 / 4899.80 + 1 / 4160.18 + 1 / 939.20) / 3600
    assert gpu_hours(recipe) == pytest.approx(hours)
    assert gpu_hours(recipe, 1000) == pytest.approx(hours * 1000 / 1_281_167)
    assert gpu_hours(labels(recipe)) == pytest.approx(images * 3 / 4899.80 / 3600)
    own = dataclasses.replace(recipe, distill=dataclasses.replace(FULL, schedule="constant"))
    teachers = 300 * 1_281_167 * 3 / 4160.18 / 3600
    assert gpu_hours(own) == pytest.approx(images * (3 / 4899.80 + 1 / 4160.18) / 3600 + teachers)
    larger = dataclasses.replace(labels(recipe), data=dataclasses.replace(recipe.data, img_size=384))
    assert gpu_hours(larger) == pytest.approx(gpu_hours(labels(recipe)) * 5.355 / 1.822, rel=1e-3)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": "resnet18", "mixer": "affine"}, "no throughput is published of 'resnet18'"),
        ({"mixer": "attention"}, "no throughput is published of 'riformer_s12 with the mixer attention'"),
        ({"depths": (1, 1)}, "of riformer_s12 with other sizes than its own"),
    ],
)
def test_gpu_hours_of_what_was_never_published(model, message):
    with pytest.raises(ValueError, match=message):
        gpu_hours(labels(Recipe(model=ModelConfig(**model))))


def test_a_teacher_differs_from_its_student_in_the_mixers_alone():
    recipe = RECIPES["quickstart"]()
    student, teacher = (
        timm.create_model(r.model.name, mixer=r.model.mixer, img_size=r.data.img_size)
        for r in (recipe, teacher_recipe(recipe))
    )
    riformer.start_from(student, teacher.state_dict())


def test_controls_differ_from_the_recipe_in_what_they_learn_from_and_for_how_long():
    recipe = RECIPES["quickstart"]()
    control, long = labels(recipe), labels_long(recipe)
    assert dataclasses.replace(control, name=recipe.name, distill=recipe.distill) == recipe
    assert long.optim.epochs == recipe.optim.epochs + recipe.teacher.epochs
    assert control.distill == long.distill == DistillConfig()


@pytest.mark.parametrize(
    ("distill", "message"),
    [
        ({"label_weight": 0.0}, "every weight in distill is 0"),
        ({"label_weight": 0.0, "mixer_weight": 1.0, "module_teacher": "own"}, "the classifier would learn nothing"),
        ({"soft_weight": -1.0}, r"distill\.soft_weight is -1\.0, but must lie in 0 to inf"),
        ({"mixer_weight": float("nan")}, r"distill\.mixer_weight is nan"),
        ({"hard_weight": 1.0}, "logit_teacher is '', but soft_weight or hard_weight needs one"),
        ({"logit_teacher": "own"}, "soft_weight and hard_weight are 0"),
        ({"block_weight": 1.0}, "module_teacher is '', but imitation or the start needs one"),
        ({"start_from_teacher": True}, "module_teacher is ''"),
        ({"module_teacher": "own"}, "nothing is taken from it"),
        ({"schedule": "cosine"}, "has no effect: the imitation weights are 0"),
        ({"positions": "all"}, "has no effect: the imitation weights are 0"),
        ({"block_match": "raw"}, "has no effect: block_weight is 0"),
        ({"relation_tokens": 9}, "has no effect: relation_weight is 0"),
        ({"phase": 0.3}, "has no effect: schedule is not first_phase"),
        ({"temperature": 2.0}, "has no effect: soft_weight is 0"),
        ({"temperature": 0.0}, "temperature is 0.0, but must lie in"),
        ({"teacher_img_size": 64}, "has no effect: no teacher is named"),
        ({"compile_teachers": True}, "has no effect: no teacher is named"),
        (
            {"logit_teacher": ("a", "b"), "soft_weight": 1.0, "logit_teacher_weights": (1.0,)},
            "there are 2 logit teachers",
        ),
        ({"logit_teacher": ("a", "b"), "soft_weight": 1.0, "logit_teacher_weights": (1.0, 0.0)}, "must be positive"),
        ({"phase": 2.0}, "phase is 2.0, but must lie in"),
        ({"cache_augmentations": 2}, r"cache_augmentations is 2, but has no effect: no logit teacher is named"),
        ({"cache_augmentations": -1}, r"cache_augmentations is -1, but must lie in 0"),
        ({"cache_top_k": 5}, "cache_top_k is 5, but has no effect: cache_augmentations is 0"),
        ({"soft_weight": 1.0, "logit_teacher": "own", "cache_augmentations": 2}, r"augment\.mixup and augment\.cutmix"),
        ({"soft_weight": 1.0, "logit_teacher": "own", "cache_augmentations": 300}, "must be below the 300 epochs"),
    ],
)
def test_contradictions_in_distill_are_named(distill, message):
    with pytest.raises(ValueError, match=message):
        check(Recipe(distill=DistillConfig(**distill)))


@pytest.mark.parametrize(
    ("knobs", "sound"),
    [
        ({"module_teacher": "own"}, False),
        ({"module_teacher": "own", "schedule": "cosine"}, False),
        ({"module_teacher": "own", "schedule": "first_phase", "phase": 1.0}, False),
        ({"module_teacher": "own", "schedule": "first_phase"}, True),
        ({"module_teacher": "timm:another"}, True),
        ({"module_teacher": "own", "logit_teacher": ("own", "timm:another")}, True),
    ],
)
def test_keeping_outputs_of_a_teacher_that_runs_in_every_step_all_the_same_is_refused(knobs, sound):
    still = dataclasses.replace(Recipe().augment, mixup=0.0, cutmix=0.0)
    kept = {"logit_teacher": "own", "soft_weight": 1.0, "block_weight": 1.0, "cache_augmentations": 9, **knobs}
    recipe = Recipe(distill=DistillConfig(**kept), augment=still)
    if sound:
        check(recipe)
    else:
        with pytest.raises(ValueError, match="which imitation needs in every step"):
            check(recipe)


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        ({"epochs": 0}, r"optim\.epochs is 0, but must lie in 1 to inf"),
        ({"lr": -1.0}, r"optim\.lr is -1\.0"),
        ({"lr": 1e-3, "min_lr": 1e-2}, r"optim\.min_lr is 0\.01, but must lie in 0 to 0\.001"),
        ({"label_smoothing": 5.0}, r"optim\.label_smoothing is 5\.0"),
        ({"clip_grad": -1.0}, r"optim\.clip_grad is -1\.0"),
        ({"batch_size": 10, "accumulation": 3}, "does not divide by accumulation 3"),
        ({"batch_size": 6, "accumulation": 2}, "need even batches, not 3"),
        ({"epochs": 5, "warmup_epochs": 5}, "must be below the 5 epochs"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
    ],
)
def test_contradictions_in_optim_are_named(optim, message):
    with pytest.raises(ValueError, match=message):
        check(Recipe(optim=OptimConfig(**optim)))


def test_contradictions_elsewhere_are_named():
    data = dataclasses.replace(Recipe().data, img_size=0, num_workers=-2, root="/somewhere")
    with pytest.raises(
        ValueError,
        match=r"img_size is 0(.|\n)*num_workers is -2(.|\n)*only fashion-mnist, cifar10, cifar100, glyphs have one",
    ):
        check(Recipe(data=data))


def test_the_defaults_are_sound():
    check(Recipe())


@pytest.mark.parametrize("value", ["ten", 1.5, True, None])
def test_a_value_of_another_type_in_a_file_is_named(value):
    with pytest.raises(ValueError, match=r"OptimConfig\.epochs is .*; it must be of type int"):
        from_dict({"optim": {"epochs": value}})


def test_an_unknown_knob_in_a_file_is_named():
    with pytest.raises(ValueError, match="OptimConfig has no 'learning_rate'"):
        from_dict({"optim": {"learning_rate": 1}})


def test_a_start_that_the_teachers_weights_would_overwrite_is_refused():
    recipe = RECIPES["quickstart"]()
    started = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, start="runs/first"))
    with pytest.raises(
        ValueError, match=r"model\.start is 'runs/first', but distill\.start_from_teacher would overwrite it"
    ):
        check(started)
