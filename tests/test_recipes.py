"""Recipes and the checks on them."""

import dataclasses
import json

import pytest
import timm
import torch

import riformer
from riformer.config import DistillConfig, OptimConfig, Recipe, check, from_dict, to_dict
from riformer.recipes import RECIPES, RUNGS, labels, labels_long, teacher_recipe


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_sound_round_trips_and_builds_on_the_meta_device(name, rung):
    recipe = RUNGS[rung](RECIPES[name]())
    for one in (recipe, teacher_recipe(recipe)):
        check(one)
        assert from_dict(json.loads(json.dumps(to_dict(one)))) == one
        with torch.device("meta"):
            model = timm.create_model(one.model.name, mixer=one.model.mixer, img_size=one.data.img_size, num_classes=7)
        assert model.num_classes == 7
    assert recipe.name.startswith(name)


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
    with pytest.raises(ValueError, match=r"img_size is 0(.|\n)*num_workers is -2(.|\n)*only fashion-mnist has one"):
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
