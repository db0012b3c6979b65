"""Whether another training has seen the images on which this one is judged."""

from typing import Any

from riformer.data.dataset import Dataset


def seen_in_training(data: Dataset, record: dict[str, Any]) -> list[str]:
    """Names of validation and test images of `data` that another run trained on.

    Images in files are known by their content, those of built-in data by their names.

    Args:
        data: the data set of this run.
        record: the other run's data.json.
    """
    train = record.get("splits", {}).get("train", {})
    if any(images.contents for images in data.splits.values()):
        seen = set(train.get("contents", ()))
        pairs = [(content, name) for split in _judged(data) for content, name in _pairs(data, split)]
    elif record.get("name") == data.name:
        seen = {name for names in train.get("images", {}).values() for name in names}
        pairs = [(name, name) for split in _judged(data) for name in data.splits[split].names]
    else:
        return []
    return [name for key, name in pairs if key in seen]


def _judged(data: Dataset) -> list[str]:
    return [split for split in data.splits if split != "train"]


def _pairs(data: Dataset, split: str) -> list[tuple[str, str]]:
    images = data.splits[split]
    return list(zip(images.contents, images.names, strict=True))
