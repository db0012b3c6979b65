"""A dry run: its numbers agree with each other, it writes nothing, and it refuses what a training would refuse."""

import os
from dataclasses import replace

import pytest
import timm
import torch

import riformer
from riformer import cli
from riformer.cli import tables
from riformer.cli.options import console
from riformer.config import DistillConfig, ModelConfig, ResearchConfig
from riformer.measure.dryrun import NUM_TIMED, RUN, Projection, _opener, build, count_data, dry_run
from riformer.recipes import RECIPES, RUNGS

TINY = ModelConfig(depths=(1, 1), dims=(8, 16), stem_patch=4, stem_stride=4)


def tiny(name: str = "s12", **distill):
    """The recipe with a network that takes no time, taught by itself."""
    recipe = RECIPES[name]()
    learned = {"logit_teacher": "own", "module_teacher": "own", **distill}
    return replace(
        recipe,
        model=TINY,
        data=replace(recipe.data, img_size=32),
        distill=replace(recipe.distill, **learned),
        optim=replace(recipe.optim, batch_size=16),
    )


def files(folder) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_built_without_data_and_weights(name):
    """On the meta device, where networks of any size take no memory."""
    recipe, notes = RECIPES[name](), []
    recipe = replace(recipe, optim=replace(recipe.optim, ema_decay=0.0))  # timm's average needs a device with memory
    data, note = count_data(recipe)
    with torch.device("meta"):
        opened = _opener(recipe, data, notes)
        training = build(recipe, RUN, data, torch.device("meta"), start=False, opened=opened)
    num_classes = {"quickstart": 10, "small-images": 10, "glyphs-overlap": 34, "glyphs-riformer": 34}.get(name, 1000)
    assert training.model.num_classes == len(data.classes) == num_classes
    assert ("ImageNet-1k's 1,281,167" in note) == (num_classes == 1000)
    num_images = {"quickstart": 1_000, "small-images": 55_000, "glyphs-overlap": 43_010, "glyphs-riformer": 43_010}
    assert len(data.splits["train"]) == num_images.get(name, 1_281_167)
    assert bool(training.logit_teacher) == bool(recipe.distill.logit_teachers)
    assert bool(training.module_teacher) == bool(recipe.distill.module_teacher)
    num_stages = {"quickstart": 2, "small-images": 3, "glyphs-overlap": 2, "glyphs-riformer": 2}.get(name, 4)
    imitation = training.imitation
    assert len(imitation.describe() if imitation else ()) == (num_stages if recipe.distill.block_weight else 0)
    fetched = [reference for reference in recipe.distill.logit_teachers if "@" in reference]
    assert sum("gfnet-h-b.pth is not here yet" in text for text in notes) == len(fetched)


