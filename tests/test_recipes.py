"""Recipes and the checks on them."""

import dataclasses
import json
import re

import pytest
import timm
from timm.data import create_transform

import riformer
from riformer.config import (
    DistillConfig,
    ModelConfig,
    Recipe,
    TeacherConfig,
    check,
    from_dict,
    to_dict,
)
from riformer.data.batches import preprocessing
from riformer.measure.cost import gpu_hours
from riformer.recipes import (
    DEFAULT_RUNGS,
    FULL,
    RECIPES,
    RUNGS,
    at_budget,
    labels,
    labels_long,
    teacher_recipe,
)
from riformer.train.run import Run


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
        with pytest.raises(ValueError, match=r"--distill\.logit-teacher is '', but"):
            check(recipe)
    elif rung == "imitation-first-phase" and (name in BASELINES or name.endswith("-384")):
        with pytest.raises(
            ValueError, match="schedule is 'first_phase', but has no effect: the weights of imitation are 0"
        ):
            check(recipe)
    elif rung == "fitted" and (name in BASELINES or name.endswith("-384")):
        with pytest.raises(ValueError, match="fit-affine-batches is 8, but has no effect: no module teacher is named"):
            check(recipe)
    elif rung in OWN_MIXERS and name.startswith("gfnet"):
        with pytest.raises(ValueError, match=r"model\.(mixer|down-patch) is .*gfnet_h_\w+ is no riformer_"):
            check(recipe)
    else:
        check(recipe)


OWN_MIXERS = ("mixer", "identity", "deleted", "overlap")
BASELINES = ("glyphs-overlap", "poolformer-s12", "identityformer-s12", "gfnet-h-ti", "gfnet-h-s", "gfnet-h-b")


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


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_row_says_its_command_cost_and_result(name):
    text = RECIPES[name].__doc__
    assert re.search(r"Command: torchrun --nproc-per-node 8 -m riformer train --recipe ([\w-]+)", text)[1] == name
    assert re.search(r"Cost: ([\d,]+) GPU-hours on paper\.", text)[1] == f"{gpu_hours(RECIPES[name]()):,.0f}"
    assert re.search(r"Expected: .*?top-1 ([\d.]+\d), published", text)[1] == PUBLISHED[name]
    assert "Source: " in text


@pytest.mark.parametrize(
    ("name", "resized"),
    [("s12", (248, 426)), ("s24", (248, 426)), ("s36", (248, 426)), ("m36", (236, 404)), ("m48", (236, 404))],
)
def test_the_published_settings(name, resized):
    first, second = RECIPES[name](), RECIPES[f"{name}-384"]()
    for recipe, shorter_side in zip((first, second), resized, strict=True):
        resize = create_transform(**dataclasses.asdict(preprocessing(recipe.data))).transforms[0]
        assert resize.size == shorter_side
        assert (recipe.model.name, recipe.model.mixer) == (f"riformer_{name}", "affine")
        assert (recipe.model.drop_path_rate, recipe.optim.clip_grad) == (0.1, 5.0)
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
    assert more["fitted"].research == dataclasses.replace(recipe.research, fit_affine_batches=8)
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
        assert dataclasses.replace(changed, research=recipe.research) == recipe
    assert RUNGS["mixer"](RECIPES["quickstart"]()).model.mixer == "global_filter"


def test_a_budget_multiplies_the_epochs_of_student_and_teacher():
    recipe = RECIPES["glyphs-riformer"]()
    long = at_budget(recipe, 3)
    assert (long.name, long.optim.epochs, long.teacher.epochs) == ("glyphs-riformer-3x", 27, 27)
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
    own = dataclasses.replace(
        recipe, distill=dataclasses.replace(FULL, schedule="constant"), teacher=TeacherConfig(epochs=300)
    )
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
    same = {"name": recipe.name, "distill": recipe.distill, "teacher": recipe.teacher}
    assert dataclasses.replace(control, **same) == recipe
    assert control.teacher == TeacherConfig()
    assert long.optim.epochs == recipe.optim.epochs + recipe.teacher.epochs
    assert control.distill == long.distill == DistillConfig()


def test_a_run_that_an_earlier_version_began_is_the_run_of_the_same_recipe(tmp_path):
    """It had research knobs in distill, and kept the settings of a teacher that its rung does not train."""
    base = RECIPES["quickstart"]()
    for recipe in (base, labels(base)):
        old = to_dict(recipe)
        old["distill"] |= old.pop("research")
        old["teacher"] = to_dict(base)["teacher"]
        run = Run(tmp_path / recipe.name)
        run.path.mkdir()
        run.write("recipe.json", old)
        (run.path / "last").mkdir()  # so that another recipe would be refused
        run.begin(recipe, world_size=1)
        assert run.recipe() == recipe
        with pytest.raises(ValueError, match="holds a run of another recipe"):
            run.begin(dataclasses.replace(recipe, seed=1), world_size=1)


def test_a_named_teacher_of_this_package_has_its_sizes_from_its_arguments():
    """The knobs of the student are not its; other arguments reach the network as they are."""
    args = {"mixer": "pooling", "depths": [1, 1], "dims": [8, 8], "init_std": 0.1}
    recipe = dataclasses.replace(RECIPES["quickstart"](), teacher=TeacherConfig(name="riformer_micro", args=args))
    check(recipe)
    model = teacher_recipe(recipe).model
    assert (model.mixer, model.depths, model.dims, model.args) == ("pooling", (1, 1), (8, 8), {"init_std": 0.1})
    check(teacher_recipe(recipe))
    with pytest.raises(ValueError, match=r"--teacher\.args is .*, but num_classes is set by the data"):
        check(dataclasses.replace(recipe, teacher=dataclasses.replace(recipe.teacher, args={"num_classes": 3})))
