"""Folders of small images for tests, and what is opened there."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from riformer.config import DataConfig
from riformer.data.dataset import Dataset, open_dataset


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
