"""What is held out: the same for every training seed, equal files on one side, and doublets between splits named."""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from image_folders import fill, opened, put
from train.test_loop import plain

from riformer.data.splits import hold_out
from riformer.train.loop import train
from riformer.train.run import Run


def test_every_seed_of_training_has_the_same_split_and_another_split_seed_has_not(image_folder: Path) -> None:
    recipe = plain(batch_size=16)
    recipe = replace(recipe, data=replace(recipe.data, name=f"folder:{image_folder}"))
    runs = image_folder.parent / "runs"
    for name, changed in {
        "a": recipe,
        "b": replace(recipe, seed=1),
        "c": replace(recipe, data=replace(recipe.data, split_seed=1)),
    }.items():
        train(changed, runs / name)
    a, b, c = (Run(runs / name).read("data.json")["splits"]["val"]["images"] for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("seed", range(10))
def test_equal_files_are_on_one_side(tmp_path: Path, seed: int) -> None:
    fill(tmp_path, {"a": 12, "b": 12})
    for i in range(3):
        for copy in range(4):
            shutil.copy(tmp_path / "a" / f"{i:02d}.png", tmp_path / "a" / f"copy{copy}-{i}.png")
    shutil.copy(tmp_path / "a" / "05.png", tmp_path / "b" / "also.png")  # even under another label
    dataset = opened(tmp_path, split_seed=seed, val_fraction=0.4)
    train, val = ({*dataset.splits[split].contents} for split in ("train", "val"))
    assert not train & val
    assert len(train | val) == 24
    assert sum(map(len, dataset.splits.values())) == 37
    assert len(dataset.warnings) == 1  # equal files of one class on one side do no harm
    assert "1 images are in more than one class, such as a/05.png and b/also.png" in dataset.warnings[0]


def test_without_equal_files_the_split_is_that_of_version_01(tmp_path: Path) -> None:
    dataset = opened(fill(tmp_path, {"a": 10, "b": 5}))
    assert dataset.splits["val"].names == ["a/07.png", "a/08.png", "b/04.png"]


def test_contents_decide_only_where_they_are_known() -> None:
    images = {"a": [f"a{i}" for i in range(10)], "b": [f"b{i}" for i in range(10)]}
    blind = hold_out(images, 0.3, 0, {})
    assert hold_out(images, 0.3, 0, {name: name.upper() for names in images.values() for name in names}) == blind
    assert Counter(len(names) for part in blind for names in part.values()) == {7: 2, 3: 2}


def test_a_class_of_copies_of_one_image_cannot_be_split(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 3, "b": 1})
    shutil.copy(tmp_path / "b" / "00.png", tmp_path / "b" / "01.png")
    with pytest.raises(ValueError, match="class 'b' has 2 files that are one image"):
        opened(tmp_path)


def test_images_in_two_splits_or_classes_are_warned_of(tmp_path: Path) -> None:
    fill(tmp_path / "train", {"a": 3, "b": 3})
    for i in range(3):
        put(tmp_path / "val" / "a" / f"{i}.png", 50 + i)
        put(tmp_path / "test" / "b" / f"{i}.png", 70 + i)
    assert opened(tmp_path).warnings == []
    shutil.copy(tmp_path / "train" / "a" / "00.png", tmp_path / "val" / "a" / "again.png")
    shutil.copy(tmp_path / "train" / "a" / "01.png", tmp_path / "val" / "a" / "again2.png")
    shutil.copy(tmp_path / "train" / "a" / "00.png", tmp_path / "test" / "b" / "wrong.png")
    warnings = "\n".join(opened(tmp_path).warnings)
    assert "2 images of val are in train too, such as val/a/again.png and train/a/00.png" in warnings
    assert "1 images of test are in train too" in warnings
    assert "1 images of test are in val too" in warnings
    assert "1 images are in more than one class, such as train/a/00.png and test/b/wrong.png" in warnings
    assert len(opened(tmp_path).splits["val"]) == 5  # nothing is removed
