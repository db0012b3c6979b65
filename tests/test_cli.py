"""The command line: one process for all tests, on a run trained once."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from fake_hub import FakeHub
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch.testing import assert_close

import riformer
import riformer_cli
from riformer.cli.tables import print_runs
from riformer.config import DataConfig
from riformer.data.dataset import DATASETS
from riformer.model.fuse import FORMS
from riformer.model.mixers import MIXERS
from riformer.recipes import RECIPES, RUNG_GROUPS, RUNGS, labels
from riformer.study.evaluation import evaluate_model
from riformer.train.loop import train
from riformer.train.run import Run
from riformer_runtime.cli.console import Console
from riformer_runtime.predict import Prediction

STUDENT = ["--optim.epochs=1", "--optim.warmup-epochs=0"]
SMALL = [*STUDENT, "--optim.batch-size=500", "--teacher.epochs=1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "run"
    assert riformer_cli.run("train", ["--recipe", "quickstart", "--out", str(path), *SMALL]) == 0
    return path


def fails(capsys, verb: str, *arguments: str) -> str:
    """The message with which a command refuses its input."""
    assert riformer_cli.run(verb, list(arguments)) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


def test_train_leaves_a_whole_run_folder(run):
    names = {path.name for path in run.iterdir()}
    files = {"recipe.json", "env.json", "data.json", "inputs.json", "metrics.jsonl", "evaluation.json"}
    assert names == files | {"best", "last", "teacher", ".lock"}
    evaluation = Run(run).read("evaluation.json")
    assert list(evaluation["models"]) == ["teacher", "student", "deploy"]
    assert evaluation["models"]["student"]["top1"] == evaluation["models"]["deploy"]["top1"]
    assert evaluation["models"]["deploy"]["params"] < evaluation["models"]["student"]["params"]
    assert evaluation["fuse"]["max_rel"] < 1e-5
    assert evaluation["split"] == "test"
    assert sum(sum(row.values()) for row in evaluation["confusion"].values()) == evaluation["num_images"] == 500
    assert len(evaluation["samples"]) == 30
    assert evaluation["speed"]["ratio"]["low"] > 0


def test_the_recorded_recipe_can_be_run_again(run, tmp_path):
    assert riformer_cli.run("train", ["--config", str(run / "recipe.json"), "--out", str(tmp_path / "again")]) == 0
    assert Run(tmp_path / "again").recipe() == Run(run).recipe()
    first, second = (
        [line["loss"] for line in Run(path).metrics() if line["kind"] == "step"] for path in (run, tmp_path / "again")
    )
    assert first == second
    assert len(first) == 2


def test_resume_takes_all_settings_from_the_run(run, capsys):
    assert riformer_cli.run("train", ["--resume", str(run)]) == 0
    capsys.readouterr()
    assert "cannot be given with it" in fails(capsys, "train", "--resume", str(run), "--optim.lr", "1")
    assert "is not a run folder" in fails(capsys, "train", "--resume", str(run / "best"))


def test_a_recipe_that_contradicts_itself_is_refused_before_anything_is_written(tmp_path, capsys):
    out = tmp_path / "run"
    message = fails(capsys, "train", "--distill.logit-teacher=", "--out", str(out))
    assert "--distill.logit-teacher is '', but --distill.soft-weight or --distill.hard-weight needs one" in message
    assert not out.exists()


def test_ladder_trains_each_rung_with_each_seed(tmp_path, capsys):
    arguments = ["--rungs", "labels", "full", "--seeds", "3", "4", "--out", str(tmp_path), *SMALL]
    assert riformer_cli.run("ladder", arguments) == 0
    runs = sorted(path.name for path in tmp_path.iterdir() if path.is_dir() and path.name.startswith("quickstart"))
    assert runs == [f"quickstart{rung}-seed{seed}" for rung in ("-labels", "") for seed in (3, 4)]
    assert all((tmp_path / name / "evaluation.json").is_file() for name in runs)
    assert Run(tmp_path / "quickstart-labels-seed4").recipe().distill.label_weight == 1
    assert "quickstart-labels" in capsys.readouterr().out


def test_eval_of_a_run_agrees_with_eval_of_its_model_on_the_same_data(run, capsys):
    before = Run(run).read("evaluation.json")["models"]["student"]["top1"]
    (run / "evaluation.json").unlink()
    assert riformer_cli.run("eval", [str(run)]) == 0
    assert Run(run).read("evaluation.json")["models"]["student"]["top1"] == before
    capsys.readouterr()
    assert riformer_cli.run("eval", [str(run / "best"), "--data.name", "digits"]) == 0
    assert capsys.readouterr().out.count(f"{before:.2f}") == 2  # as saved, and fused


def test_eval_on_a_folder_without_splits_takes_all_its_images_but_those_of_the_training(image_folder, tmp_path, capsys):
    data = [f"--data.name=folder:{image_folder}", "--optim.batch-size=10"]
    assert riformer_cli.run("train", ["--out", str(tmp_path / "run"), *STUDENT, "--teacher.epochs=1", *data]) == 0
    for arguments in (["--data", f"folder:{image_folder}"], [f"--data=folder:{image_folder}"]):
        capsys.readouterr()
        assert riformer_cli.run("eval", [str(tmp_path / "run" / "best"), *arguments]) == 0
        assert capsys.readouterr().out.count(" 12 ") == 2
    assert (
        riformer_cli.run("eval", [str(tmp_path / "run" / "best"), "--data", f"folder:{image_folder}", "--split", "val"])
        == 0
    )
    assert capsys.readouterr().out.count(" 12 ") == 2
    assert riformer_cli.run("eval", [str(tmp_path / "run"), "--data", f"folder:{image_folder}"]) == 0
    assert capsys.readouterr().out.count(" 12 ") == 2  # of its own images, those that it did not train on
    for path in sorted((image_folder / "one").iterdir())[1:]:
        path.unlink()
    assert riformer_cli.run("eval", [str(tmp_path / "run" / "best"), "--data", f"folder:{image_folder}"]) == 0
    assert capsys.readouterr().out.count(" 41 ") == 2


def test_eval_of_a_split_is_that_of_the_run(image_folder, tmp_path, capsys):
    """Evaluated on its val, a run of another seed than 0 sees the images that it held out."""
    data = ["--data.name", f"folder:{image_folder}", "--seed", "1", "--optim.batch-size=10"]
    assert riformer_cli.run("train", ["--out", str(tmp_path / "run"), *STUDENT, "--teacher.epochs=1", *data]) == 0
    epoch = [line for line in Run(tmp_path / "run").metrics() if line["kind"] == "epoch"][-1]
    capsys.readouterr()
    assert riformer_cli.run("eval", [str(tmp_path / "run"), "--split", "val"]) == 0
    out = capsys.readouterr().out
    assert out.count(f"{epoch['val_loss']:.4f}") == 2
    assert out.count(f" {epoch['val_images']} ") == 2


def test_an_evaluation_made_halfway_does_not_outlive_the_rest_of_the_training(tmp_path):
    def interrupt(line):
        if line["kind"] == "epoch":
            os.kill(os.getpid(), signal.SIGINT)

    recipe = labels(RECIPES["quickstart"]())
    recipe = replace(recipe, optim=replace(recipe.optim, epochs=2, warmup_epochs=0.0, batch_size=500))
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run", interrupt)
    train_more = ["--resume", str(tmp_path / "run")]
    assert riformer_cli.run("eval", [str(tmp_path / "run")]) == 0
    early = Run(tmp_path / "run").read("evaluation.json")
    Run(tmp_path / "run").write("evaluation.json", {**early, "date": "halfway"})
    assert riformer_cli.run("train", train_more) == 0
    assert Run(tmp_path / "run").read("evaluation.json")["date"] != "halfway"


def test_a_teacher_is_evaluated_under_its_own_normalisation(run, tmp_path):
    teacher = riformer.load(run)
    teacher.pretrained_cfg.update(mean=(0.0, 0.0, 0.0), std=(0.05, 0.05, 0.05))
    riformer.save(teacher, tmp_path / "teacher")
    soft = ["--distill.label-weight=0", "--distill.soft-weight=1", f"--distill.logit-teacher={tmp_path / 'teacher'}"]
    plain = ["--distill.module-teacher=", "--distill.start-from-teacher=false", "--distill.schedule=constant"]
    plain += [f"--distill.{term}-weight=0" for term in ("block", "mixer", "relation")]
    assert riformer_cli.run("train", ["--out", str(tmp_path / "run"), *SMALL[:-1], *soft, *plain]) == 0
    own = evaluate_model(teacher, DataConfig(name="digits"))["as saved"]
    row = Run(tmp_path / "run").read("evaluation.json")["models"]["teacher"]
    assert row["top1"] == own.top1
    assert row["loss"] == pytest.approx(own.loss, rel=1e-4)


def test_eval_refuses_a_model_without_names_for_other_classes(tmp_path, capsys):
    riformer.save(timm.create_model("riformer_micro", num_classes=12), tmp_path / "model")
    message = fails(capsys, "eval", str(tmp_path / "model"), "--data.name", "digits")
    assert "the model has 12 classes without names, but the data has 10" in message


def test_settings_that_would_be_ignored_are_refused(run, capsys):
    assert "add --data.name" in fails(capsys, "eval", str(run), "--data.val-fraction", "0.9")
    config = str(run / "recipe.json")
    assert "give one of them" in fails(capsys, "train", "--config", config, "--recipe", "photos")
    assert "give one of them" in fails(capsys, "train", "--resume", str(run), "--recipe", "photos")
    assert "--seeds 1 1 names one twice" in fails(capsys, "ladder", "--seeds", "1", "1")
    assert "--rungs soft soft names one twice" in fails(capsys, "ladder", "--rungs", "[soft,soft]")


def test_models_in_float64_are_evaluated_fused_and_asked(run, image_folder, tmp_path):
    riformer.save(riformer.load(run).double(), tmp_path / "wide")
    assert riformer_cli.run("eval", [str(tmp_path / "wide"), "--data.name", "digits"]) == 0
    assert riformer_cli.run("fuse", [str(tmp_path / "wide"), str(tmp_path / "fused")]) == 0
    assert riformer_cli.run("predict", [str(tmp_path / "fused"), str(image_folder / "one")]) == 0
    assert riformer.load(tmp_path / "fused").stem.conv.weight.dtype == torch.float64


def test_fuse_refuses_what_it_cannot_merge_and_other_kinds_of_files(run, tmp_path, capsys):
    message = fails(capsys, "fuse", str(run / "teacher"), str(tmp_path / "out"))
    assert "mixes tokens (global_filter), which nothing can merge away" in message
    assert "written as .safetensors" in fails(capsys, "fuse", str(run), str(tmp_path / "out.pth"))
    assert list(tmp_path.glob("out*")) == []


def test_eval_refuses_classes_that_the_model_does_not_know(run, image_folder, capsys):
    message = fails(capsys, "eval", str(run), "--data.name", f"folder:{image_folder}")
    assert "does not know the classes ['one', 'seven', 'zero']" in message
    assert "give --data.name" in fails(capsys, "eval", str(run / "best"))


@pytest.mark.parametrize("form", ["file.safetensors", "folder"])
def test_fuse_writes_an_equal_deploy_form_that_timm_reads(run, tmp_path, form, capsys):
    assert riformer_cli.run("fuse", [str(run), str(tmp_path / form)]) == 0
    assert "identity" in capsys.readouterr().out
    student, fused = riformer.load(run), riformer.load(tmp_path / form)
    images = torch.randn(2, 3, 16, 16)
    assert_close(fused(images), student(images), atol=1e-4, rtol=1e-4)
    assert fused.mixers == ["identity", "identity"]
    assert fused.pretrained_cfg["label_names"] == student.pretrained_cfg["label_names"]
    if form == "folder":
        assert_close(timm.create_model(f"local-dir:{tmp_path / form}", pretrained=True).eval()(images), fused(images))
    assert riformer_cli.run("fuse", [str(run), str(tmp_path / form), "--fold"]) == 0
    assert not any("layer_scale" in key for key in riformer.load(tmp_path / form).state_dict())


def test_fuse_writes_nothing_when_the_check_fails(run, tmp_path, monkeypatch, capsys):
    def broken(model):
        wrong = riformer.fuse(model)
        torch.nn.init.normal_(wrong.stages[0].blocks[0].norm1.bias)
        return wrong

    monkeypatch.setitem(FORMS, "deploy", broken)
    assert "nothing was written" in fails(capsys, "fuse", str(run), str(tmp_path / "wrong.safetensors"))
    assert list(tmp_path.glob("wrong*")) == []


def test_predict_prints_a_table_or_json_lines(run, image_folder, capsys):
    images = sorted((image_folder / "seven").iterdir())[:2]
    assert riformer_cli.run("predict", [str(run), *map(str, images)]) == 0
    assert images[0].name in capsys.readouterr().out.replace("\n", "")
    assert riformer_cli.run("predict", [str(run), str(image_folder), "--json", "--top-k", "3"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["path"] for line in lines] == sorted(str(path) for path in image_folder.rglob("*.png"))
    assert all(len(line["classes"]) == 3 for line in lines)
    probabilities = [c["probability"] for c in lines[0]["classes"]]
    assert probabilities == sorted(probabilities, reverse=True)


def test_predict_shows_what_it_has_labelled_when_a_later_image_ends_it(run, image_folder, capsys, monkeypatch):
    images = sorted((image_folder / "seven").iterdir())[:2]

    def two(model, images, *arguments):
        yield Prediction(str(images[0]), (("seven", 1.0),))
        raise RuntimeError("the model's logits are not finite")

    monkeypatch.setattr("riformer_runtime.cli.predict.predict", two)
    assert riformer_cli.run("predict", [str(run), *map(str, images)]) == 1
    captured = capsys.readouterr()
    assert images[0].name in captured.out.replace("\n", "")
    assert "riformer predict: the model's logits are not finite" in captured.err


def test_eval_of_nothing_says_that_it_is_not_there(tmp_path, capsys):
    assert fails(capsys, "eval", str(tmp_path / "absent")) == f"riformer eval: {tmp_path / 'absent'} is not there\n"
    assert "names no data: give --data.name" in fails(capsys, "eval", str(tmp_path))


def test_predict_says_which_engine_computes(run, image_folder, capsys):
    image = str(next(image_folder.rglob("*.png")))
    answers = {}
    for engine in ("eager", "portable", "auto"):
        assert riformer_cli.run("predict", [str(run), image, "--json", "--top-k", "10", "--engine", engine]) == 0
        said = capsys.readouterr()
        assert f"engine: {engine}" in said.err or engine == "auto"
        assert "float32" in said.err or "fp32" in said.err
        answers[engine] = [c["probability"] for c in json.loads(said.out)["classes"]]
    for engine in ("portable", "auto"):
        assert answers[engine] == pytest.approx(answers["eager"], abs=1e-4)
    assert "mixes tokens" in fails(capsys, "predict", str(run / "teacher"), image, "--engine", "portable")
    assert riformer_cli.run("predict", [str(run / "teacher"), image]) == 0
    assert "engine: eager PyTorch" in capsys.readouterr().err


def test_weights_that_overflow_answer_nothing(run, image_folder, tmp_path, capsys):
    model = riformer.load(run)
    with torch.no_grad():
        model.head.fc.weight.fill_(3e38)  # NaN is refused where the file is read
    riformer.save(model, tmp_path / "huge")
    image = str(next(image_folder.rglob("*.png")))
    assert "logits are not finite" in fails(capsys, "predict", str(tmp_path / "huge"), image, "--json")
    assert "are not finite" in fails(capsys, "eval", str(tmp_path / "huge"), "--data", "digits")


def test_an_evaluation_that_cannot_be_recorded_is_shown(run, tmp_path, capsys, caplog):
    copied = shutil.copytree(run, tmp_path / "run")
    (copied / "evaluation.json").unlink()
    (copied / "evaluation.json").mkdir()
    assert riformer_cli.run("eval", [str(copied)]) == 0
    assert "the fuse changes logits by" in capsys.readouterr().out
    assert "the evaluation is not recorded" in caplog.text


def test_predict_reads_an_image_from_a_pipe(run, image_folder, capsys):
    image = next(image_folder.rglob("*.png"))
    options = ["--json", "--engine", "eager"]
    command = [sys.executable, "-m", "riformer", "predict", str(run), "-", *options]
    piped = subprocess.run(command, input=image.read_bytes(), capture_output=True, check=True)
    from_pipe = json.loads(piped.stdout)
    assert riformer_cli.run("predict", [str(run), str(image), *options]) == 0
    assert json.loads(capsys.readouterr().out)["classes"] == from_pipe["classes"]


def test_predict_labels_the_others_where_a_path_is_missing_or_a_link_is_broken(run, image_folder, tmp_path, capsys):
    (image_folder / "zero" / "broken.png").symlink_to(tmp_path / "nowhere")
    paths = [str(tmp_path / "missing.png"), str(image_folder / "zero"), str(image_folder / "one")]
    assert riformer_cli.run("predict", [str(run), *paths, "--json"]) == 1
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert sum("classes" in line for line in lines) == 40
    assert [Path(line["path"]).name for line in lines if "error" in line] == ["broken.png"]
    assert "no such file or folder" in captured.err


def test_what_is_left_out_is_said_alike_by_train_eval_and_predict(image_folder, tmp_path, capsys, caplog):
    (image_folder / "zero" / "a.HEIC").write_text("x")
    (image_folder / ".hidden").mkdir()
    said = "left out 1 hidden, 1 with suffix .heic; to use .heic files, convert them to JPEG or PNG"
    path, data = str(tmp_path / "run"), f"folder:{image_folder}"
    train_it = ["--out", path, *STUDENT, "--teacher.epochs=1", f"--data.name={data}", "--optim.batch-size=10"]
    assert riformer_cli.run("train", train_it) == 0
    assert caplog.text.count(said) == 1
    assert caplog.text.count("3 classes in natural order: one, seven, zero") == 1
    for arguments in (["eval", f"{path}/best", "--data", data], ["predict", path, str(image_folder)]):
        caplog.clear()
        assert riformer_cli.run(arguments[0], arguments[1:]) == 0
        assert caplog.text.count(said) == 1
    capsys.readouterr()
    assert riformer_cli.run("eval", [path]) == 0
    assert said in " ".join(capsys.readouterr().err.split())


def test_predict_names_unreadable_images_and_labels_the_others(run, image_folder, tmp_path, capsys):
    (image_folder / "zero" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert riformer_cli.run("predict", [str(run), str(image_folder / "zero"), "--json"]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    errors = [line for line in lines if "error" in line]
    assert len(lines) == 21
    assert len(errors) == 1
    assert "broken.png" in errors[0]["error"]
    assert "no such file or folder" in fails(capsys, "predict", str(run), str(tmp_path / "absent.png"))
    (tmp_path / "empty").mkdir()
    assert "no images in" in fails(capsys, "predict", str(run), str(tmp_path / "empty"))


@pytest.fixture(scope="module")
def published(run) -> Path:
    folder = run.with_name("published")
    assert riformer_cli.run("publish", [str(run), str(folder)]) == 0
    return folder


def test_publish_writes_the_deploy_form_and_a_card_that_agree_with_the_run(run, published):
    assert {path.name for path in published.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    images = torch.randn(2, 3, 16, 16)
    in_timm = timm.create_model(f"local-dir:{published}", pretrained=True).eval()
    assert_close(in_timm(images), riformer.fuse(riformer.load(run))(images), atol=0, rtol=0)
    assert in_timm.mixers == ["identity", "identity"]
    assert list(in_timm.pretrained_cfg["label_names"]) == list("0123456789")
    row = Run(run).read("evaluation.json")["models"]["deploy"]
    (result,) = ModelCard.load(published / "README.md").data.eval_results
    assert result.metric_value == row["top1"]
    assert f"| {row['top1']:.2f} | {row['top5']:.2f} |" in (published / "README.md").read_text()
    assert str(run.parent) not in (published / "README.md").read_text()


@pytest.mark.parametrize(("form", "has_scales"), [("training", True), ("folded", False)])
def test_publish_writes_other_forms(run, tmp_path, form, has_scales, capsys):
    assert riformer_cli.run("publish", [str(run), str(tmp_path / "model"), "--form", form]) == 0
    assert "35," in capsys.readouterr().out
    state = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).state_dict()
    assert any("layer_scale" in key for key in state) == has_scales
    assert f"{form} form" in (tmp_path / "model" / "README.md").read_text()


def test_publish_replaces_a_published_model_and_nothing_else(run, published, tmp_path, capsys):
    before = (published / "README.md").read_text()
    (published / "README.md").write_text("old")
    assert riformer_cli.run("publish", [str(run), str(published)]) == 0
    assert (published / "README.md").read_text() == before
    capsys.readouterr()
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "README.md").write_text("mine")
    assert "is no model folder" in fails(capsys, "publish", str(run), str(tmp_path / "work"))
    assert "is no model folder" in fails(capsys, "publish", str(run), str(run))
    assert "the run's own best model" in fails(capsys, "publish", str(run), str(run / "best"))
    assert "mixer" in (run / "best" / "config.json").read_text()


def test_publish_refuses_what_is_no_trained_run_or_has_no_such_form(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert "is not a run folder" in fails(capsys, "publish", str(run / "best"), str(out))
    Run(tmp_path / "begun").begin(RECIPES["quickstart"](), world_size=1)
    assert "has no best/ yet" in fails(capsys, "publish", str(tmp_path / "begun"), str(out))
    message = fails(capsys, "publish", str(run / "teacher"), str(out))
    assert "mixes tokens (global_filter)" in message
    assert "publish its training form" in message
    assert "--private has no effect without --push OWNER/NAME" in fails(
        capsys, "publish", str(run), str(out), "--private"
    )
    assert "must be OWNER/NAME" in fails(capsys, "publish", str(run), str(out), "--push", "name")
    assert not out.exists()
    assert riformer_cli.run("publish", [str(run / "teacher"), str(out), "--form", "training"]) == 0
    assert "Not measured" in (out / "README.md").read_text()


def test_publish_pushes_what_it_wrote(run, tmp_path, monkeypatch, capsys):
    hub = FakeHub(tmp_path / "hub", monkeypatch)
    assert riformer_cli.run("publish", [str(run), str(tmp_path / "model"), "--push", "me/digits", "--private"]) == 0
    assert "hf-hub:me/digits" in capsys.readouterr().out
    assert hub.private == {"me/digits": True}
    card = (tmp_path / "model" / "README.md").read_text()
    assert (hub.root / "me/digits/README.md").read_text() == card
    assert 'create_model("hf-hub:me/digits"' in card
    images = torch.randn(2, 3, 16, 16)
    expected = riformer.load(tmp_path / "model")(images)
    assert_close(timm.create_model("hf-hub:me/digits", pretrained=True).eval()(images), expected, atol=0, rtol=0)


def test_a_push_without_a_network_leaves_the_folder_and_says_what_to_do(run, tmp_path, monkeypatch, capsys):
    def unreachable(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(FakeHub, "create_repo", unreachable)
    FakeHub(tmp_path / "hub", monkeypatch)
    assert riformer_cli.run("publish", [str(run), str(tmp_path / "model"), "--push", "me/digits"]) == 1
    message = capsys.readouterr().err
    assert "was not pushed to me/digits: Name or service not known" in message
    assert "hf auth login" in message
    assert "Traceback" not in message
    assert riformer.load(tmp_path / "model").mixers == ["identity", "identity"]


def test_convert_reads_a_foreign_checkpoint_and_refuses_a_wrong_one(tmp_path, capsys):
    torch.save({"state_dict": timm.create_model("poolformer_s12", num_classes=7).state_dict()}, tmp_path / "pool.pth")
    out = tmp_path / "pool.safetensors"
    form = ["--form", "timm-poolformer"]
    assert "--form" in fails(capsys, "convert", str(tmp_path / "pool.pth"), str(out))
    assert riformer_cli.run("convert", [str(tmp_path / "pool.pth"), str(out), *form]) == 0
    assert "riformer_s12 pooling" in capsys.readouterr().out
    assert len(load_file(out)["head.fc.bias"]) == 7
    message = fails(
        capsys, "convert", str(tmp_path / "pool.pth"), str(tmp_path / "b"), "--model", "riformer_s24", *form
    )
    assert "stages.0.blocks.2.norm1.weight" in message
    assert not (tmp_path / "b").exists()


def test_report_writes_one_page(run, tmp_path, capsys):
    assert riformer_cli.run("report", [str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert "page.html" in capsys.readouterr().out
    assert "quickstart" in (tmp_path / "page.html").read_text()
    assert "run" in fails(capsys, "report", str(tmp_path))


def test_list_names_every_entry_of_every_table(capsys):
    assert riformer_cli.run("list", []) == 0
    out = capsys.readouterr().out
    for name in [*timm.list_models("riformer_*"), *MIXERS, *RECIPES, *RUNGS, *DATASETS]:
        assert name in out
    assert riformer_cli.run("list", ["recipes"]) == 0
    assert "riformer_s12" not in capsys.readouterr().out
    assert "did you mean recipes?" in fails(capsys, "list", "recipe")


def test_list_puts_rungs_in_groups(capsys):
    assert sorted(name for names in RUNG_GROUPS.values() for name in names) == sorted(RUNGS)
    assert riformer_cli.run("list", ["rungs"]) == 0
    out = capsys.readouterr().out
    places = [out.index(f"rungs: {group}") for group in RUNG_GROUPS]
    assert places == sorted(places)


def test_a_run_on_labels_is_shown_without_what_only_a_teacher_or_a_fuse_has(run, tmp_path, capsys):
    print_runs([Run(run)], Console(width=200))
    with_teacher = capsys.readouterr().out
    assert "speed of the fused student over its teacher" in with_teacher
    assert "the fuse changes logits" in with_teacher
    assert riformer_cli.run("train", ["--rung", "mixer", "--out", str(tmp_path), *SMALL[:-1]]) == 0
    mixing = capsys.readouterr().out
    assert "teacher" not in mixing.replace(str(tmp_path), "")
    assert "speed" not in mixing
    assert "the fuse changes" not in mixing
    print_runs([Run(run), Run(tmp_path)], Console(width=200))
    both = capsys.readouterr().out
    assert "speed of the fused student" in both
    assert "parameters" not in both  # of which there are two numbers


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "out"
    with pytest.MonkeyPatch.context() as short:
        short.setattr("riformer.export.artifact._rates_by_form", lambda *arguments: {})
        assert riformer_cli.run("export", [str(run), str(path), "--to", "native", "onnx", "--precision", "fp32"]) == 0
    return path


def test_what_was_exported_predicts_and_evaluates_like_the_run(run, exported, image_folder, capsys):
    images = sorted(str(path) for path in image_folder.rglob("*.png"))[::10]
    options = [*images, "--json", "--top-k", "10"]
    answers = {}
    for name, arguments in (
        ("run", [str(run), "--engine", "eager"]),
        ("native", [str(exported), "--engine", "native"]),
        ("onnx", [str(exported), "--engine", "onnxruntime"]),
        ("one file", [str(exported / "fp32.onnx")]),
    ):
        assert riformer_cli.run("predict", [*arguments, *options]) == 0
        said = capsys.readouterr()
        assert name in ("run", "one file") or f"engine: {name}" in said.err
        answers[name] = [json.loads(line) for line in said.out.splitlines()]
    expected = [{c["class"]: pytest.approx(c["probability"], abs=1e-4) for c in a["classes"]} for a in answers["run"]]
    assert len(expected) == len(images)
    for name in ("native", "onnx", "one file"):
        assert [{c["class"]: c["probability"] for c in a["classes"]} for a in answers[name]] == expected
    assert riformer_cli.run("eval", [str(exported), "--data", "digits"]) == 0
    evaluation = Run(run).read("evaluation.json")
    assert f"{evaluation['models']['student']['top1']:.2f}" in capsys.readouterr().out


def test_check_says_what_is_right_and_what_is_not(exported, tmp_path, capsys):
    assert riformer_cli.run("check", [str(exported), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["payload"]["engine"] for line in lines] == ["native", "onnxruntime"]
    assert all(line["parity"]["max_rel"] < 1e-4 and not line["problem"] for line in lines)
    assert riformer_cli.run("check", [str(exported)]) == 0
    assert capsys.readouterr().out.count("right") == 2
    damaged = shutil.copytree(exported, tmp_path / "damaged")
    content = bytearray((damaged / "native.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / "native.npz").write_bytes(content)
    for verb in (["check", str(damaged)], ["predict", str(damaged), "image.png"]):
        assert "native.npz is damaged or was changed" in fails(capsys, *verb)


def test_export_refuses_what_does_not_exist_and_what_it_would_delete(run, exported, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    out = str(tmp_path / "out")
    for arguments, message in (
        ([str(run), str(tmp_path / "mine")], "has other things in it (thesis.tex)"),
        ([str(run), out, "--to", "onxx"], "no target 'onxx'"),
        ([str(run), out, "--to", "native", "--precision", "int8"], "the target native has no int8"),
        ([str(run / "teacher"), out, "--to", "native"], "takes RIFormers alone"),
        ([str(run / "best"), out, "--to", "onnx", "--precision", "int8"], "int8 needs training images"),
        ([str(run), f"{out}.onnx", "--to", "native"], "can hold one payload"),
        ([str(run), f"{out}.onnx", "--inside", "resize", "--precision", "int8"], "int8 with --inside resize"),
    ):
        assert message in fails(capsys, "export", *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]
    assert "--engine and --precision choose among" in fails(
        capsys, "eval", str(run / "best"), "--data", "digits", "--engine", "native"
    )
    assert "--precision chooses among" in fails(capsys, "predict", str(run), "a.png", "--precision", "fp32")
    assert "has nothing for openvino; it has native fp32, onnxruntime fp32" in fails(
        capsys, "predict", str(exported), "a.png", "--engine", "openvino"
    )
