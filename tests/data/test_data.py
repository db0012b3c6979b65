"""Data: every folder is opened as it is or refused by name; batches are pure functions of seed, epoch and step."""

import gzip
import json
import logging
import os
import pickle
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment
from torch import Tensor

from riformer.config import AugmentConfig, DataConfig
from riformer.data.batches import TrainBatches, eval_batches, preprocessing, seeded, train_transform
from riformer.data.builtin import FASHION_FILES
from riformer.data.dataset import Dataset, ImageList, open_dataset

SMALL = DataConfig(img_size=16, crop_pct=1.0)
EVERYTHING = AugmentConfig()
LIGHT = AugmentConfig(
    crop_scale=(0.7, 1.0), hflip=0.0, color_jitter=0.0, auto_augment="", random_erasing=0.0, mixup=0.0, cutmix=0.0
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return open_dataset(DataConfig(name="digits"))


def put(path: Path, value: int = 0) -> Path:
    """A small valid image of its own colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (value % 256, value // 256, 0)).save(path, "PNG")
    return path


def fill(folder: Path, counts: dict[str, int]) -> Path:
    """Class folders with that many images."""
    for number, (name, count) in enumerate(counts.items()):
        for i in range(count):
            put(folder / name / f"{i:02d}.png", 100 * number + i)
    return folder


def opened(root: Path, record: dict[str, Any] | None = None, **knobs: Any) -> Dataset:
    return open_dataset(DataConfig(name=f"folder:{root}", **knobs), record)


def through_json(record: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(record))


def names_of(dataset: Dataset) -> dict[str, list[str]]:
    return {split: images.names for split, images in dataset.splits.items()}


# --- built-in ---------------------------------------------------------------------------------------------------------


def test_digits_are_scikit_learns(digits: Dataset) -> None:
    expected = pytest.importorskip("sklearn.datasets").load_digits()
    names = [name for images in digits.splits.values() for name in images.names]
    assert sorted(names) == [f"{i:04d}" for i in range(1797)]
    for images in (digits.splits["train"], digits.splits["val"], digits.splits["test"]):
        indices = [int(name) for name in images.names]
        assert images.labels == expected.target[indices].tolist()
        read = torch.stack([torch.from_numpy(np.array(images.read(i))) for i in range(len(images))])
        wanted = torch.from_numpy(expected.images[indices] * 255 / 16)[..., None].expand(-1, -1, -1, 3)
        torch.testing.assert_close(read.double(), wanted, atol=0.5, rtol=0)


def test_digits_split_is_fixed_and_stratified(digits: Dataset) -> None:
    assert {split: len(images) for split, images in digits.splits.items()} == {"train": 1000, "val": 297, "test": 500}
    assert digits.classes == tuple("0123456789")
    other = open_dataset(DataConfig(name="digits"))
    assert names_of(other) == names_of(digits)
    total = Counter(label for images in digits.splits.values() for label in images.labels)
    assert len(total) == 10
    for images in (digits.splits["train"], digits.splits["val"], digits.splits["test"]):
        counts = Counter(images.labels)
        assert all(abs(counts[label] - total[label] * len(images) / 1797) < 1.5 for label in total)
    pinned = "d1a375641647cfc935c356079ad9b86577320e43e8c737f5ce0420b95df29c9e"
    assert digits.splits["test"].sha256 == pinned, "another test split would make old results incomparable"


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def write_fashion(folder: Path) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    arrays = {
        FASHION_FILES[0]: generator.integers(0, 256, (240, 28, 28), dtype=np.uint8),
        FASHION_FILES[1]: np.arange(240, dtype=np.uint8) % 10,
        FASHION_FILES[2]: generator.integers(0, 256, (30, 28, 28), dtype=np.uint8),
        FASHION_FILES[3]: np.arange(30, dtype=np.uint8) % 10,
    }
    for name, array in arrays.items():
        write_idx(folder / name, array)
    return arrays


@pytest.mark.parametrize("inside", [".", "FashionMNIST/raw"])
def test_fashion_mnist_from_its_root(tmp_path: Path, inside: str) -> None:
    arrays = write_fashion(tmp_path / inside)
    config = DataConfig(name="fashion-mnist", root=str(tmp_path))
    dataset = open_dataset(config)
    assert {split: len(images) for split, images in dataset.splits.items()} == {"train": 220, "val": 20, "test": 30}
    assert Counter(dataset.splits["val"].labels) == dict.fromkeys(range(10), 2)
    assert dataset.classes[7] == "Sneaker"
    assert names_of(open_dataset(config)) == names_of(dataset)
    val = dataset.splits["val"]
    index = int(val.names[3].removeprefix("train/"))
    assert val.labels[3] == index % 10
    pixels = torch.from_numpy(arrays[FASHION_FILES[0]][index])[..., None].expand(-1, -1, 3)
    torch.testing.assert_close(torch.from_numpy(np.array(val.read(3))), pixels)


def test_fashion_mnist_that_is_damaged_or_nowhere(tmp_path: Path) -> None:
    write_fashion(tmp_path)
    config = DataConfig(name="fashion-mnist", root=str(tmp_path))
    record = through_json(open_dataset(config).record())
    assert open_dataset(config, record).record() == record
    write_idx(tmp_path / FASHION_FILES[2], np.zeros((30, 28, 28), np.uint8))
    with pytest.raises(ValueError, match=r"fashion-mnist has changed since the run began .in test"):
        open_dataset(config, record)
    write_idx(tmp_path / FASHION_FILES[1], np.zeros(239, np.uint8))
    with pytest.raises(ValueError, match="are not fashion-mnist's images and labels"):
        open_dataset(config)
    file = tmp_path / FASHION_FILES[0]
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"{FASHION_FILES[0]} is not a whole gzipped IDX file"):
        open_dataset(config)
    with pytest.raises(ValueError, match=r"cannot be downloaded .*dataset-fashion-mnist.*--data\.root"):
        open_dataset(replace(config, root=str(file / "no-folder")))  # below a file nothing can be made


@pytest.mark.parametrize(("name", "hint"), [("digit", "digits"), ("fashion_mnist", "fashion-mnist"), ("imagenet", "")])
def test_unknown_name(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=rf"data\.name is '{name}'; allowed are .*folder:PATH") as caught:
        open_dataset(DataConfig(name=name))
    assert ("did you mean" in str(caught.value)) == bool(hint)
    assert hint in str(caught.value)


def test_unknown_name_that_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"did you mean folder:{tmp_path}"):
        open_dataset(DataConfig(name=str(tmp_path)))


# --- folders ----------------------------------------------------------------------------------------------------------


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
    assert dataset.left_out == {".txt": 1, ".csv": 1, "hidden files": 1, "hidden folders": 2}
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
    with pytest.raises(ValueError, match=f"classes in .*{split} that train lacks: stranger"):
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
    with pytest.raises(ValueError, match="has val, valid, which all mean val; keep one"):
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


def test_damaged_index_and_unwritable_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path / "data", {"a": 3, "b": 3})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = opened(tmp_path / "data").record()
    (index,) = (tmp_path / "cache" / "riformer").iterdir()
    index.write_text("[1, 2")
    assert opened(tmp_path / "data").record() == before
    index.unlink()
    index.mkdir()  # in place of which no file can be put
    assert opened(tmp_path / "data").record() == before
    assert "will check all images again" in caplog.text


def write_cifar(folder: Path, name: str, num_classes: int) -> np.ndarray:
    """CIFAR's python version, 24 training images and 6 others."""
    drawn = np.random.default_rng(0).integers(0, 256, (30, 3072), np.uint8)
    cifar10 = name == "cifar10"
    base = folder / ("cifar-10-batches-py" if cifar10 else "cifar-100-python")
    base.mkdir(parents=True)
    names = [f"data_batch_{i}" for i in range(1, 6)] if cifar10 else ["train"]
    parts = [*np.array_split(np.arange(24), len(names)), np.arange(24, 30)]
    for file, part in zip([*names, "test_batch" if cifar10 else "test"], parts, strict=True):
        labels = [int(i) % num_classes for i in part]
        (base / file).write_bytes(pickle.dumps({"data": drawn[part], "labels" if cifar10 else "fine_labels": labels}))
    meta = {"label_names" if cifar10 else "fine_label_names": [f"thing {i}" for i in range(num_classes)]}
    (base / ("batches.meta" if cifar10 else "meta")).write_bytes(pickle.dumps(meta))
    return drawn.reshape(30, 3, 32, 32).transpose(0, 2, 3, 1)


@pytest.mark.parametrize(("name", "num_classes"), [("cifar10", 2), ("cifar100", 3)])
def test_cifar_from_its_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, num_classes: int) -> None:
    from torchvision.datasets import CIFAR10

    pixels = write_cifar(tmp_path, name, num_classes)
    config = DataConfig(name=name, root=str(tmp_path))
    with pytest.raises(ValueError, match=f"{name} is not in .* cannot be downloaded .*--data.root"):
        open_dataset(config)  # these are not the files that its checksums are of
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    data = open_dataset(config)
    assert data.classes == tuple(f"thing {i}" for i in range(num_classes))
    assert {split: len(images) for split, images in data.splits.items()} == {"train": 22, "val": 2, "test": 6}
    for images in data.splits.values():
        for index, image_name in enumerate(images.names):
            part, number = image_name.split("/")
            np.testing.assert_array_equal(images.read(index), pixels[int(number) + 24 * (part == "test")])


