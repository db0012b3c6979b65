"""A folder of class folders -> image files by split and class.

Layouts: PATH/train, PATH/val and perhaps PATH/test, each with a folder for each class; PATH/train without val; or PATH
with the class folders themselves. Images lie in a class folder at any depth. Split folders may have other usual names,
in any case: training, valid, validation, dev, Test_Set, 01-train, and seg_train beside seg_test. Class folders are in
timm's order, see `riformer.data.orders`. Names that differ in their Unicode form alone (NFC, NFD) are one class.
"""

import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

from riformer.data.orders import natural_order
from riformer_runtime.walk import Walk

SPLIT_WORDS = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "validate", "dev", "development", "eval", "evaluation"),
    "test": ("test", "testing", "tst"),
}
"""Words that name a split, alone or with FILLERS before or after them."""

FILLERS = ("set", "data", "dataset", "split", "folder", "images", "image", "imgs", "img", "photos", "pictures", "pics")

Split = dict[str, list[str]]
"""Class -> paths of its images, relative to the root and sorted."""


@dataclass(frozen=True)
class Layout:
    """What a folder holds.

    Attributes:
        folders: name of the folder of each split; "" for class folders in the root itself.
        images: of each split, by class.
        left_out: how many files and folders were left out, by reason.
        notes: what a user may not expect, a line for each.
    """

    folders: dict[str, str]
    images: dict[str, Split]
    left_out: dict[str, int]
    notes: list[str] = field(default_factory=list)


def find_splits(root: Path) -> Layout:
    """The image files of each split.

    Raises:
        ValueError: the folder has not one of the layouts above or more than one, cannot be read, has fewer than two
            classes, a class without images, an image without a class, or a class that train lacks. The message names
            it and says what to do.
    """
    walk = Walk()
    notes: list[str] = []
    names, loose = walk.entries(root)
    folders = split_folders(root, names)
    if folders["train"]:
        walk.left_out["outside of the split folders"] += len(loose)
    else:
        walk = Walk()  # which meets the entries of the root once more
        _refuse_splits_in_classes(root, names)
    images = {split: _find_classes(root, name, walk, notes) for split, name in folders.items()}
    if folders["train"]:
        _leave_out_others(root, set(names) - set(folders.values()), images["train"], walk, notes)
    if walk.errors:
        raise ValueError(walk.errors[0])
    _check_classes(root, folders, images)
    return Layout(folders, images, {reason: count for reason, count in walk.left_out.items() if count}, notes)


def split_folders(root: Path, names: list[str]) -> dict[str, str]:
    """The folder of each split among the folders of these names in the root; {"train": ""} where no name means one.

    Raises:
        ValueError: several names for one split, or no train.
    """
    meanings = {name: meaning for name in names if (meaning := _meaning(name))}
    with_train = {rest for split, rest in meanings.values() if split == "train"}
    with_others = {rest for split, rest in meanings.values() if split != "train"}
    splits: dict[str, list[str]] = {}
    for name, (split, rest) in meanings.items():
        if not rest or rest in with_train & with_others:
            splits.setdefault(split, []).append(name)
    if not splits:
        return {"train": ""}
    listed = ", ".join(sorted(name for group in splits.values() for name in group))
    for split, group in splits.items():
        if len(group) > 1:
            raise ValueError(
                f"{root} has {listed}; keep one of {', '.join(sorted(group))}, which all mean {split}. "
                f"{_advice(listed)}"
            )
    if "train" not in splits:
        raise ValueError(f"{root} has {listed} but no train. {_advice(listed)}")
    return {split: splits[split][0] for split in SPLIT_WORDS if split in splits}


def _advice(names: str) -> str:
    """What to do where names of splits are names of classes."""
    return (
        f"If that is the name of a class ({names}), move all class folders into a folder NEW/train and give "
        f"folder:NEW; below train every folder is a class"
    )


