"""A folder of images is opened as it is, or refused by name."""

import json
import logging
import os
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from image_folders import fill, names_of, opened, put, through_json

from riformer.config import DataConfig
from riformer.data.dataset import open_dataset
from riformer.data.scan import check_files


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_folder_with_splits(tmp_path: Path, val: str) -> None:
    fill(tmp_path / "train", {"dog": 3, "cat": 2, "eel": 1})
    put(tmp_path / "train" / "cat" / "deep" / "er" / "x.PNG")
    put(tmp_path / "train" / "cat" / ".hidden.png")
    put(tmp_path / "train" / "cat" / ".git" / "a.png")
    put(tmp_path / "train" / ".cache" / "a.png")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "labels.csv").write_text("not an image")
    fill(tmp_path / val, {"eel": 2})  # lacks the first classes: labels must not shift
    fill(tmp_path / "test", {"dog": 1, "cat": 1})
    dataset = opened(tmp_path)
    assert dataset.classes == ("cat", "dog", "eel")
    assert dataset.splits["train"].labels == [0, 0, 0, 1, 1, 1, 2]
    assert dataset.splits["train"].names[:3] == ["train/cat/00.png", "train/cat/01.png", "train/cat/deep/er/x.PNG"]
    assert dataset.splits["val"].labels == [2, 2]
    assert dataset.splits["val"].names == [f"{val}/eel/00.png", f"{val}/eel/01.png"]
    assert dataset.splits["test"].labels == [0, 1]
    assert dataset.left_out == {"with suffix .csv": 1, "with suffix .txt": 1, "hidden": 3}
    assert dataset.splits["train"].read(3).getpixel((0, 0)) == (0, 0, 0)  # dog 0
    assert dataset.splits["val"].read(1).size == (4, 4)


@pytest.mark.parametrize("base", [".", "train"])
def test_split_is_drawn_by_class_and_seed(tmp_path: Path, base: str) -> None:
    fill(tmp_path / base, {"a": 20, "b": 10, "c": 2})
    dataset = opened(tmp_path, split_seed=0, val_fraction=0.25)
    assert Counter(dataset.splits["val"].labels) == {0: 5, 1: 2, 2: 1}
    assert Counter(dataset.splits["train"].labels) == {0: 15, 1: 8, 2: 1}
    everything = dataset.splits["train"].names + dataset.splits["val"].names
    assert len(set(everything)) == 32
    assert names_of(opened(tmp_path, split_seed=0, val_fraction=0.25)) == names_of(dataset)
    assert names_of(opened(tmp_path, split_seed=1, val_fraction=0.25)) != names_of(dataset)


def test_train_keeps_an_image_of_each_class(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 2, "b": 3})
    assert Counter(opened(tmp_path, val_fraction=0.99).splits["train"].labels) == {0: 1, 1: 1}


def test_class_with_a_single_image(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 2, "rare": 1})
    with pytest.raises(ValueError, match=r"class 'rare' has a single image, rare/00\.png"):
        opened(tmp_path)


def test_test_folder_without_val(tmp_path: Path) -> None:
    fill(tmp_path / "train", {"a": 4, "b": 4})
    fill(tmp_path / "test", {"a": 1})
    assert {split: len(part) for split, part in opened(tmp_path).splits.items()} == {"train": 6, "val": 2, "test": 1}


@pytest.mark.parametrize("split", ["val", "test"])
def test_class_that_train_lacks(tmp_path: Path, split: str) -> None:
    fill(tmp_path / "train", {"a": 2, "b": 2})
    fill(tmp_path / split, {"a": 1, "stranger": 1})
    with pytest.raises(ValueError, match=f"classes in {split} of .* that train lacks: stranger"):
        opened(tmp_path)


