"""Folders of images: which splits and classes are understood, what is left out, which images are held out."""

import json
import logging
import os
import shutil
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from timm.data.readers.reader_image_folder import find_images_and_targets
from train.test_loop import losses, plain

import riformer
from riformer import cli
from riformer.config import DataConfig
from riformer.data import dataset as dataset_module
from riformer.data.dataset import open_dataset
from riformer.data.leaks import seen_in_training
from riformer.study.evaluation import evaluate_model
from riformer.train.loop import train
from riformer.walk import describe, find_images


def fill(folder: Path, names, count: int = 4, start: int = 0) -> Path:
    """Class folders with images, each of its own content."""
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            color = (start + number, i, 7)
            Image.new("RGB", (8, 8), color).save(folder / name / f"{i}.png")
    return folder


def opened(root: Path, **knobs):
    return open_dataset(DataConfig(name=f"folder:{root}", **knobs))


@pytest.mark.parametrize(
    "names", [[str(i) for i in range(1, 13)], ["ant", "Zebra", "bee"], ["img10", "img9", "IMG1"], ["a", "B", "c", "²"]]
)
def test_classes_are_in_timms_order(tmp_path, names):
    fill(tmp_path, names, count=2)
    names = [name for name in names if name != "²"]  # on which timm's key fails
    if "²" not in os.listdir(tmp_path):
        _, expected = find_images_and_targets(str(tmp_path))
        assert opened(tmp_path).classes == tuple(sorted(expected, key=expected.get))
    assert [name for name in opened(tmp_path).classes if name != "²"] == sorted(names, key=str.lower) or names[0] != "a"


def test_a_record_of_another_order_is_refused(tmp_path):
    fill(tmp_path, ["1", "2", "10"])
    record = json.loads(json.dumps(opened(tmp_path).record()))
    record["classes"] = ["1", "10", "2"]
    for part in record["splits"].values():
        part["images"] = {name: part["images"][name] for name in record["classes"]}
    with pytest.raises(ValueError, match="has changed"):  # its digest is of the other order
        open_dataset(DataConfig(name=f"folder:{tmp_path}"), record)


@pytest.mark.parametrize(
    "names",
    [
        ("train", "val", "test"),
        ("Train", "Val", "Test"),
        ("TRAINING", "Validation", "testing"),
        ("train", "dev", "tst"),
    ],
)
def test_splits_are_known_in_any_case_and_by_their_usual_names(tmp_path, names):
    for number, name in enumerate(names):
        fill(tmp_path / name, ["cat", "dog"], start=10 * number)
    data = opened(tmp_path)
    assert data.classes == ("cat", "dog")
    assert {split: len(images) for split, images in data.splits.items()} == dict.fromkeys(("train", "val", "test"), 8)


def test_layouts_that_could_mean_two_things_are_refused(tmp_path):
    for name in ("train", "cat", "dog"):  # a class called train?
        fill(tmp_path / "flat", [name])
    with pytest.raises(ValueError, match="named like a split but holds images itself: if it is a class, rename it"):
        opened(tmp_path / "flat")
    for name in ("train", "Training", "val"):
        fill(tmp_path / "twice" / name, ["cat", "dog"])
    with pytest.raises(ValueError, match="which all mean train; keep one"):
        opened(tmp_path / "twice")
    fill(tmp_path / "no" / "Validation", ["cat", "dog"])
    with pytest.raises(ValueError, match="has Validation but no train"):
        opened(tmp_path / "no")


def test_what_is_left_out_is_said(tmp_path, caplog):
    fill(tmp_path / "train", ["cat", "dog"])
    fill(tmp_path / "train" / "@eaDir", ["cat"])
    fill(tmp_path / "train" / "cat" / "@eaDir", ["thumbs"])
    fill(tmp_path / "train" / ".hidden", ["x"])
    fill(tmp_path / "unlabeled", ["x"])
    (tmp_path / "train" / "cat" / "a.HEIC").touch()
    (tmp_path / "train" / "cat" / "Thumbs.db").touch()
    dataset_module._say_once.cache_clear()
    with caplog.at_level(logging.INFO):
        data = opened(tmp_path)
    assert data.classes == ("cat", "dog")
    assert data.left_out == {
        "folders of the system": 2, "hidden folders": 1, ".heic": 1, "files of the system": 1,
        "folders beside the splits": 1,
    }  # fmt: skip
    for text in ("6 train, 2 val images of 2 classes (cat, dog)", "2 folders of the system", "1 .heic", "unlabeled"):
        assert text in caplog.text


def test_predict_finds_what_training_finds(tmp_path):
    fill(tmp_path, ["cat", "dog"], count=2)
    fill(tmp_path / "cat" / "@eaDir", ["x"])
    fill(tmp_path / ".thumbs", ["x"])
    (tmp_path / "dog" / "x.heic").touch()
    (tmp_path / "more").symlink_to(fill(tmp_path.with_name("elsewhere"), ["linked"], count=1), target_is_directory=True)
    (tmp_path / "dog" / "broken.png").symlink_to(tmp_path / "nowhere.png")
    left_out: Counter[str] = Counter()
    names = [str(path.relative_to(tmp_path)) for path in find_images([tmp_path], left_out)]
    assert names == ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png", "dog/broken.png", "more/linked/0.png"]
    assert describe(left_out) in (
        "1 folders of the system, 1 hidden folders, 1 .heic",
        "1 hidden folders, 1 folders of the system, 1 .heic",
    )


