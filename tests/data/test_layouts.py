"""Layouts of folders: understood and said, or refused with advice; what is left out is counted."""

import hashlib
import logging
import os
import socket
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from image_folders import fill, opened, put, through_json
from timm.data.readers.reader_image_folder import find_images_and_targets

from riformer.data.folders import find_splits
from riformer_runtime.walk import Walk, describe, find_images

CLASSES = {"ant": 3, "bee": 3}
NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def sizes(root: Path) -> dict[str, int]:
    return {split: len(images) for split, images in opened(root).splits.items()}


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("Train", "Val", "Test"),
        ("TRAINING", "Valid", "testing"),
        ("training_set", "validation-set", "test set"),
        ("trainset", "dev", "testset"),
        ("train_images", "eval_images", "test_images"),
        ("images_train", "images_val", "images_test"),
        ("01-train", "02-validation", "03-test"),
        ("train2017", "val2017", "test2017"),
        ("seg_train", "seg_valid", "seg_test"),
        ("Flowers Train", "Flowers Val", "Flowers Test"),
    ],
)
def test_splits_have_many_names(tmp_path: Path, train: str, val: str, test: str) -> None:
    for folder in (train, val, test):
        fill(tmp_path / folder, CLASSES)
    dataset = opened(tmp_path)
    assert dataset.folders == {"train": train, "val": val, "test": test}
    assert dataset.classes == ("ant", "bee")
    assert sizes(tmp_path) == {"train": 6, "val": 6, "test": 6}
    for folder in (train, val, test):
        assert folder in dataset.describe()


@pytest.mark.parametrize(
    "names", [("steam train", "bus"), ("crash test dummy", "cup"), ("seg_train", "cat"), ("a", "b")]
)
def test_class_names_with_words_of_splits_are_classes(tmp_path: Path, names: tuple[str, str]) -> None:
    fill(tmp_path, dict.fromkeys(names, 3))
    assert set(opened(tmp_path).classes) == set(names)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("train", "Train"), "keep one of Train, train, which all mean train"),
        (("train", "val", "Validation"), "keep one of Validation, val, which all mean val"),
        (("train", "dev", "eval", "test"), "keep one of dev, eval, which all mean val"),
        (("val", "test"), "has test, val but no train"),
    ],
)
def test_splits_that_are_ambiguous_are_refused(tmp_path: Path, folders: tuple[str, ...], message: str) -> None:
    for folder in folders:
        fill(tmp_path / folder, CLASSES)
    with pytest.raises(ValueError, match=message):
        opened(tmp_path)