def write_glyphs(folder: Path) -> dict[str, np.ndarray]:
    """Six faces of three families, one family a split, three classes."""
    rng = np.random.default_rng(0)
    arrays = {"image": np.zeros((18, 64, 64), np.uint8), "label": np.tile(np.arange(3, dtype=np.uint8), 6)}
    arrays["image"][:, 16:48, 16:48] = rng.integers(0, 256, (18, 32, 32))
    arrays["family"] = np.repeat(np.arange(3, dtype=np.int32), 6)
    arrays["split"] = np.repeat(np.array([1, 0, 2], np.uint8), 6)
    arrays["classes"], arrays["families"] = np.array(list("ABC")), np.array(["bodoni", "futura", "garamond"])
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "glyphs.npz", **arrays)
    return arrays


def test_glyphs_are_split_by_family_and_judged_on_one_fixed_draw(tmp_path: Path) -> None:
    arrays = write_glyphs(tmp_path)
    config = DataConfig(name="glyphs", root=str(tmp_path), img_size=32)
    data = open_dataset(config)
    assert data.classes == ("A", "B", "C")
    families = {split: {name.split("/")[0] for name in images.names} for split, images in data.splits.items()}
    assert families == {"train": {"futura"}, "val": {"bodoni"}, "test": {"garamond"}}
    assert all(images.labels == [0, 1, 2, 0, 1, 2] for images in data.splits.values())
    np.testing.assert_array_equal(data.splits["train"].source, arrays["image"][6:12])
    assert data.splits["val"].source.shape == data.splits["test"].source.shape == (6, 32, 32)
    assert len({image.tobytes() for image in data.splits["test"].source}) == 6
    assert open_dataset(config, through_json(data.record())).record() == data.record()


