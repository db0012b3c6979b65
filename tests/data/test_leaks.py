"""Models that were trained on val or test images are refused as teachers and starts, and noticed when evaluated."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from image_folders import fill, opened, put
from train.test_loop import plain

import riformer
from riformer.config import DataConfig, DistillConfig
from riformer.data.leaks import check_leaks
from riformer.study.evaluation import evaluate_model
from riformer.train.loop import train


def make_run(path: Path, data) -> Path:
    """A run folder, as far as its record of data goes."""
    (path / "best").mkdir(parents=True)
    (path / "recipe.json").write_text("{}")
    (path / "data.json").write_text(json.dumps(data.record()))
    return path


def save_model(path: Path, data) -> Path:
    model = timm.create_model("riformer_micro", num_classes=len(data.classes), img_size=8)
    model.pretrained_cfg["train_data"] = data.train_data
    return riformer.save(model, path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return fill(tmp_path / "photos", {"a": 10, "b": 10})


@pytest.mark.parametrize("place", [".", "best", "teacher", "teacher/best"])
def test_a_run_with_another_split_of_the_same_images_is_refused(photos: Path, tmp_path: Path, place: str) -> None:
    make_run(tmp_path / "run" / ("teacher" if "teacher" in place else "."), opened(photos, split_seed=1))
    check_leaks(opened(photos, split_seed=1), [str(tmp_path / "run" / place)])
    with pytest.raises(ValueError, match=r"was trained on [1-4] of the 4 val images, such as .*, of this run"):
        check_leaks(opened(photos), ["", "own", "timm:resnet18", str(tmp_path / "run" / place)])


def test_images_are_known_by_content_wherever_they_are(photos: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", opened(photos, split_seed=1))
    (tmp_path / "moved").mkdir()
    for number, image in enumerate(sorted(photos.rglob("*.png"))):
        put(tmp_path / "moved" / image.parent.name / f"new-{number}.png").write_bytes(image.read_bytes())
    with pytest.raises(ValueError, match=r"was trained on [1-4] of the 4 val images"):
        check_leaks(opened(tmp_path / "moved"), [str(run)])
    other = fill(tmp_path / "other", {"b": 10, "x": 10, "y": 10})
    with pytest.raises(ValueError, match=r"val images"):
        check_leaks(opened(other), [str(run)])  # class b of other is class a of photos, pixel for pixel
    for i in range(10):
        put(other / "b" / f"{i:02d}.png", 5000 + i)
        put(other / "x" / f"{i:02d}.png", 6000 + i)
    check_leaks(opened(other), [str(run)])


def test_test_images_count_and_images_of_our_own_train_do_not(tmp_path: Path) -> None:
    fill(tmp_path / "photos" / "train", {"a": 5, "b": 5})
    for i in range(5):
        put(tmp_path / "photos" / "val" / "a" / f"{i}.png", 500 + i)
        put(tmp_path / "photos" / "test" / "a" / f"{i}.png", 600 + i)
    put(tmp_path / "photos" / "val" / "a" / "leaked.png", 0)  # also in train: warned of, but not the teacher's fault
    check_leaks(opened(tmp_path / "photos"), [str(make_run(tmp_path / "run", opened(tmp_path / "photos")))])
    fill(tmp_path / "big", {"a": 5, "b": 5})
    put(tmp_path / "big" / "a" / "x.png", 603)
    big = opened(tmp_path / "big", val_fraction=0.1)
    assert "a/x.png" in big.splits["train"].names
    with pytest.raises(ValueError, match=r"1 of the 5 test images, such as test/a/3\.png"):
        check_leaks(opened(tmp_path / "photos"), [str(make_run(tmp_path / "big-run", big))])


def test_records_without_digests_are_compared_by_name_in_the_same_folder(photos: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", opened(photos, split_seed=1))
    record = json.loads((run / "data.json").read_text())
    for split in record["splits"].values():
        del split["contents"]
    (run / "data.json").write_text(json.dumps(record))
    check_leaks(opened(photos, split_seed=1), [str(run)])
    with pytest.raises(ValueError, match=r"was trained on [1-4] of the 4 val images"):
        check_leaks(opened(photos), [str(run)])
    (run / "data.json").write_text(json.dumps({**record, "name": f"folder:{tmp_path}/elsewhere"}))
    check_leaks(opened(photos), [str(run)])


@pytest.mark.parametrize("name", ["model.safetensors", "model"])
def test_a_saved_model_knows_its_split_by_digest(photos: Path, tmp_path: Path, name: str) -> None:
    saved = str(save_model(tmp_path / name, opened(photos, split_seed=1)))
    check_leaks(opened(photos, split_seed=1), [saved])
    with pytest.raises(ValueError, match="was trained on the same images in another split"):
        check_leaks(opened(photos), [saved])
    check_leaks(opened(fill(tmp_path / "other", {"a": 8, "b": 9})), [saved])
    check_leaks(opened(photos), [str(save_model(tmp_path / f"own-{name}", opened(photos)))])


def test_a_trusted_teacher_is_a_warning(photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = str(make_run(tmp_path / "run", opened(photos, split_seed=1)))
    check_leaks(opened(photos), [run], trusted=[run])
    assert "it is trusted all the same" in caplog.text


def test_what_a_model_carries_reveals_no_path(photos: Path) -> None:
    text = json.dumps(opened(photos).train_data)
    assert "folder:photos" in text
    assert str(photos.parent) not in text
    assert ".png" not in text


@pytest.fixture
def recipe(image_folder: Path):
    base = plain(batch_size=16)
    return replace(base, data=replace(base.data, name=f"folder:{image_folder}", val_fraction=0.3, split_seed=5))


def test_a_training_refuses_teachers_and_starts_of_another_split(image_folder: Path, tmp_path: Path, recipe) -> None:
    train(recipe, tmp_path / "first")
    other = replace(recipe, data=replace(recipe.data, split_seed=6))
    start = replace(other, model=replace(other.model, start=str(tmp_path / "first")))
    teacher = DistillConfig(logit_teacher=str(tmp_path / "first"), soft_weight=1.0)
    for leaking in (start, replace(other, distill=teacher)):
        with pytest.raises(ValueError, match=r"first was trained on \d+ of the 18 val images"):
            train(leaking, tmp_path / "second")
    train(replace(start, data=recipe.data, seed=3), tmp_path / "third")


def test_a_model_is_evaluated_on_what_its_training_held_out(
    image_folder: Path, tmp_path: Path, recipe, caplog: pytest.LogCaptureFixture
) -> None:
    run = train(recipe, tmp_path / "run")
    fused = riformer.save(riformer.fuse(riformer.load(run.path)), tmp_path / "fused.safetensors")
    moved = image_folder.rename(tmp_path / "renamed")
    expected = [line for line in run.metrics() if line["kind"] == "epoch"][-1]["val_top1"]
    for split in ("", "val"):
        results = evaluate_model(riformer.load(fused), DataConfig(name=f"folder:{moved}"), split)
        assert results["as saved"].num_images == 18
        assert results["as saved"].top1 == pytest.approx(expected)
    with caplog.at_level(logging.INFO):
        evaluate_model(riformer.load(fused), DataConfig(name=f"folder:{moved}"))
    assert "is evaluated on what was held out" in caplog.text


def test_images_that_may_be_training_images_are_warned_of(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path / "split" / "train", {"a": 5, "b": 5})
    for i in range(5):
        put(tmp_path / "split" / "val" / "a" / f"{i}.png", 500 + i)
    torch.manual_seed(0)
    model = riformer.load(save_model(tmp_path / "model", opened(tmp_path / "split")))

    def warnings(folder: Path) -> str:
        caplog.clear()
        evaluate_model(model, DataConfig(name=f"folder:{folder}"))
        return "\n".join(record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)

    assert "was trained on all images on which it is evaluated" in warnings(tmp_path / "split" / "train")
    assert warnings(tmp_path / "split") == ""
    assert warnings(photos) == ""
    (tmp_path / "elsewhere").mkdir()
    assert "perhaps on some of its images" in warnings(photos.rename(tmp_path / "elsewhere" / "split"))