def _meaning(name: str) -> tuple[str, str] | None:
    """The split that a folder's name means, and the other words in the name; None if it means none.

    Digits, and words such as "set" and "images", do not count.
    """
    filler = "|".join(FILLERS)
    splits, others = [], []
    for word in re.findall(r"[^\W\d_]+", unicodedata.normalize("NFC", name).casefold()):
        named = [
            split
            for split, words in SPLIT_WORDS.items()
            if re.fullmatch(f"({filler})?({'|'.join(words)})({filler})?", word)
        ]
        splits += named
        others += [] if named or word in FILLERS else [word]
    return (splits[0], " ".join(others)) if len(splits) == 1 else None


def _find_classes(root: Path, name: str, walk: Walk, notes: list[str]) -> Split:
    """The images in each class folder of a folder of the root, at any depth."""
    folder = root / name
    names, loose = walk.entries(folder)
    if loose:
        raise ValueError(
            f"{folder} has {len(loose)} images that lie in no class folder, such as {loose[0]}; "
            f"move them into the folder of their class, or away" + (f". {_advice(name)}" if name else "")
        )
    by_class: dict[str, list[str]] = {}
    for class_folder in names:
        by_class.setdefault(unicodedata.normalize("NFC", class_folder), []).append(class_folder)
    images: Split = {}
    for class_name in natural_order(by_class):
        folders = [folder / class_folder for class_folder in by_class[class_name]]
        paths = [path.relative_to(root).as_posix() for class_folder in folders for path in walk.images(class_folder)]
        if not paths and not walk.errors:
            raise ValueError(f"class folder {folders[0]} has no images; remove it or fill it")
        images[class_name] = sorted(paths)
        if len(folders) > 1:
            notes.append(f"{len(folders)} folders are the class {class_name}, in several Unicode forms of its name")
    if not images and not walk.errors:
        raise ValueError(f"{folder} has no class folders: images are expected in {folder}/CLASS/")
    return images


def _check_classes(root: Path, folders: dict[str, str], images: dict[str, Split]) -> None:
    """
    Raises:
        ValueError: fewer than two classes, or one that train lacks.
    """
    classes = images["train"]
    if len(classes) < 2:
        folder, (name,) = root / folders["train"], classes
        inside = Walk().entries(folder / name)[0]
        hint = f". If its folders ({', '.join(inside[:3])}) are the classes or splits, give folder:{folder / name}"
        raise ValueError(f"{folder} has one class only ({name}); at least two are needed" + (hint if inside else ""))
    for split, part in images.items():
        if unknown := natural_order(part.keys() - classes.keys()):
            near = {name for name in classes if name.casefold() in map(str.casefold, unknown)}
            hint = f"; train has {', '.join(natural_order(near))}" if near else ""
            raise ValueError(f"classes in {split} of {root} that train lacks: {', '.join(unknown)}{hint}")


def _refuse_splits_in_classes(root: Path, names: list[str]) -> None:
    """Refuses CLASS/train and CLASS/val, which would be taken for one split.

    Raises:
        ValueError: all class folders have folders for train and another split.
    """
    meanings = [map(_meaning, Walk().entries(root / name)[0]) for name in names]
    splits = [{meaning[0] for meaning in inside if meaning} for inside in meanings]
    if len(names) > 1 and all("train" in inside and len(inside) > 1 for inside in splits):
        raise ValueError(
            f"the folders of {root} ({', '.join(names[:3])}) have folders for splits inside; expected are "
            f"{root}/train/CLASS and {root}/val/CLASS"
        )


def _leave_out_others(root: Path, names: set[str], classes: Split, walk: Walk, notes: list[str]) -> None:
    """Counts what is in folders beside those of the splits.

    Raises:
        ValueError: one of the folders has the name of a class.
    """
    for name in natural_order(names):
        if unicodedata.normalize("NFC", name) in classes:
            raise ValueError(
                f"{root} has folders for splits and, beside them, {name}, which is also a class in train: move its "
                f"images there, or away"
            )
        num_images = len(Walk().images(root / name))
        walk.left_out["outside of the split folders"] += num_images
        if num_images:
            notes.append(f"the folder {name} with its {num_images:,} images is none of the splits, and left out")
