"""The model card: its numbers are the run folder's, what was not measured is said, and nothing tells of the machine."""

import json
import re
from dataclasses import replace

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image
from run_folders import CARD_LABELS, CARD_RECIPE, CLASSES, write_run
from tiny import tiny

import riformer
from riformer.config import ResearchConfig
from riformer.measure.cost import count_macs, count_params
from riformer.model.fuse import FORMS
from riformer.pages.card import model_card


def section(card: str, title: str) -> str:
    return card.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def cells(card: str) -> dict[str, list[str]]:
    """The rows of all tables, by their first cell."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if line[:1] == "|"]
    return {first: others for first, *others in rows}


@pytest.mark.parametrize(("form", "key"), [("training", "student"), ("deploy", "deploy"), ("folded", None)])
def test_its_numbers_are_those_of_the_evaluation(form, key, tmp_path):
    run = write_run(tmp_path)
    card = model_card(run, form)
    evaluation = json.loads((run / "evaluation.json").read_text())
    titles = {"teacher": "logit teacher", "student": "training form", "deploy": "deploy form"}
    rows = cells(section(card, "Accuracy"))
    for name, row in evaluation["models"].items():
        title = f"{titles[name]}, `{row['name']}`" + " (this model)" * (name == key)
        top1, top5, loss, params, macs = rows[title]
        assert [top1, top5] == [f"{row['top1']:.2f}", f"{row['top5']:.2f}"]
        assert loss == f"{row['loss']:.4f}"
        assert [params, macs] == [f"{row['params']:,}", f"{row['macs']:,}"]
    assert len(rows) == 2 + 3
    assert "On the 500 images of the test split, one run with seed 7." in card
    assert "The fuse changed logits by 3e-07 of the largest" in card
    assert ("1.65 times its teacher's images per second (1.57 to 1.77 in 15 rounds)" in card) == (form == "deploy")
    assert "4321" not in card  # a speed of the machine, not of the network
    assert ("folded form itself was not measured" in card) == (form == "folded")
    front = ModelCard(card).data
    if key is None:
        assert front.eval_results is None
    else:
        (result,) = front.eval_results
        assert result.metric_value == evaluation["models"][key]["top1"]
        assert (result.dataset_name, result.dataset_split, result.metric_type) == ("digits", "test", "accuracy")


@pytest.mark.parametrize("form", FORMS)
def test_size_and_cost_are_those_of_the_form(form, tmp_path):
    run = write_run(tmp_path)
    model = FORMS[form](riformer.load(run))
    rows = cells(model_card(run, form).partition("## Accuracy")[0])
    assert rows["architecture"] == [f"`riformer_s12`, {form} form"]
    assert rows["parameters"] == [f"{count_params(model):,}"]
    assert rows["multiply-accumulates"] == [f"{count_macs(model, 64):,} for an image of 64 × 64 pixels"]
    assert rows["classes"] == ["5"]
    assert rows["data"] == ["digits: 1,000 train, 297 val, 500 test"]


def test_the_front_matter_is_what_the_hub_sorts_by(tmp_path):
    data = ModelCard(model_card(write_run(tmp_path))).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "timm", "image-classification")
    assert data.tags == ["image-classification", "timm", "riformer"]
    assert data.model_name == "riformer_s12-mine"


def test_how_it_was_trained(tmp_path):
    training = section(model_card(write_run(tmp_path)), "Training")
    assert "Recipe `mine`, seed 7: 4 of 6 epochs were trained; of these epoch 2 was kept" in training
    assert "top-1 on val, 87.65 %" in training
    assert "adamw in fp32, learning rate up to 0.002, weight decay 0.05, batches of 100 images." in training
    assert "0.5 × soft + 2 × block, at temperature 1; block going to 0 by a cosine" in training
    assert "Logit teacher and module teacher: trained first, on labels, for 11 epochs" in training
    assert "`global_filter` as token mixer" in training
    assert "started from the module teacher's weights" in training
    assert "could not be read: 1." in training


def test_kept_teacher_outputs_are_told(tmp_path):
    for i, (top_k, kept) in enumerate({0: "all of it", 5: "its 5 largest probabilities"}.items()):
        distill = replace(CARD_RECIPE.distill, schedule="first_phase", cache_augmentations=4)
        kept_outputs = replace(CARD_RECIPE, distill=distill, research=ResearchConfig(cache_top_k=top_k))
        card = model_card(write_run(tmp_path / str(i), kept_outputs))
        told = (
            f"4 augmentations, taken in turns by the epochs; of the logit teacher's output on each of them, {kept} was"
        )
        assert told in section(card, "Training")
    assert "in turns" not in model_card(write_run(tmp_path / "none"))


def test_what_was_not_is_not_told(tmp_path):
    training = section(model_card(write_run(tmp_path / "run", CARD_LABELS)), "Training")
    assert "Loss: 1 × label, labels smoothed by 0.1." in training
    assert "There was no teacher." in training
    assert "started from" not in training
    assert "temperature" not in training
    assert "no logit teacher to compare with" in model_card(tmp_path / "run")
    assert "times its teacher's" not in model_card(tmp_path / "run")


def test_what_was_not_measured_is_said_to_be_not_measured(tmp_path):
    run = write_run(tmp_path, split="")
    (run / "metrics.jsonl").unlink()
    (run / "env.json").unlink()
    (run / "data.json").unlink()
    card = model_card(run)
    assert section(card, "Accuracy").strip().startswith("Not measured: this run was not evaluated.")
    assert "6 epochs were planned; how many were trained is not recorded" in card
    assert "number of images not recorded" in card
    assert section(card, "Versions").strip() == "Not recorded."
    assert ModelCard(card).data.eval_results is None
    assert "%" not in card


def test_an_evaluation_on_val_is_said_to_favour(tmp_path):
    card = model_card(write_run(tmp_path, split="val"))
    assert "chosen on the same images, which favours it" in card
    assert ModelCard(card).data.eval_results[0].dataset_split == "val"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("folder:/home/x/photos", "photos"),
        ("folder:/home/x/photos/", "photos"),
        (r"folder:C:\Users\x\my_photos", "my_photos"),
        ("folder:../../x/holiday|2024", r"holiday\|2024"),
        ("folder:/", "unnamed folder"),
        ("folder:..", "unnamed folder"),
        ("folder:/home/x/caf\udce9", "caf?"),
    ],
)
@pytest.mark.parametrize("teacher", ["/home/x/runs/pool", "local-dir:/home/x/pool", "timm:vit_tiny@/home/x/pool"])
def test_no_path_of_the_machine_is_told(name, shown, teacher, tmp_path):
    data = replace(CARD_RECIPE.data, name=name, root="/home/x/root")
    distill = replace(CARD_RECIPE.distill, logit_teacher=teacher, module_teacher="timm:poolformer_s12")
    card = model_card(write_run(tmp_path, replace(CARD_RECIPE, data=data, distill=distill)))
    for word in ("home", "Users", "C:", "root", "runs", "/x", "broken.png", str(tmp_path), "Testix"):
        assert word not in card
    assert f"| data | {shown}: 1,000 train" in card
    assert re.search(r"Logit teacher: `(timm:vit_tiny@)?pool`\.", card)
    assert "Module teacher: `timm:poolformer_s12`." in card
    (result,) = ModelCard(card).data.eval_results
    assert result.dataset_type == "imagefolder"
    card.encode()


def test_class_names_are_text_and_a_long_list_is_shortened(tmp_path):
    hostile = ("<script>", "a|b", "*x*", "`y`", "[z](w)", "two\nlines", "in_word", "_edge_")
    classes = section(model_card(write_run(tmp_path / "a", classes=hostile)), "Classes").strip()
    assert classes == r"8: \<script\>, a\|b, \*x\*, \`y\`, \[z\](w), two lines, in_word, \_edge\_."
    many = tuple(f"class{i}" for i in range(1200))
    classes = section(model_card(write_run(tmp_path / "b", classes=many)), "Classes").strip()
    assert classes.startswith("1,200: class0, class1, ")
    assert classes.endswith("class19, and 1,180 more, which are in config.json under `label_names`.")


def test_preprocessing_and_versions(tmp_path):
    card = model_card(write_run(tmp_path))
    assert "bicubic resize, centre crop of 0.875 of the side to 3 × 64 × 64; minus mean (0.1, 0.2, 0.3)" in card
    assert "- Trained on 2026-03-01 with riformer 0.1.0, torch 2.11.0" in card
    assert "- Evaluated on 2026-03-02 with riformer 0.1.0" in card


@pytest.mark.parametrize(
    ("noted", "said"),
    [
        (dict(crop_mode="center"), "bicubic resize, centre crop of 0.875 of the side to 3 × 64 × 64"),
        (
            dict(crop_mode="squash", interpolation="bilinear"),
            "bilinear resize that changes the aspect ratio, centre",
        ),
        (
            dict(crop_mode="border"),
            "resize of the longer side, centre crop of 0.875 of the side with borders in the",
        ),
        (dict(input_size=(3, 64, 96)), "centre crop of 0.875 of each side to 3 × 64 × 96"),
    ],
)
def test_preprocessing_is_what_the_model_notes(noted, said, tmp_path):
    card = model_card(write_run(tmp_path, noted=noted))
    assert said in section(card, "Preprocessing")
    height, width = noted.get("input_size", (3, 64, 64))[1:]
    assert f"for an image of {height} × {width} pixels" in card


def test_a_network_for_grey_images_is_said_to_take_grey_values(tmp_path):
    run = write_run(tmp_path)
    grey = tiny(in_chans=1, num_classes=len(CLASSES))
    grey.pretrained_cfg.update(input_size=(1, 64, 64), mean=(0.5,), std=(0.3,), label_names=CLASSES)
    riformer.save(grey, run / "best")
    assert section(model_card(run), "Preprocessing").strip().startswith("grey values in 0..1")


@pytest.mark.parametrize("form", FORMS)
def test_its_code_runs_as_written(form, tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run")
    card = model_card(run, form)
    riformer.save_pretrained(FORMS[form](riformer.load(run)), tmp_path / "FOLDER", card)
    Image.new("RGB", (90, 70), "teal").save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], {})
    name, probability = capsys.readouterr().out.split()
    assert name in CLASSES
    assert 1 / len(CLASSES) < float(probability) <= 1


def test_with_a_repository_it_is_named_after_that(tmp_path):
    card = model_card(write_run(tmp_path), repository="me/my_net")
    assert 'timm.create_model("hf-hub:me/my_net", pretrained=True)' in card
    assert "FOLDER" not in card
    assert "\n# my_net\n" in card
    assert ModelCard(card).data.model_name == "my_net"


def test_a_network_that_mixes_tokens_has_a_training_form_only(tmp_path):
    run = write_run(tmp_path, mixer=("pooling", "affine", "affine", "attention"))
    card = model_card(run, "training")
    assert "mixes tokens (`pooling, attention`)" in card
    assert "deploy form" not in card
    assert "(this model)" in card
    for form in ("deploy", "folded"):
        with pytest.raises(ValueError, match=rf"form is '{form}', but .* mixes tokens \(pooling, attention\)"):
            model_card(run, form)


def test_a_network_trained_in_deploy_form(tmp_path):
    assert "trained without anything in their place." in model_card(write_run(tmp_path, mixer="identity"), "training")


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a run folder"):
        model_card(tmp_path)
    run = write_run(tmp_path / "run")
    with pytest.raises(ValueError, match="form is 'fused'; allowed are training, deploy, folded"):
        model_card(run, "fused")
    (run / "best").rename(run / "last")
    with pytest.raises(ValueError, match="has no best/ yet"):
        model_card(run)


def test_the_model_it_is_about_is_left_alone(tmp_path):
    run = write_run(tmp_path)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    model_card(run, "folded")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert isinstance(timm.create_model(f"local-dir:{run / 'best'}", pretrained=True), torch.nn.Module)