@pytest.mark.parametrize("names", [("train", "bus"), ("train", "test", "cat"), ("dev", "prod"), ("Test", "cat")])
def test_classes_that_are_named_like_splits_are_refused_with_advice_that_works(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    fill(tmp_path / "flat", dict.fromkeys(names, 4))
    with pytest.raises(ValueError, match="move all class folders into a folder NEW/train and give folder:NEW"):
        opened(tmp_path / "flat")
    (tmp_path / "new").mkdir()
    (tmp_path / "flat").rename(tmp_path / "new" / "train")
    assert set(opened(tmp_path / "new").classes) == set(names)


def test_splits_inside_of_classes_are_refused(tmp_path: Path) -> None:
    for name in CLASSES:
        fill(tmp_path / name, {"train": 2, "val": 2})
    with pytest.raises(ValueError, match=r"have folders for splits inside; expected are .*/train/CLASS"):
        opened(tmp_path)


def test_a_folder_that_is_further_down_is_named(tmp_path: Path) -> None:
    fill(tmp_path / "photos" / "train", CLASSES)
    put(tmp_path / "__MACOSX" / "photos" / "a.png")
    with pytest.raises(ValueError, match=rf"give folder:{tmp_path}/photos$"):
        opened(tmp_path)


def test_folders_beside_the_splits_are_left_out_and_said(tmp_path: Path) -> None:
    for split in ("train", "val"):
        fill(tmp_path / split, CLASSES)
    fill(tmp_path, {"unlabeled": 5})
    fill(tmp_path / "extra", {"0": 2, "1": 2})
    put(tmp_path / "cover.png")
    dataset = opened(tmp_path)
    assert sizes(tmp_path) == {"train": 6, "val": 6}
    assert dataset.left_out == {"outside of the split folders": 10}
    assert len(dataset.warnings) == 3  # val repeats the images of train
    assert "the folder unlabeled with its 5 images" in "\n".join(dataset.warnings)
    fill(tmp_path, {"bee": 1})
    with pytest.raises(ValueError, match="beside them, bee, which is also a class in train"):
        opened(tmp_path)


def test_what_systems_make_is_no_data_and_what_is_left_out_is_counted(tmp_path: Path) -> None:
    fill(tmp_path, CLASSES)
    clean = opened(tmp_path).record()
    for junk in (
        *("@eaDir/a.png", "ant/@eaDir/a.png", "__MACOSX/ant/a.png", "#recycle/a.png", "$RECYCLE.BIN/a.png"),
        *("System Volume Information/a.png", "lost+found/a.png", "__pycache__/a.png", "FOUND.000/a.png"),
        *(".thumbnails/a.png", ".ipynb_checkpoints/a.png", "ant/._00.png", "bee/.hidden/a.png"),
    ):
        put(tmp_path / junk)
    for name in ("ant/Thumbs.db", ".DS_Store", "ant/1.HEIC", "bee/2.heic", "notes.txt", "bee/README"):
        (tmp_path / name).write_text("x")
    dataset = opened(tmp_path)
    assert dataset.classes == ("ant", "bee")
    assert {**dataset.record(), "left_out": {}} == {**clean, "left_out": {}}
    assert dataset.left_out["hidden"] == 5
    assert dataset.left_out["of the system (@eaDir)"] == 2
    assert dataset.left_out["with suffix .heic"] == 2
    assert sum(dataset.left_out.values()) == 19
    said = dataset.describe()
    assert "5 hidden" in said
    assert "2 with suffix .heic" in said
    assert said.endswith("to use .heic files, convert them to JPEG or PNG")


def test_two_unicode_forms_of_a_name_are_one_class(tmp_path: Path) -> None:
    assert NFC != NFD
    fill(tmp_path / "a" / "train", {NFC: 3, "tea": 3})
    fill(tmp_path / "a" / "val", {NFD: 2, "tea": 2})
    dataset = opened(tmp_path / "a")
    assert dataset.classes == (NFC, "tea")
    assert dataset.splits["val"].labels == [0, 0, 1, 1]
    fill(tmp_path / "b", {NFC: 3, "tea": 4, NFD: 2})
    dataset = opened(tmp_path / "b", val_fraction=0.3)
    assert dataset.classes == (NFC, "tea")
    assert sum(len(images) for images in dataset.splits.values()) == 9
    assert f"2 folders are the class {NFC}" in dataset.warnings[0]
    assert opened(tmp_path / "b", through_json(dataset.record())).record() == dataset.record()


def test_class_names_that_differ_in_case_across_splits_are_named(tmp_path: Path) -> None:
    fill(tmp_path / "train", {"Cat": 2, "dog": 2})
    fill(tmp_path / "val", {"cat": 2})
    with pytest.raises(ValueError, match="train lacks: cat; train has Cat"):
        opened(tmp_path)


def test_class_folders_are_in_timms_order(tmp_path: Path) -> None:
    fill(tmp_path, dict.fromkeys(("10", "2", "Zebra", "ant", "a10", "A2", "_x", "1-b"), 2))
    _, class_to_idx = find_images_and_targets(str(tmp_path))
    dataset = opened(tmp_path)
    assert {name: label for label, name in enumerate(dataset.classes)} == class_to_idx
    assert "8 classes in natural order: 1-b, 2, 10, _x, A2, ..." in dataset.describe()


def as_recorded_by_version_01(root: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The record with classes in the order of code points, and without what records have had since."""
    classes = sorted(record["classes"])
    splits = {}
    for split, part in record["splits"].items():
        digest = hashlib.sha256()
        for label, name in enumerate(classes):
            for path in part["images"][name]:
                content = hashlib.sha256((root / path).read_bytes()).hexdigest()
                digest.update(os.fsencode(f"{label} {content} {path}\n"))
        images = {name: part["images"][name] for name in classes}
        splits[split] = {"num_images": part["num_images"], "sha256": digest.hexdigest(), "images": images}
    return {"name": record["name"], "classes": classes, "splits": splits, "skipped": [], "num_ignored": 0}


def test_a_record_keeps_its_order_of_classes(tmp_path: Path) -> None:
    fill(tmp_path, {"10": 3, "2": 3, "B": 3, "a": 3})
    new = opened(tmp_path)
    assert new.classes == ("2", "10", "a", "B")
    old = as_recorded_by_version_01(tmp_path, through_json(new.record()))
    again = opened(tmp_path, old)
    assert again.classes == ("10", "2", "B", "a")
    assert "in natural order" not in again.describe()
    assert set(again.splits["val"].names) == set(new.splits["val"].names)
    put(tmp_path / again.splits["train"].names[0], 99)
    with pytest.raises(ValueError, match=r"has changed since the run began .in train"):
        opened(tmp_path, old)


# --- the walk ---------------------------------------------------------------------------------------------------------


def test_training_and_prediction_find_the_same_files(tmp_path: Path) -> None:
    fill(tmp_path / "data", CLASSES)
    put(tmp_path / "elsewhere" / "x.png")
    (tmp_path / "data" / "ant" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "ant" / "up").symlink_to(tmp_path / "data")
    put(tmp_path / "data" / ".hidden" / "a.png")
    put(tmp_path / "data" / "ant" / ".thumbs" / "a.png")
    (tmp_path / "data" / "ant" / "a.HEIC").write_text("x")
    layout = find_splits(tmp_path / "data")
    trained = {tmp_path / "data" / name for names in layout.images["train"].values() for name in names}
    predicted, problems = find_images([tmp_path / "data"])
    assert trained == set(predicted)
    assert len(predicted) == 7
    assert problems == []


def test_prediction_says_what_it_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, CLASSES)
    (tmp_path / "ant" / "a.heic").write_text("x")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    with caplog.at_level(logging.INFO):
        find_images([tmp_path])
    assert "left out 1 with a broken link, 1 with suffix .heic; to use .heic files" in caplog.text


def test_what_cannot_be_an_image_is_yielded_to_be_named_and_never_dropped(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "self.png").symlink_to("self.png")
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket.png"))
        images, problems = find_images([tmp_path])
    assert [image.name for image in images] == ["a.png", "broken.png", "pipe.png", "self.png", "socket.png"]
    assert problems == []


def test_a_path_without_images_does_not_keep_others_from_being_found(tmp_path: Path) -> None:
    put(tmp_path / "a" / "x.png")
    (tmp_path / "empty").mkdir()
    images, problems = find_images(
        [tmp_path / "missing.png", tmp_path / "a", tmp_path / "empty", tmp_path / "a" / "x.png"]
    )
    assert images == [tmp_path / "a" / "x.png"] * 2
    assert problems == [f"no such file or folder: {tmp_path / 'missing.png'}", f"no images in {tmp_path / 'empty'}"]


def test_a_walk_counts_links_that_it_does_not_follow_again(tmp_path: Path) -> None:
    put(tmp_path / "a" / "x.png")
    (tmp_path / "a" / "same").symlink_to(tmp_path / "a")
    walk = Walk()
    assert walk.images(tmp_path) == [tmp_path / "a" / "x.png"]
    assert describe(walk.left_out) == "left out 1 linked again"