def test_folders_that_do_not_have_the_layout(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no folder .*missing"):
        opened(tmp_path / "missing")
    with pytest.raises(ValueError, match="there is no folder ''"):
        open_dataset(DataConfig(name="folder:"))
    with pytest.raises(ValueError, match="has no class folders"):
        opened(tmp_path)
    fill(tmp_path / "one", {"a": 2})
    with pytest.raises(ValueError, match=r"has one class only \(a\)"):
        opened(tmp_path / "one")
    (tmp_path / "one" / "hollow").mkdir()
    with pytest.raises(ValueError, match=r"class folder .*hollow has no images"):
        opened(tmp_path / "one")
    put(fill(tmp_path / "loose", {"a": 2, "b": 2}) / "x.png")
    with pytest.raises(ValueError, match=r"has 1 images that lie in no class folder, such as x\.png"):
        opened(tmp_path / "loose")
    fill(tmp_path / "valonly" / "val", {"a": 2, "b": 2})
    with pytest.raises(ValueError, match="has val but no train"):
        opened(tmp_path / "valonly")
    fill(tmp_path / "two" / "train", {"a": 2, "b": 2})
    fill(tmp_path / "two" / "val", {"a": 2, "b": 2})
    fill(tmp_path / "two" / "valid", {"a": 2, "b": 2})
    with pytest.raises(ValueError, match="has train, val, valid; keep one"):
        opened(tmp_path / "two")


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    fill(tmp_path / "data", {"a": 2, "b": 2})
    put(tmp_path / "elsewhere" / "x.png")
    (tmp_path / "data" / "a" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "a" / "up").symlink_to(tmp_path / "data")
    dataset = opened(tmp_path / "data")
    names = dataset.splits["train"].names + dataset.splits["val"].names
    assert sorted(names) == ["a/00.png", "a/01.png", "a/more/x.png", "b/00.png", "b/01.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_folders_and_files_without_permission(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "a" / "00.png").chmod(0)
    with pytest.raises(ValueError, match=r"a/00\.png: Permission denied"):
        opened(tmp_path)
    (tmp_path / "b").chmod(0)
    with pytest.raises(ValueError, match=r"cannot read folder .*b: Permission denied"):
        opened(tmp_path)
    tmp_path.chmod(0)
    with pytest.raises(ValueError, match=r"cannot read folder .*: Permission denied"):
        opened(tmp_path)
    tmp_path.chmod(0o700)
    (tmp_path / "b").chmod(0o700)


def spoil(root: Path) -> None:
    """One file of every kind that cannot be read."""
    (root / "a" / "empty.png").touch()
    (root / "a" / "text.png").write_text("no image")
    whole = put(root / "b" / "cut.png").read_bytes()
    (root / "b" / "cut.png").write_bytes(whole[:45])
    (root / "b" / "dangling.png").symlink_to(root / "nowhere.png")


def test_bad_images_are_an_error_that_names_them(tmp_path: Path) -> None:
    spoil(fill(tmp_path, {"a": 4, "b": 4}))
    with pytest.raises(ValueError, match=r"4 of 12 images .* --data\.on-bad skip") as caught:
        opened(tmp_path)
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert lines[0] == "a/empty.png: the file is empty"
    assert lines[1].startswith("a/text.png: not an image in a format that is read")
    assert lines[2].startswith("b/cut.png: ")
    assert lines[3] == "b/dangling.png: No such file or directory"
    assert len(lines) == 4


def test_at_most_twenty_bad_images_are_named(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 2, "b": 2})
    for i in range(25):
        (tmp_path / "a" / f"bad{i:02d}.png").touch()
    with pytest.raises(ValueError, match="25 of 29 images") as caught:
        opened(tmp_path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 22
    assert lines[-1].strip() == "... and 5 more"


def test_bad_images_are_left_out_on_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, {"a": 4, "b": 4})
    clean = opened(tmp_path)
    spoil(tmp_path)
    with caplog.at_level(logging.WARNING):
        dataset = opened(tmp_path, on_bad="skip")
    assert "left out 4 images" in caplog.text
    assert names_of(dataset) == names_of(clean)
    assert [entry["path"] for entry in dataset.skipped] == ["a/empty.png", "a/text.png", "b/cut.png", "b/dangling.png"]
    assert dataset.skipped[0]["reason"] == "the file is empty"
    record = through_json(dataset.record())
    assert record["skipped"] == dataset.skipped
    assert opened(tmp_path, record=record, on_bad="skip").record() == record


def test_class_of_which_nothing_is_left(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 4, "b": 4})
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "empty.png").touch()
    with pytest.raises(ValueError, match="none of the images in train of class c "):
        opened(tmp_path, on_bad="skip")


