"""Renders letters and digits of every usable typeface of this machine into glyphs.npz: `--data.name glyphs`.

    xargs apt-get install -y < tools/font-packages.txt   # Debian's, a few GB; or any fonts that you have
    python tools/glyphs.py ~/.cache/riformer

A-Z and 2-9, light on black, 64 x 64 pixels, the longest side 48, centred; 0 and 1 look like O and I, lower case like
upper case. Left out are faces that lack a letter, show the same sign for several, or do not look like letters. Faces of
one family, and families that share a face under another name, are in one split; of a family at most eight. Which split
follows from the family's name: about 75 % train, 10 % val, 15 % test. More fonts move a family only where one of them
links it to another.

Needs fontTools, which comes with matplotlib. Check the licences of your fonts before you pass the file on.
"""

import argparse
import hashlib
import os
import re
from collections import defaultdict
from multiprocessing import Pool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from fontTools.ttLib import TTFont, TTLibError
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import track

CLASSES = "ABCDEFGHIJKLMNOPQRSTUVWXYZ23456789"
FOLDERS = ("/usr/share/fonts", "/usr/share/texmf/fonts", "/usr/share/texlive/texmf-dist/fonts", "~/.fonts")
SIZE, LONGEST = 64, 48
MAX_FACES = 8
NOT_LETTERS = re.compile(r"math|symbol|dingbat|webdings|icon|braille|keys|seven|dseg", re.IGNORECASE)
STYLES = re.compile(
    r"thin|hairline|(extra|ultra)?light|book|regular|roman|medium|(demi|semi|extra|ultra)?bold|demi|semi|extra|ultra|black|"
    r"heavy|ital(ic)?|oblique|slanted|condensed|cond|narrow|wide|expanded|compressed|caps|sc|smallcaps|osf|t?lf|tosf|"
    r"display|text|caption|small|subhead|headline|otf|ttf|pro|std|web|poster|titling|inline|outline|shadow|solid|[ivx]+|\d+"
)


class Face(NamedTuple):
    """A typeface's family, and its letters [34, 64, 64]."""

    family: str
    images: np.ndarray


def family_of(name: str) -> str:
    """The first two words of a family's name that tell no style."""
    words = re.findall(r"[A-Za-z0-9]+", re.sub(r"([a-z])(?=[A-Z][a-z]|[0-9])", r"\1 ", name))
    kept = [word for word in words if not STYLES.fullmatch(word.lower())] or words
    return " ".join(kept[: 3 if kept[0] == "Noto" else 2]).lower()


