"""Splits that are drawn by hashing, the same on every machine and with every library."""

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations

from riformer.data.folders import Split


def hold_out(images: Split, fraction: float, seed: int, contents: Mapping[str, str]) -> tuple[Split, Split]:
    """Train and val: of each class the share `fraction`, but at least one image, goes to val.

    Files of equal content count once, and all go where the first of them goes, whatever their classes.

    Args:
        images: of each class.
        fraction: above 0 and below 1.
        seed: of the draw.
        contents: digest of each image; one that is missing is taken for unique.

    Raises:
        ValueError: a class has fewer than two images that are different, and not in a class before it.
    """
    first: dict[str, str] = {}  # of each content, its first file
    for paths in images.values():
        for path in paths:
            first.setdefault(contents.get(path, path), path)
    held_out: set[str] = set()
    for name, paths in images.items():
        different = [path for path in paths if first[contents.get(path, path)] == path]
        if len(different) < 2:
            files = (
                f"{len(paths)} files that are one image, or of other classes," if len(paths) > 1 else "a single image,"
            )
            raise ValueError(f"class {name!r} has {files} {paths[0]}; one for train and another for val are needed")
        num_val = min(max(round(len(different) * fraction), 1), len(different) - 1)
        ranks = hash_ranks(different, [0] * len(different), seed)
        held_out |= {path for path, rank in zip(different, ranks, strict=True) if rank < num_val}
    is_val = {path: first[contents.get(path, path)] in held_out for paths in images.values() for path in paths}
    train = {name: [path for path in paths if not is_val[path]] for name, paths in images.items()}
    val = {name: [path for path in paths if is_val[path]] for name, paths in images.items()}
    return train, val


def hash_ranks(names: Sequence[str], labels: Sequence[int], seed: int = 0) -> list[int]:
    """Each image's place within its class, in an order drawn by hashing."""
    drawn = sorted(range(len(names)), key=lambda i: hashlib.sha256(os.fsencode(f"{seed} {names[i]}")).digest())
    counts: Counter[int] = Counter()
    ranks = [0] * len(names)
    for i in drawn:
        ranks[i] = counts[labels[i]]
        counts[labels[i]] += 1
    return ranks


def duplicates(splits: Mapping[str, Split], contents: Mapping[str, str]) -> list[str]:
    """A line for each kind of place in which equal images should not be: two splits, or two classes.

    Args:
        splits: images by split and class.
        contents: digest of each image.
    """
    counts = Counter(contents[path] for part in splits.values() for paths in part.values() for path in paths)
    places = [
        (contents[path], split, name, path)
        for split, part in splits.items()
        for name, paths in part.items()
        for path in paths
        if counts[contents[path]] > 1
    ]
    lines = []
    for before, after in combinations(splits, 2):
        known = {content: path for content, split, _, path in places if split == before}
        both = [(known[content], path) for content, split, _, path in places if split == after and content in known]
        if both:
            lines.append(
                f"{len(both):,} images of {after} are in {before} too, such as {both[0][1]} and {both[0][0]}: accuracy "
                f"on {after} is not that on new images"
            )
    first: dict[str, tuple[str, str]] = {}
    several = {}
    for content, _, name, path in places:
        if first.setdefault(content, (name, path))[0] != name:
            several[content] = (first[content][1], path)
    if several:
        one, other = next(iter(several.values()))
        lines.append(f"{len(several):,} images are in more than one class, such as {one} and {other}")
    return lines