def test_record_brings_the_same_split_back(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 10, "b": 10})
    first = opened(tmp_path, split_seed=3)
    record = through_json(first.record())
    assert record["classes"] == ["a", "b"]
    assert record["splits"]["val"]["num_images"] == 4
    assert record["splits"]["val"]["images"]["b"] == [name for name in first.splits["val"].names if name[0] == "b"]
    fill(tmp_path, {"a": 15, "aa": 5, "b": 10})  # more images, and a class between the two
    with pytest.raises(ValueError, match=r"has changed since the run began .in train, val"):
        opened(tmp_path, split_seed=3, record=record)  # fill has repainted class b
    fill(tmp_path, {"a": 15, "b": 10})
    again = opened(tmp_path, split_seed=99, record=record)
    assert again.classes == ("a", "b")
    assert names_of(again) == names_of(first)
    assert again.record() == record


def test_image_that_vanished_or_broke_since_the_record(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 4, "b": 4})
    dataset = opened(tmp_path)
    record = dataset.record()
    gone = dataset.splits["train"].names[1]
    content = (tmp_path / gone).read_bytes()
    (tmp_path / gone).unlink()
    with pytest.raises(ValueError, match=f"restore them:\n  {gone}: No such file"):
        opened(tmp_path, record=record, on_bad="skip")
    (tmp_path / gone).write_bytes(content[:45])
    with pytest.raises(ValueError, match=f"restore them:\n  {gone}: "):
        opened(tmp_path, record=record, on_bad="skip")
    (tmp_path / gone).write_bytes(content)
    assert opened(tmp_path, record=record).record() == record


def test_checked_files_are_not_decoded_again_until_they_change(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 3, "b": 3})
    path = tmp_path / "a" / "00.png"
    before = opened(tmp_path).record()
    status = path.stat()
    path.write_bytes(b"x" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert opened(tmp_path).record() == before  # size and time say that it is the file of before
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(ValueError, match=r"a/00\.png: not an image"):
        opened(tmp_path)


def index_of(cache: Path) -> Path:
    (index,) = (cache / "riformer").iterdir()
    return index


def test_a_damaged_index_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "data", {"a": 3, "b": 3})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = opened(tmp_path / "data").record()
    index = index_of(tmp_path / "cache")
    whole = index.read_bytes()
    for damaged in (b"[1, 2", b"", whole[:-20], whole[20:], b"\xff" + whole, whole.replace(b'"', b"'")):
        index.write_bytes(damaged)
        assert opened(tmp_path / "data").record() == before
        assert len(known(index)) == 6


def known(index: Path) -> set[str]:
    """The files that the next start does not check."""
    names = set()
    for line in index.read_text(errors="replace").splitlines():
        with suppress(ValueError):
            names.add(json.loads(line)[0])
    return names


def test_an_index_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path / "data", {"a": 3, "b": 3})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = opened(tmp_path / "data").record()
    index = index_of(tmp_path / "cache")
    index.unlink()
    index.mkdir()
    assert opened(tmp_path / "data").record() == before
    assert caplog.text.count("the next start checks all images again") == 1


def test_an_interrupted_scan_keeps_what_it_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "data", {"a": 30, "b": 30})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names = sorted(path.relative_to(tmp_path / "data").as_posix() for path in (tmp_path / "data").rglob("*.png"))
    scan = """
import os, sys
from pathlib import Path
from riformer.data import scan
calls, check = [], scan._check_file
def dying(path):
    calls.append(path)
    if len(calls) == 50:
        os._exit(9)
    return check(path)
scan._check_file, scan.SAVE_SECONDS, scan.os.cpu_count = dying, 0.0, lambda: 1
scan.check_files(Path(sys.argv[1]), sys.argv[2:])
"""
    process = subprocess.run([sys.executable, "-c", scan, str(tmp_path / "data"), *names], check=False)
    assert process.returncode == 9
    assert len(known(index_of(tmp_path / "cache"))) > 20
    hashes, bad = check_files(tmp_path / "data", names)
    assert (len(hashes), bad) == (60, {})
    assert len(known(index_of(tmp_path / "cache"))) == 60