def read_face(file: Path) -> Face | None:
    """The face in a font file; None if it cannot be used."""
    try:
        with TTFont(file, lazy=True, fontNumber=0) as font:
            glyphs = font.getBestCmap() or {}
            names = [glyphs.get(ord(letter)) for letter in CLASSES]
            name = font["name"].getDebugName(16) or font["name"].getDebugName(1) or file.stem
        if None in names or len(set(names)) < len(CLASSES):
            return None
        font = ImageFont.truetype(str(file), 5 * SIZE // 2, layout_engine=ImageFont.Layout.BASIC)
        images = [draw(font, letter) for letter in CLASSES]
    except (TTLibError, OSError, KeyError, ValueError, AssertionError):
        return None
    if any(image is None for image in images):
        return None
    face = Face(family_of(name), np.stack(images))
    ink = (face.images > 127).mean((1, 2))
    like = correlations(face.images[None])[0]
    alike = (like @ like.T > 0.985).sum() - len(CLASSES)  # boxes, or one sign for several letters
    return face if ink.min() > 0.012 and ink.max() < 0.5 and alike <= 4 else None


def draw(font: ImageFont.FreeTypeFont, letter: str) -> np.ndarray | None:
    """The letter, its longest side as wanted, in the middle; None if there is nothing to see."""
    left, top, right, bottom = font.getbbox(letter)
    width, height = int(right - left), int(bottom - top)
    if not (3 <= width <= 10 * SIZE and 8 <= height <= 10 * SIZE):
        return None
    canvas = Image.new("L", (width + 8, height + 8))
    ImageDraw.Draw(canvas).text((4 - left, 4 - top), letter, fill=255, font=font)
    if (box := canvas.getbbox()) is None:
        return None
    canvas = canvas.crop(box)
    scale = LONGEST / max(canvas.size)
    small = canvas.resize([max(2, round(side * scale)) for side in canvas.size], Image.Resampling.BOX)
    image = Image.new("L", (SIZE, SIZE))
    image.paste(small, ((SIZE - small.width) // 2, (SIZE - small.height) // 2))
    return np.asarray(image)


def correlations(images: np.ndarray) -> np.ndarray:
    """Images at a quarter of their size as vectors whose products are correlations.

    Shape: [F, 34, 64, 64] -> [F, 34, 256].
    """
    small = images.reshape(*images.shape[:2], SIZE // 4, 4, SIZE // 4, 4).mean((3, 5)).reshape(*images.shape[:2], -1)
    small = (small - small.mean(2, keepdims=True)).astype(np.float32)
    return small / (np.linalg.norm(small, axis=2, keepdims=True) + 1e-6)


def like_letters(faces: list[Face]) -> list[Face]:
    """The faces of which at least a third of the letters is nearest to the median face's same letter."""
    vectors = correlations(np.stack([face.images for face in faces]))
    middle = np.median(vectors, 0)
    nearest = np.einsum("fcd,kd->fck", vectors, middle / np.linalg.norm(middle, axis=1, keepdims=True)).argmax(2)
    share = (nearest == np.arange(len(CLASSES))).mean(1)
    return [face for face, right in zip(faces, share, strict=True) if right >= 0.35]


def linked(faces: list[Face]) -> list[Face]:
    """The faces without copies; families that share nearly the same face get one name, the alphabetically first."""
    vectors = correlations(np.stack([face.images for face in faces])).reshape(len(faces), -1) / len(CLASSES) ** 0.5
    leader = {face.family: face.family for face in faces}

    def lead(family: str) -> str:
        while leader[family] != family:
            family = leader[family]
        return family

    copies = set()
    for i, vector in enumerate(vectors):
        alike = vectors[:i] @ vector
        for j in np.flatnonzero(alike > 0.985):
            first, second = sorted((lead(faces[i].family), lead(faces[j].family)))
            leader[second] = first
            if alike[j] > 0.998 and j not in copies:
                copies.add(i)
    return [Face(lead(face.family), face.images) for i, face in enumerate(faces) if i not in copies]


def split_of(family: str) -> int:
    """0 train, 1 val or 2 test, by the family's name alone."""
    share = int.from_bytes(hashlib.sha256(family.encode()).digest()[:8], "big") / 2**64
    return 0 if share < 0.75 else 1 if share < 0.85 else 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for glyphs.npz")
    parser.add_argument("--fonts", type=Path, nargs="+", default=FOLDERS, help="folders with .otf and .ttf files")
    options = parser.parse_args()
    console = Console(stderr=True)
    candidates = {file for folder in options.fonts for file in Path(folder).expanduser().rglob("*")}
    files = sorted(f for f in candidates if f.suffix.lower() in (".otf", ".ttf") and not NOT_LETTERS.search(f.name))
    if not files:
        parser.error(f"no .otf or .ttf files in {', '.join(map(str, options.fonts))}")
    with Pool() as pool:
        reading = track(pool.imap(read_face, files, 8), "reading fonts", len(files), console=console)
        distinct = {face.images.tobytes(): face for face in reading if face}
    if not distinct:
        parser.error(f"none of {len(files)} font files has all of {CLASSES}")
    by_family: dict[str, list[Face]] = defaultdict(list)
    for face in linked(like_letters(list(distinct.values()))):
        by_family[face.family].append(face)
    families = sorted(by_family)
    kept = [(number, face) for number, name in enumerate(families) for face in chosen(by_family[name])]
    splits = np.array([split_of(families[number]) for number, _ in kept], np.uint8)
    options.out.mkdir(parents=True, exist_ok=True)
    beside = options.out / "glyphs.npz.part"
    with beside.open("wb") as file:
        np.savez_compressed(
            file,
            image=np.concatenate([face.images for _, face in kept]),
            label=np.tile(np.arange(len(CLASSES), dtype=np.uint8), len(kept)),
            family=np.repeat(np.array([number for number, _ in kept], np.int32), len(CLASSES)),
            split=np.repeat(splits, len(CLASSES)),
            classes=np.array(list(CLASSES)),
            families=np.array(families),
        )
    os.replace(beside, options.out / "glyphs.npz")
    counts = ", ".join(f"{(splits == i).sum()} {name}" for i, name in enumerate(("train", "val", "test")))
    console.print(f"{options.out / 'glyphs.npz'}: {len(kept)} faces of {len(families)} families ({counts})")


def chosen(faces: list[Face]) -> list[Face]:
    """At most eight of a family's faces, drawn by what they look like."""
    ranked = sorted(faces, key=lambda face: hashlib.sha256(face.images.tobytes()).digest())
    return ranked[:MAX_FACES]


if __name__ == "__main__":
    main()
