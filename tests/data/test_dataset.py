"""Built-in data sets: their splits are fixed, and files that are damaged or missing are named."""

import gzip
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from image_folders import names_of, through_json

from riformer.config import DataConfig
from riformer.data.builtin import FASHION_FILES
from riformer.data.dataset import Dataset, open_dataset


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return open_dataset(DataConfig(name="digits"))


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