def test_glyphs_that_are_damaged_or_nowhere(tmp_path: Path) -> None:
    config = DataConfig(name="glyphs", root=str(tmp_path))
    with pytest.raises(ValueError, match=r"there is no .*glyphs\.npz: make it with .*--data\.root"):
        open_dataset(config)
    write_glyphs(tmp_path)
    whole = (tmp_path / "glyphs.npz").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"PK"):
        (tmp_path / "glyphs.npz").write_bytes(damaged)
        with pytest.raises(ValueError, match="is not a whole file of glyphs"):
            open_dataset(config)


# --- batches ----------------------------------------------------------------------------------------------------------


def train_batches(digits: Dataset, augment: AugmentConfig = EVERYTHING, **knobs: Any) -> TrainBatches:
    data = replace(SMALL, num_workers=knobs.pop("num_workers", 0))
    return TrainBatches(some(digits, 50), 10, data, augment, **{"seed": 0, "batch_size": 8, **knobs})


def some(digits: Dataset, count: int) -> ImageList:
    images = digits.splits["train"]
    return replace(images, names=images.names[:count], labels=images.labels[:count])


def draws() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()]


def test_seeded_depends_on_keys_alone_and_restores() -> None:
    random.gauss(0, 1)  # leaves half a pair behind in Python's generator
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    with seeded(1, 2):
        first = draws()
    after = draws()
    with seeded(1, 2):
        again = draws()
    with seeded(1, 3):
        other = draws()
    assert again == first
    assert not set(other) & set(first)
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    assert draws() == after
    before = torch.get_rng_state()
    with pytest.raises(KeyError), seeded(0):
        raise KeyError
    torch.testing.assert_close(torch.get_rng_state(), before)