def test_names_that_look_the_same_are_one_class(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    fill(tmp_path / "train", [composed, "tea"])
    fill(tmp_path / "train", [decomposed], start=50)
    fill(tmp_path / "val", [decomposed, "tea"], start=90)
    data = opened(tmp_path)
    assert data.classes == (composed, "tea")
    assert Counter(data.splits["train"].labels) == {0: 8, 1: 4}
    assert Counter(data.splits["val"].labels) == {0: 4, 1: 4}


def test_copies_stay_on_one_side_whatever_the_seed(tmp_path):
    fill(tmp_path, ["cat", "dog"], count=12)
    for i in range(4):
        for copy in range(3):
            shutil.copy(tmp_path / "cat" / f"{i}.png", tmp_path / "cat" / f"copy-{i}-{copy}.png")
    shutil.copy(tmp_path / "cat" / "5.png", tmp_path / "dog" / "cat5.png")
    for seed in range(12):
        data = opened(tmp_path, split_seed=seed, val_fraction=0.3)
        train_contents, val_contents = (set(data.splits[split].contents) for split in ("train", "val"))
        assert not train_contents & val_contents
        assert len(data.splits["val"]) > 4


def test_images_in_two_splits_or_classes_are_named(tmp_path, caplog):
    fill(tmp_path / "train", ["cat", "dog"])
    fill(tmp_path / "val", ["cat"])  # the same images
    shutil.copy(tmp_path / "train" / "cat" / "3.png", tmp_path / "train" / "dog" / "odd.png")
    opened(tmp_path)
    assert "4 images are in several splits at once, such as train/cat/0.png, val/cat/0.png" in caplog.text
    assert "1 images are in several classes at once" in caplog.text


def test_the_split_does_not_follow_the_seed_of_the_training(tmp_path, image_folder):
    recipe = plain(batch_size=20)
    recipe = replace(recipe, data=replace(recipe.data, name=f"folder:{image_folder}"))
    for seed in (0, 1):
        train(replace(recipe, seed=seed), tmp_path / str(seed))
    splits = [json.loads((tmp_path / str(seed) / "data.json").read_text())["splits"] for seed in (0, 1)]
    assert splits[0] == splits[1]
    assert losses(tmp_path / "0") != losses(tmp_path / "1")


def test_a_start_that_was_trained_on_our_validation_images_is_refused(tmp_path, image_folder):
    recipe = plain(batch_size=20)
    data = replace(recipe.data, name=f"folder:{image_folder}")
    train(replace(recipe, data=data), tmp_path / "first")
    for seed, refused in ((0, False), (1, True)):
        later = replace(
            recipe, data=replace(data, split_seed=seed), model=replace(recipe.model, start=str(tmp_path / "first"))
        )
        if refused:
            with pytest.raises(ValueError, match=r"first was trained on \d+ of the images that this run is validated"):
                train(later, tmp_path / str(seed))
        else:
            train(later, tmp_path / str(seed))
    record = json.loads((tmp_path / "first" / "data.json").read_text())
    assert seen_in_training(open_dataset(data), record) == []
    assert len(seen_in_training(open_dataset(replace(data, split_seed=1)), record)) > 3


def test_data_that_moved_resume_exactly_when_their_content_is_the_same(tmp_path, image_folder):
    recipe = plain(epochs=2, batch_size=20)
    recipe = replace(recipe, data=replace(recipe.data, name=f"folder:{image_folder}"))
    train(recipe, tmp_path / "whole")

    def stop(line):
        if line["kind"] == "epoch":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run", stop)
    moved = tmp_path / "elsewhere" / "photos"
    shutil.copytree(image_folder, moved)
    shutil.move(image_folder, tmp_path / "gone")
    assert cli.run("train", ["--resume", str(tmp_path / "run"), "--data.name", f"folder:{moved}"]) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["data"]["name"] == f"folder:{moved}"
    (moved / "one" / "new.png").write_bytes(b"")  # what was added does not matter
    Image.new("RGB", (12, 12), "red").save(next((moved / "zero").glob("*.png")))
    with pytest.raises(ValueError, match="has changed since the run began"):
        train(replace(recipe, data=replace(recipe.data, name=f"folder:{moved}")), tmp_path / "run")


def test_a_file_made_of_a_run_is_evaluated_on_what_was_held_out(tmp_path, image_folder, caplog):
    recipe = plain(batch_size=20)
    recipe = replace(recipe, data=replace(recipe.data, name=f"folder:{image_folder}", split_seed=5))
    train(recipe, tmp_path / "run")
    fused = riformer.save(riformer.fuse(riformer.load(tmp_path / "run")), tmp_path / "fused.safetensors")
    held_out = len(open_dataset(recipe.data).splits["val"])
    with caplog.at_level(logging.INFO):
        result = evaluate_model(riformer.load(fused), DataConfig(name=f"folder:{image_folder}"))["fused"]
    assert result.num_images == held_out < 60
    assert "evaluated on the part that was held out" in caplog.text
    Image.new("RGB", (12, 12)).save(image_folder / "one" / "another.png")  # other data: all of it
    assert evaluate_model(riformer.load(fused), DataConfig(name=f"folder:{image_folder}"))["fused"].num_images == 61


def test_an_interrupted_scan_keeps_what_it_checked(tmp_path, monkeypatch):
    from riformer.data import folders

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fill(tmp_path / "data", ["a", "b"], count=10)
    monkeypatch.setattr(folders, "CHUNK", 1)
    checked = []

    def check(path, real=folders._check_file):
        if len(checked) == 10:
            raise KeyboardInterrupt
        checked.append(path)
        return real(path)

    monkeypatch.setattr(folders, "_check_file", check)
    monkeypatch.setattr(folders.os, "cpu_count", lambda: 1)
    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path / "data")
    kept = len(checked)
    checked.clear()
    monkeypatch.setattr(folders, "_check_file", lambda path: (checked.append(path), (str(path), ""))[1])
    opened(tmp_path / "data")
    assert len(checked) == 20 - kept