def test_times_add_up_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told: list[str] = []
    teacher, student = dry_run(tiny(), told.append, "cpu")
    assert files(tmp_path) == []
    assert (teacher.name, student.name) == ("s12-teacher", "s12")
    for projection in (teacher, student):
        assert projection.timed_seconds > 0
        assert projection.update_seconds > 0
        assert projection.timed_images == 16 // 4  # a part of the batch
        step = 4 * projection.timed_seconds + projection.update_seconds
        assert projection.step_seconds == pytest.approx(step)
        assert projection.epoch_seconds == pytest.approx(step * (1_281_167 // 16))
        assert projection.total_seconds == pytest.approx(projection.epochs * projection.epoch_seconds)
        assert 10e6 < projection.memory < 100e9
    assert (teacher.epochs, student.epochs) == (120, 600)
    assert student.pairs == [f"stages.{i}.blocks.0 imitates stages.{i}.blocks.0" for i in (0, 1)]
    assert sum("timing step" in text for text in told) == 2 * NUM_TIMED


def test_all_that_a_recipe_can_ask_for_takes_part():
    recipe = tiny("quickstart", logit_teacher=("own", "timm:test_vit"))
    recipe = replace(recipe, research=ResearchConfig(logit_teacher_weights=(1.0, 3.0)))
    optim = replace(recipe.optim, clip_grad=1.0, ema_decay=0.9, precision="bf16")
    with pytest.raises(ValueError, match="has 1000 classes without names, but the data has 10"):
        dry_run(replace(recipe, optim=optim), device="cpu")
    recipe = replace(recipe, optim=optim, data=replace(recipe.data, name=""))
    student = dry_run(recipe, device="cpu")[-1]
    own = "teacher riformer_s12 global_filter"
    assert [line.split(":")[0] for line in student.teachers] == [
        f"logit {own}",
        "logit teacher test_vit",
        f"module {own}",
    ]


def test_on_a_processor_less_than_a_part_of_the_batch_is_timed():
    recipe = tiny()
    recipe = replace(recipe, data=replace(recipe.data, img_size=448), distill=DistillConfig())
    (projection,) = dry_run(recipe, device="cpu")
    assert projection.timed_images == 4
    (projection,) = dry_run(replace(recipe, optim=replace(recipe.optim, accumulation=1)), device="cpu")
    assert projection.timed_images == 4  # 16 x 224 x 224 pixels
    assert "timed 4 images at once, not the 16 of a part; the memory is theirs" in projection.notes
    assert projection.step_seconds == pytest.approx(4 * projection.timed_seconds + projection.update_seconds)


def test_a_folder_is_counted_and_not_read(image_folder):
    (image_folder / "one" / "broken.png").write_bytes(b"not an image")
    recipe = tiny("photos")
    recipe = replace(recipe, data=replace(recipe.data, name=f"folder:{image_folder}", num_workers=0))
    before = files(image_folder.parent)
    projection = dry_run(recipe, device="cpu")[-1]
    assert files(image_folder.parent) == before
    assert "counted the 49 training images" in projection.notes[0]  # of 61: a fifth of each class is held out
    assert projection.steps_per_epoch == 49 // 16
    assert projection.model.endswith("images at 32 px, 3 classes")
    with pytest.raises(ValueError, match="batch-size 64 is more than the 49 training images"):
        dry_run(replace(recipe, optim=replace(recipe.optim, batch_size=64)), device="cpu")


def test_what_lies_on_disk_is_read_and_has_to_fit(tmp_path):
    mixing = {"mixer": "pooling", "depths": TINY.depths, "dims": TINY.dims, "stem_patch": 4, "stem_stride": 4}
    riformer.save(timm.create_model("riformer_s12", **mixing), tmp_path / "teacher")
    path = str(tmp_path / "teacher")
    recipe = tiny(logit_teacher=path, module_teacher=path)
    (projection,) = dry_run(recipe, device="cpu")
    assert not any("random weights" in note for note in projection.notes)
    wider = replace(recipe, model=replace(TINY, dims=(8, 24)))
    with pytest.raises(ValueError, match=r"module teacher, .* does not fit"):
        dry_run(wider, device="cpu")
    start = replace(recipe, model=replace(TINY, mixer="pooling", start=path), distill=DistillConfig())
    dry_run(start, device="cpu")
    with pytest.raises(ValueError, match="does not fit"):
        dry_run(replace(start, model=replace(start.model, dims=(8, 24))), device="cpu")


def test_a_teacher_still_to_be_fetched_has_random_weights_and_is_named():
    (projection,) = dry_run(
        tiny(logit_teacher="timm:test_vit@nowhere.pth", module_teacher="timm:test_convnext", start_from_teacher=False),
        device="cpu",
    )
    assert "nowhere.pth is not here yet: test_vit has random weights" in projection.notes
    assert "nothing is fetched: test_convnext has random weights" in projection.notes


@pytest.mark.parametrize(
    ("distill", "message"),
    [
        ({"logit_teacher": "gone.pth"}, r"gone\.pth is not there.* named timm:NAME@gone\.pth"),
        ({"logit_teacher": "timm:gfnet_h_b"}, "timm has no weights of gfnet_h_b; get a file"),
        ({"logit_teacher": "timm:nonsense"}, "timm:nonsense: .*nonsense"),
        ({"module_teacher": "timm:test_resnet"}, "ResNet is not known as a module teacher|does not fit"),
        ({"soft_weight": 0.0}, "--distill.soft-weight and --distill.hard-weight are 0"),
    ],
)
def test_what_a_training_would_refuse_is_refused(distill, message):
    with pytest.raises(ValueError, match=message):
        dry_run(tiny(**distill), device="cpu")


def test_positions_that_the_student_lacks_are_refused():
    with pytest.raises(ValueError, match=r"\['stages\.9'\] are no blocks of the student"):
        dry_run(replace(tiny(), research=ResearchConfig(positions=("stages.9",))), device="cpu")


def test_unknown_data_and_several_processes_are_refused(monkeypatch):
    recipe = tiny()
    with pytest.raises(ValueError, match=r"data\.name is 'imagnet'; allowed are"):
        dry_run(replace(recipe, data=replace(recipe.data, name="imagnet")))
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="a dry run is one process"):
        dry_run(recipe)


def test_the_command_prints_what_it_timed_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "width", 120)
    assert cli.run("train", ["--recipe", "quickstart", "--rung", "soft", "--dry-run", "--out", "run"]) == 0
    out = capsys.readouterr().out
    assert files(tmp_path) == []
    assert "quickstart-soft: riformer_micro identity: 35,146 parameters, images at 16 px, 10 classes" in out
    assert "quickstart-soft: a step of 50 images = 1 x " in out
    assert "nothing was written" in out
    assert cli.run("train", ["--dry-run", "--rung", "softer"]) == 1
    assert "no rung 'softer'; did you mean soft?" in capsys.readouterr().err


def test_the_seconds_of_a_step_are_those_of_its_parts():
    projection = Projection(
        name="", model="", num_params=1, teachers=[], pairs=[], notes=[], device="", memory=0, batch_size=4096,
        timed_images=64, timed_seconds=0.5, update_seconds=1.0, steps_per_epoch=10, epochs=3,
    )  # fmt: skip
    assert (projection.step_seconds, projection.epoch_seconds, projection.total_seconds) == (33.0, 330.0, 990.0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.25, "250 ms"), (12, "12.0 s"), (600, "10.0 min"), (7200, "2.0 h"), (1e9, "31.7 years")]
)
def test_durations(seconds, text):
    assert tables._duration(seconds) == text


def test_a_rung_is_dry_run_too():
    for rung in ("mixer", "hard", "imitation"):
        assert dry_run(RUNGS[rung](tiny("quickstart")), device="cpu")[-1].name == f"quickstart-{rung}"