def test_sample_is_a_pure_function_of_seed_epoch_and_index(digits: Dataset) -> None:
    parts = train_batches(digits).parts
    alone, *_ = parts[2, 0, [7, 11]]
    draws()
    unmixed = train_batches(digits, replace(EVERYTHING, mixup=0.0, cutmix=0.0)).parts
    company, *_ = unmixed[2, 5, [3, 11, 7]]
    pair, *_ = unmixed[2, 1, [7, 11]]
    torch.testing.assert_close(pair, company[[2, 1]], atol=0, rtol=0)
    again, *_ = parts[2, 0, [7, 11]]
    torch.testing.assert_close(again, alone, atol=0, rtol=0)
    other_epoch, *_ = unmixed[3, 0, [7, 11]]
    other_seed, *_ = train_batches(digits, replace(EVERYTHING, mixup=0.0, cutmix=0.0), seed=1).parts[2, 0, [7, 11]]
    assert (other_epoch - pair).abs().max() > 0.1
    assert (other_seed - pair).abs().max() > 0.1


def test_generators_are_untouched_by_an_epoch(digits: Dataset) -> None:
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    for num_workers in (0, 2):
        assert len(list(train_batches(digits, num_workers=num_workers).epoch(0))) == 6
        assert len(list(eval_batches(some(digits, 10), preprocessing(SMALL), 4, num_workers))) == 3
    assert random.getstate() == states[0]
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])
    torch.testing.assert_close(torch.get_rng_state(), states[2])


