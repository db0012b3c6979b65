"""Teachers and starting weights that were trained on the images on which a run is to be judged."""

import json
import logging
import os
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from riformer.config import DataConfig
from riformer.data.dataset import Dataset, contents_by_name, open_dataset, public_name
from riformer.model.checkpoint import read_file
from riformer.model.description import read_description

logger = logging.getLogger(__name__)


def check_leaks(data: Dataset, references: Collection[str], trusted: Collection[str] = ()) -> None:
    """Compares what the models of these names were trained on with the val and test images of `data`.

    A run folder, or a model folder in it, tells all images of its training by its data.json; a model that was saved
    elsewhere tells digests of its splits. Of others nothing is known. Models trained on the same split are fine, and so
    are images that `data` has in its own train too.

    Args:
        data: of the training that is about to begin.
        references: names of teachers and of weights to start from, as in a recipe.
        trusted: those for which a leak is a warning only.

    Raises:
        ValueError: one of the models was trained on val or test images.
    """
    for reference in sorted({*references} - {"", "own"}):
        if not (leak := _leak(data, reference)):
            continue
        text = (
            f"{reference} was trained on {leak} of this run, whose accuracy would then not be that on new images. Take "
            f"a model that was trained with the same split (--data.split-seed and --data.val-fraction as there), or "
            f"keep the images for val and test in folders of their own"
        )
        if reference not in trusted:
            raise ValueError(text)
        logger.warning("%s; it is trusted all the same", text)


def open_for_evaluation(config: DataConfig, split: str, train_data: dict[str, Any] | None) -> Dataset:
    """The data set on which a model is to be evaluated; one that the model was trained on, split as in its training.

    What is otherwise known about images that the model was trained on is a warning.

    Args:
        config: of the data.
        split: that is to be evaluated; empty for test, or all images of a folder without splits.
        train_data: what the model carries as `pretrained_cfg["train_data"]`.
    """
    whole = open_dataset(config, whole=True)
    dataset = whole if "val" in whole.splits or not split else open_dataset(config)
    if not train_data:
        return dataset
    train = train_data.get("splits", {}).get("train", {}).get("sha256")
    if "val" not in whole.splits and whole.digest(*whole.splits) == train_data.get("sha256"):
        drawn = {knob: train_data[knob] for knob in ("val_fraction", "split_seed") if knob in train_data}
        split_again = open_dataset(replace(config, **drawn))
        if split_again.digest("train") == train:
            logger.info("%s: the model was trained on it, and is evaluated on what was held out", config.name)
            return split_again
        logger.warning("%s: the model was trained on some of these images, and which is not known", config.name)
    elif split != "train" and train == dataset.digest(split or ("test" if "test" in dataset.splits else "val")):
        logger.warning("%s: the model was trained on all images on which it is evaluated", config.name)
    elif "val" not in whole.splits and public_name(config.name) == train_data.get("name"):
        logger.warning("%s: the model was trained on a folder of this name, perhaps on some of its images", config.name)
    return dataset


def _leak(data: Dataset, reference: str) -> str:
    """How many images of which splits of the data the model was trained on; empty if none, as far as is known."""
    is_timm = reference.startswith("timm:")
    place = reference.partition("@")[2] if is_timm else reference.removeprefix("local-dir:")
    path = Path(place)
    if not place or not path.exists():
        return ""
    if (record := _run_record(path)) is not None:
        return _leak_by_record(data, record)
    return _leak_by_digest(data, _train_data(path))


def _leak_by_record(data: Dataset, record: dict[str, Any]) -> str:
    train = record["splits"]["train"]
    contents = contents_by_name(train)
    same_place = _place(record["name"]) == _place(data.name)  # names then tell images apart, for want of contents
    known = {*contents.values()} if contents else {n for names in train["images"].values() for n in names if same_place}

    def keys(split: str) -> list[str]:
        images = data.splits[split]
        return images.contents if contents else images.names

    known -= {*keys("train")}
    leaks = []
    for split in data.splits.keys() - {"train"}:
        names = [n for n, key in zip(data.splits[split].names, keys(split), strict=True) if key in known]
        if names:
            leaks.append(f"{len(names):,} of the {len(data.splits[split]):,} {split} images, such as {names[0]},")
    return " and ".join(sorted(leaks))


def _leak_by_digest(data: Dataset, train_data: dict[str, Any]) -> str:
    if not train_data:
        return ""
    train = train_data.get("splits", {}).get("train", {}).get("sha256")
    if train == data.digest("train"):
        return ""
    if train == data.digest(*data.splits):
        return "all images"
    for split in data.splits.keys() - {"train"}:
        if train == data.digest(split):
            return f"all {split} images"
    same = train_data.get("sha256") == data.digest(*data.splits)
    return "the same images in another split, so on val or test images" if same else ""


def _place(name: str) -> str:
    """The name of a data set; of a folder the path that it really has."""
    return os.path.realpath(os.path.expanduser(name.removeprefix("folder:"))) if name.startswith("folder:") else name


def _run_record(path: Path) -> dict[str, Any] | None:
    """The data.json of the run in which a model lies; None if it lies in none."""
    for folder in (path, *path.absolute().parents[:2]):
        if (folder / "recipe.json").is_file() and (folder / "data.json").is_file():
            with suppress(OSError, ValueError):  # a damaged one tells nothing
                record = json.loads((folder / "data.json").read_text(encoding="utf-8"))
                return record if "train" in record.get("splits", {}) else None
    return None


def _train_data(path: Path) -> dict[str, Any]:
    """What a saved model says about the data that it was trained on; empty if it says nothing."""
    try:
        config = path / "config.json"
        text = config.read_text(encoding="utf-8") if path.is_dir() else read_file(path).config
        return (read_description(text).more.get("train_data") or {}) if text else {}
    except (OSError, ValueError):  # which opening the model will explain
        return {}
