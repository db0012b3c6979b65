"""Orders of class names: which output of a classifier means which class.

Choice: class folders are in natural order, as timm's readers have them (2 before 10, case ignored), so that index and
class agree with what timm trained. torchvision's ImageFolder, and many scripts, sort by code points.
"""

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path


def natural_order(names: Iterable[str]) -> list[str]:
    """timm's order of class folders; code points decide between names that differ in case alone, as timm does not."""
    return sorted(names, key=lambda name: (_natural_key(name), name))


def _natural_key(name: str) -> list[int | str]:
    """As timm.utils.misc.natural_key, which fails on digits that are no numbers, such as superscripts."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]


ORDERS = {"timm's natural order": natural_order, "the order of code points": sorted}
"""The usual orders of class folders."""


def top1_in_order(confusion: dict[int, dict[int, int]], classes: Iterable[str], order: Iterable[str]) -> int:
    """Number of images that are right if the model's outputs mean the classes in this order.

    Args:
        confusion: images by true class, an index into `classes`, and by the model's largest output.
        classes: of the data.
        order: the same names, as the model's outputs may have them.
    """
    classes, order = list(classes), list(order)
    return sum(
        count
        for true, row in confusion.items()
        for output, count in row.items()
        if output < len(order) and order[output] == classes[true]
    )


def read_class_names(file: str, option: str) -> tuple[str, ...]:
    """The class names in a text file, one a line, in the order of a classifier's outputs; none where `file` is empty.

    Raises:
        ValueError: the file, which `option` of the command line names, cannot be read.
    """
    if not file:
        return ()
    try:
        lines = Path(file).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{option} {file} cannot be read: {error}") from error
    return tuple(unicodedata.normalize("NFC", line.strip()) for line in lines if line.strip())