def assert_same_steps(actual: list, expected: list) -> None:
    assert len(actual) == len(expected) > 0
    torch.testing.assert_close(actual, expected, atol=0, rtol=0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_at_a_step_equals_going_there(digits: Dataset, num_workers: int) -> None:
    whole = list(train_batches(digits, accumulation=2).epoch(1))
    assert len(whole) == 6
    assert all(len(parts) == 2 for parts in whole)
    draws()
    batches = train_batches(digits, accumulation=2, num_workers=num_workers)
    assert_same_steps(list(batches.epoch(1, start_step=4)), whole[4:])
    assert_same_steps(list(batches.epoch(1)), whole)
    assert list(batches.epoch(1, start_step=6)) == []


def test_skipped_steps_are_not_decoded(tmp_path: Path) -> None:
    images = opened(fill(tmp_path, {"a": 10, "b": 10}), val_fraction=0.1).splits["train"]
    numbered = replace(images, labels=list(range(18)))  # the targets then tell which images a step took
    batches = TrainBatches(numbered, 18, SMALL, LIGHT, seed=0, batch_size=6)
    whole = list(batches.epoch(0))
    skipped = torch.cat([step[0][1] for step in whole[:2]]).argmax(dim=1).tolist()
    assert len(set(skipped)) == 12
    for index in skipped:
        (tmp_path / images.names[index]).unlink()
    assert_same_steps(list(batches.epoch(0, start_step=2)), whole[2:])
    with pytest.raises(ValueError, match="No such file"):
        next(batches.epoch(0, start_step=1))


def test_two_epochs_in_turn_do_not_disturb_each_other(digits: Dataset) -> None:
    batches = train_batches(digits)
    alone = [list(batches.epoch(0)), list(batches.epoch(1))]
    both = list(zip(batches.epoch(0), batches.epoch(1), strict=True))
    assert_same_steps([steps[0] for steps in both], alone[0])
    assert_same_steps([steps[1] for steps in both], alone[1])
    assert (alone[0][0][0][0] - alone[1][0][0][0]).abs().max() > 0.1


def step_images(digits: Dataset, **knobs: Any) -> list[Tensor]:
    """All images of each step of epoch 3, over ranks and parts, in the order of the global batch."""
    world_size = knobs.get("world_size", 1)
    ranks = [list(train_batches(digits, LIGHT, rank=rank, **knobs).epoch(3)) for rank in range(world_size)]
    return [torch.cat([images for parts in step for images, *_ in parts]) for step in zip(*ranks, strict=True)]


@pytest.mark.parametrize("knobs", [{"world_size": 2}, {"accumulation": 2}, {"world_size": 2, "accumulation": 4}])
def test_a_step_sees_the_same_images_however_divided(digits: Dataset, knobs: dict[str, int]) -> None:
    expected = step_images(digits)
    assert len(expected) == 6
    assert_same_steps(step_images(digits, **knobs), expected)


def test_an_epoch_takes_each_image_at_most_once(digits: Dataset) -> None:
    numbered = replace(some(digits, 50), labels=list(range(50)))  # each image is its own class
    batches = TrainBatches(numbered, 50, SMALL, LIGHT, seed=0, batch_size=8)
    assert batches.steps_per_epoch == 6
    targets = torch.cat([target for step in batches.epoch(0) for _, target, _ in step])
    assert targets.sum(0).max() == 1
    assert targets.sum() == 48


def test_augmentations_come_in_turns_and_the_order_is_always_new(digits: Dataset) -> None:
    batches = train_batches(digits, replace(EVERYTHING, mixup=0.0, cutmix=0.0), num_augmentations=2)
    seen: list[dict[int, Tensor]] = []
    for epoch in range(4):
        parts = [part for step in batches.epoch(epoch) for part in step] + list(batches.left_out(epoch))
        indices = torch.cat([indices for *_, indices in parts]).tolist()
        assert set(indices) == set(range(50))
        seen.append(dict(zip(indices, torch.cat([images for images, *_ in parts]), strict=True)))
    orders = [list(images) for images in seen]
    assert all(orders[i] != orders[j] for i in range(4) for j in range(i))
    for i in range(50):
        torch.testing.assert_close(seen[2][i], seen[0][i], atol=0, rtol=0)
        torch.testing.assert_close(seen[3][i], seen[1][i], atol=0, rtol=0)
    assert all((seen[1][i] - seen[0][i]).abs().max() > 0 for i in range(50))
    live = train_batches(digits, replace(EVERYTHING, mixup=0.0, cutmix=0.0))
    assert_same_steps(list(batches.epoch(1)), list(live.epoch(1)))
    assert not torch.equal(next(batches.epoch(2))[0][0], next(live.epoch(2))[0][0])


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_an_epoch_leaves_out_is_shared_by_the_processes(digits: Dataset, world_size: int) -> None:
    ranks = [train_batches(digits, LIGHT, batch_size=14, world_size=world_size, rank=r) for r in range(world_size)]
    left = [part for batches in ranks for part in batches.left_out(1)]
    taken = [part for batches in ranks for step in batches.epoch(1) for part in step]
    missed, seen = (set(torch.cat([indices for *_, indices in parts]).tolist()) for parts in (left, taken))
    assert (len(missed), missed | seen) == (50 % 14, set(range(50)))
    assert not missed & seen
    assert {len(images) for images, *_ in left} == {14 // world_size}  # filled up
    assert list(train_batches(digits, LIGHT, batch_size=10).left_out(0)) == []


def test_targets_are_one_hot_or_mixed(digits: Dataset) -> None:
    (images, targets, _), *_ = next(train_batches(digits, LIGHT).epoch(0))
    assert images.shape == (8, 3, 16, 16)
    assert (images.dtype, targets.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(targets.sort(dim=1).values, torch.eye(10)[9].expand(8, 10))
    for mix in ({"mixup": 0.8}, {"cutmix": 1.0}):
        mixing = train_batches(digits, replace(LIGHT, **mix))
        steps = [step[0] for step in mixing.epoch(0)]
        again = [step[0] for step in mixing.epoch(0)]
        assert_same_steps(again, steps)
        mixed = torch.cat([targets for _, targets, _ in steps])
        assert mixed.dtype == torch.float32
        torch.testing.assert_close(mixed.sum(1), torch.ones(48))
        assert ((mixed > 0.01) & (mixed < 0.99)).any()


def test_batches_that_cannot_be_made(digits: Dataset) -> None:
    with pytest.raises(ValueError, match=r"--optim\.batch-size 64 is more than the 50 training images"):
        train_batches(digits, batch_size=64)
    with pytest.raises(ValueError, match=r"--optim\.batch-size 8 does not divide by 3 processes x 1 parts"):
        train_batches(digits, world_size=3)
    with pytest.raises(ValueError, match=r"--optim\.batch-size 8 does not divide by 2 processes x 3 parts"):
        train_batches(digits, world_size=2, accumulation=3)
    with pytest.raises(ValueError, match=r"mixup and cutmix pair images, but --optim\.batch-size 6 makes parts of 3"):
        train_batches(digits, batch_size=6, world_size=2)
    with pytest.raises(ValueError, match=r"--augment\.auto-augment rund is refused by timm"):
        train_batches(digits, replace(EVERYTHING, auto_augment="rund"))


def test_augmentation_knobs_reach_timm() -> None:
    described = repr(train_transform(SMALL, LIGHT))
    assert "scale=(0.7, 1.0)" in described
    assert "bicubic" in described
    assert not any(name in described for name in ("Flip", "ColorJitter", "RandAugment", "RandomErasing"))
    described = repr(train_transform(SMALL, EVERYTHING))
    assert all(name in described for name in ("Flip", "RandAugment", "RandomErasing(p=0.25, mode=pixel"))
    assert "ColorJitter" in repr(train_transform(SMALL, replace(EVERYTHING, auto_augment="")))


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "rand-m1", "rand-m9-mstd0.5-inc1", "augmix-m10", "v0", "original"])
def test_augmentation_survives_its_strongest_levels(policy: str) -> None:
    transform = train_transform(SMALL, replace(LIGHT, auto_augment=policy))
    image = Image.new("RGB", (8, 8), (250, 100, 50))
    with seeded(0):
        drawn = torch.stack([transform(image) for _ in range(100)])
    assert drawn.isfinite().all()
    assert drawn.std(dim=0).max() > 0.1


def test_posterizing_to_no_bits_is_black_and_timm_stays_as_it_is() -> None:
    before = dict(auto_augment.NAME_TO_OP)
    transform = train_transform(SMALL, replace(LIGHT, auto_augment="rand-m10-inc1"))
    (policy,) = [step for step in transform.transforms if isinstance(step, auto_augment.RandAugment)]
    (strongest,) = [operation for operation in policy.ops if operation.name == "PosterizeIncreasing"]
    strongest.prob = 1.0
    assert strongest(Image.new("RGB", (2, 2), (250, 100, 50))).getpixel((0, 0)) == (0, 0, 0)
    assert before == auto_augment.NAME_TO_OP
    assert auto_augment.NAME_TO_OP["PosterizeIncreasing"] is auto_augment.posterize


def test_eval_transform_crops_and_normalises() -> None:
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    config = DataConfig(img_size=10, crop_pct=0.5, mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 0.5))
    expected = torch.tensor([1.0, -2.0, -1.0])[:, None, None].expand(3, 10, 10)
    torch.testing.assert_close(preprocessing(config).transform()(image), expected)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_eval_batches_cover_each_image_once(digits: Dataset, world_size: int, num_workers: int) -> None:
    numbered = replace(some(digits, 10), labels=list(range(10)))
    data = replace(SMALL, num_workers=num_workers)
    shares = [list(eval_batches(numbered, preprocessing(data), 4, 0, rank, world_size)) for rank in range(world_size)]
    batches = [batch for share in shares for batch in share]
    labels = torch.cat([labels for _, labels in batches])
    assert labels.dtype == torch.int64
    assert sorted(labels.tolist()) == list(range(10))
    transform = preprocessing(data).transform()
    expected = torch.stack([transform(numbered.read(i)) for i in labels.tolist()])
    torch.testing.assert_close(torch.cat([pixels for pixels, _ in batches]), expected, atol=0, rtol=0)


def test_eval_batches_of_a_rank_without_images(digits: Dataset) -> None:
    assert list(eval_batches(some(digits, 1), preprocessing(SMALL), 4, 2, rank=1, world_size=2)) == []


def test_batches_can_be_sent_to_spawned_workers(digits: Dataset) -> None:
    parts = train_batches(digits).parts
    key = (0, 0, [1, 2])
    torch.testing.assert_close(pickle.loads(pickle.dumps(parts))[key], parts[key], atol=0, rtol=0)
