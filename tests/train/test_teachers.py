"""Teachers of other families, several of them, and starts from weights, through the whole loop."""

import dataclasses
import os
import signal

import pytest
import timm
import torch
from torch.testing import assert_close
from train.test_loop import EPOCHS, STEPS, changed, lines, losses, plain, run_processes, tiny

import riformer
from riformer.config import DistillConfig, ModelConfig, Recipe, TeacherConfig
from riformer.data.batches import eval_batches, preprocessing
from riformer.data.dataset import open_dataset
from riformer.study.evaluation import evaluate_run
from riformer.train.evaluate import evaluate
from riformer.train.loop import train
from riformer.train.run import Run

VIT = dict(depth=2, embed_dim=16, num_heads=2, patch_size=4)


def from_vit(**changes) -> Recipe:
    """The tiny recipe with a transformer in both teacher roles: projections, pooled grids, no start from it."""
    settings = {"start_from_teacher": False, "schedule": "constant", **changes}
    distill = dataclasses.replace(tiny().distill, **settings)
    teacher = TeacherConfig(name="vit_tiny_patch16_224", args=VIT, epochs=1, lr=1e-2)
    return tiny(teacher=teacher, distill=distill)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run, and the lines that it told its progress."""
    folder, told = tmp_path_factory.mktemp("vit") / "run", []
    train(from_vit(), folder, told.append)
    return folder, told


def test_pairs_are_told_before_training_and_every_term_is_learned(whole):
    folder, told = whole
    start = next(line for line in told if line["kind"] == "start" and line["name"] == "tiny")
    assert start["pairs"] == [
        "stages.0.blocks.0 imitates blocks.0 (projected from 8 to 16 channels; 4 x 4 and 2 x 2 tokens pooled to 2 x 2)",
        "stages.1.blocks.0 imitates blocks.1 (projected from 8 to 16 channels)",
    ]
    assert told.index(start) < told.index(next(line for line in told if "block" in line))
    assert len(losses(folder)) == EPOCHS * STEPS
    assert timm.create_model(f"local-dir:{folder / 'teacher' / 'best'}", pretrained=True).num_classes == 10


def test_projections_learn_resume_exactly_and_are_never_saved(whole, tmp_path):
    def interrupt(line):
        if line["kind"] == "step" and line["step"] == 7 and line["name"] == "tiny":
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(from_vit(), tmp_path, interrupt)
    early = Run(tmp_path).load_state()["projections"]
    train(from_vit(), tmp_path)
    late = Run(tmp_path).load_state()["projections"]
    assert set(late) == {f"{term}{i}.{p}" for term in ("block", "mixer") for i in (0, 1) for p in ("weight", "bias")}
    assert all((late[name] - early[name]).abs().max() > 0 for name in late)
    assert lines(tmp_path) == lines(whole[0])
    assert_close(late, Run(whole[0]).load_state()["projections"], rtol=0, atol=0)
    assert not any("projection" in name for name in riformer.load(tmp_path).state_dict())


def test_projections_agree_over_processes(tmp_path):
    steady = dataclasses.replace(plain(), teacher=from_vit().teacher, distill=from_vit().distill)
    assert run_processes(steady, tmp_path / "two", 2) == [0, 0]
    assert run_processes(steady, tmp_path / "one", 1) == [0]
    two, one = (Run(tmp_path / name).load_state()["projections"] for name in ("two", "one"))
    assert_close(two, one, rtol=1e-3, atol=1e-5)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_an_own_teacher_of_another_family_is_evaluated_beside_the_student(whole):
    rows = evaluate_run(whole[0])["models"]
    assert rows["teacher"]["name"] == "vit_tiny_patch16_224"
    assert 0 < rows["teacher"]["top1"] < 100
    assert rows["teacher"]["params"] > rows["deploy"]["params"]


@pytest.mark.parametrize("name", ["resnet18", "gfnet_h_ti", "ghostnet_050"])
def test_any_model_of_timm_trains_on_labels_and_is_evaluated(tmp_path, name):
    args = {
        "gfnet_h_ti": dict(depths=(1, 1), dims=(8, 8)),
        "resnet18": dict(channels=(8, 8, 8, 8)),
        "ghostnet_050": {},  # which has no stochastic depth
    }[name]
    train(dataclasses.replace(plain(), model=ModelConfig(name=name, args=args)), tmp_path)
    evaluation = evaluate_run(tmp_path)
    assert evaluation["fuse"]["max_rel"] == 0.0
    assert evaluation["models"]["deploy"]["name"] == name
    noted = riformer.load(tmp_path).pretrained_cfg
    assert noted["label_names"] == list("0123456789")
    assert (noted["interpolation"], noted["crop_mode"]) == ("bicubic", "center")  # as it was evaluated
    assert not noted.get("license")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (dict(name="resnet81"), r"model\.name is 'resnet81'.*did you mean one of \['resnet18'"),
        (dict(name="resnet18", args={"colour": "red"}), "resnet18 cannot be built with .*colour"),
        (dict(name="resnet18", mixer="pooling"), r"model\.mixer is 'pooling'.*resnet18 is no riformer_\*"),
    ],
)
def test_a_model_that_cannot_be_built_is_named(tmp_path, model, message):
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(plain(), model=ModelConfig(**model)), tmp_path)


@pytest.fixture
def teachers(tmp_path):
    """Two model folders, of other families and other sizes than the student."""
    found = []
    for i, name in enumerate(("vit_tiny_patch16_224", "convnext_atto")):
        args = VIT | {"img_size": 12} if "vit" in name else dict(depths=(1, 1, 1, 1), dims=(4, 4, 8, 8))
        torch.manual_seed(i)
        overlay = {"input_size": (3, 12, 12) if "vit" in name else (3, 32, 32)}
        model = timm.create_model(name, num_classes=10, pretrained_cfg_overlay=overlay, **args)
        found.append(str(riformer.save(model, tmp_path / name)))
    return found


def soft(teacher, **distill) -> Recipe:
    distill = DistillConfig(logit_teacher=teacher, label_weight=0.0, soft_weight=1.0, trust_teacher=True, **distill)
    return dataclasses.replace(plain(), distill=distill)


def test_several_logit_teachers_with_shares_teach_one_run(tmp_path, teachers):
    runs = {}
    for name, recipe in {
        "first": soft(teachers[0]),
        "both": soft(tuple(teachers)),
        "mostly": changed(soft(tuple(teachers)), "research", logit_teacher_weights=(9.0, 1.0)),
        "local": soft((f"local-dir:{teachers[0]}", teachers[1])),
    }.items():
        train(recipe, tmp_path / name)
        runs[name] = losses(tmp_path / name)
    assert runs["local"] == runs["both"]
    assert len({tuple(values) for values in runs.values()}) == 3
    assert evaluate_run(tmp_path / "both")["models"]["teacher"]["name"] == "vit_tiny_patch16_224 + convnext_atto"


def test_the_size_at_which_teachers_see_the_images_is_a_choice(tmp_path, teachers):
    train(soft(teachers[1]), tmp_path / "own")
    train(soft(teachers[1], teacher_img_size=32), tmp_path / "same")
    train(soft(teachers[1], teacher_img_size=64), tmp_path / "larger")
    assert losses(tmp_path / "own") == losses(tmp_path / "same") != losses(tmp_path / "larger")


def test_a_run_starts_from_weights_of_another_size_with_a_fresh_classifier(tmp_path):
    filters = dataclasses.replace(plain().model, mixer="global_filter")
    train(dataclasses.replace(plain(), model=filters), tmp_path / "first")
    still = dataclasses.replace(plain(lr=1e-12, min_lr=0.0), data=dataclasses.replace(plain().data, img_size=16))
    tuned = dataclasses.replace(filters, start=str(tmp_path / "first"))
    train(dataclasses.replace(still, model=tuned), tmp_path / "tuned")
    before, after = (riformer.load(tmp_path / name).state_dict() for name in ("first", "tuned"))
    resampled = [name for name in before if before[name].shape != after[name].shape]
    assert resampled == [f"stages.{i}.blocks.0.token_mixer.complex_weight" for i in (0, 1)]
    assert_close(
        {k: after[k] for k in after if k not in resampled}, {k: before[k] for k in before if k not in resampled}
    )

    model = riformer.load(tmp_path / "first")
    model.reset_classifier(3)
    tuned = dataclasses.replace(filters, start=str(riformer.save(model, tmp_path / "three")))
    train(dataclasses.replace(still, data=plain().data, model=tuned), tmp_path / "ten")
    after = riformer.load(tmp_path / "ten").state_dict()
    assert len(after.pop("head.fc.weight")) == len(after.pop("head.fc.bias")) == 10
    assert_close(after, {k: before[k] for k in after})
    other = dataclasses.replace(plain().model, start=str(tmp_path / "first"))
    with pytest.raises(ValueError, match=r"first does not fit MetaFormer(.|\n)*unexpected: .*complex_weight"):
        train(dataclasses.replace(plain(), model=other), tmp_path / "other")


def test_starting_from_a_teacher_of_another_shape_fails_before_that_teacher_is_trained(tmp_path):
    with pytest.raises(ValueError, match=r"module teacher, .* does not fit"):
        train(from_vit(start_from_teacher=True), tmp_path)
    assert not (tmp_path / "teacher").exists()


def test_a_transformer_starts_from_its_own_kind_at_another_size(tmp_path):
    first = ModelConfig(name="vit_tiny_patch16_224", args=VIT)
    train(dataclasses.replace(plain(), model=first), tmp_path / "first")
    still = dataclasses.replace(plain(lr=1e-12, min_lr=0.0), data=dataclasses.replace(plain().data, img_size=16))
    train(
        dataclasses.replace(still, model=dataclasses.replace(first, start=str(tmp_path / "first"))), tmp_path / "tuned"
    )
    before, after = (riformer.load(tmp_path / name).state_dict() for name in ("first", "tuned"))
    assert before.pop("pos_embed").shape[1] == 5
    assert after.pop("pos_embed").shape[1] == 17
    assert_close(after, before)


def test_teachers_bound_to_a_size_are_built_for_another_from_a_folder(tmp_path, teachers):
    train(soft(teachers[0], teacher_img_size=16), tmp_path / "run")
    assert len(losses(tmp_path / "run")) == STEPS
    file = riformer.save(riformer.load(teachers[0]), tmp_path / "file.safetensors")
    with pytest.raises(ValueError, match=r"is for images of \(12, 12\) pixels; only from a folder"):
        train(soft(str(file), teacher_img_size=16), tmp_path / "other")


@pytest.mark.parametrize(
    "knobs", [{"distill": {"logit_teacher": ("own", "gone.pth")}}, {"model": {"start": "gone.pth"}}], ids=str
)
def test_what_is_not_there_is_missed_before_the_own_teacher_is_trained(tmp_path, knobs):
    recipe = from_vit()
    recipe = dataclasses.replace(recipe, **{k: dataclasses.replace(getattr(recipe, k), **v) for k, v in knobs.items()})
    with pytest.raises(ValueError, match=r"no checkpoint file at gone\.pth"):
        train(recipe, tmp_path)
    assert not (tmp_path / "teacher").exists()


def test_a_teacher_with_other_classes_is_named(tmp_path, caplog):
    model = timm.create_model("riformer_micro", num_classes=10, img_size=8)
    model.pretrained_cfg["label_names"] = list("abcdefghij")
    riformer.save(model, tmp_path / "other")
    train(soft(str(tmp_path / "other")), tmp_path / "run")
    assert "names its classes otherwise than the data: it has no '0'" in caplog.text


def test_batch_norm_is_evaluated_as_one_model_over_processes(tmp_path):
    resnet = ModelConfig(name="resnet18", args={"channels": (8, 8, 8, 8)})
    recipe = dataclasses.replace(plain(ema_decay=0.5), model=resnet)
    assert run_processes(recipe, tmp_path, 2) == [0, 0]
    epoch = next(line for line in lines(tmp_path) if line["kind"] == "epoch")
    images = open_dataset(recipe.data).splits["val"]
    best = evaluate(riformer.load(tmp_path), eval_batches(images, preprocessing(recipe.data), 50), 10, "fp32")
    assert best.loss == pytest.approx(epoch["val_loss"], rel=1e-4)
