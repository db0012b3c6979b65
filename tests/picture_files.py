"""Image files of all kinds that people have, made from a seed."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

SIZES = ((60, 45), (45, 60), (33, 33), (1, 1), (3, 200), (640, 33), (1200, 900), (700, 1500), (17, 19), (2, 2))


def picture(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Smooth colours with some detail, RGB."""
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    detail = rng.normal(0, 20, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.asarray(coarse) + detail, 0, 255).astype(np.uint8))


def kinds(rng: np.random.Generator, size: tuple[int, int]) -> Iterator[tuple[str, bytes]]:
    """A name and a file's content for each kind."""
    image = picture(rng, size)
    grey = np.asarray(image.convert("L"))
    alpha = Image.fromarray(rng.integers(0, 256, (size[1], size[0]), np.uint8))
    transparent = image.copy()
    transparent.putalpha(alpha)

    def saved(image: Image.Image, kind: str, **settings) -> bytes:
        image.save(buffer := io.BytesIO(), kind, **settings)
        return buffer.getvalue()

    yield "rgb.png", saved(image, "PNG")
    yield "grey.png", saved(image.convert("L"), "PNG")
    yield "one-bit.png", saved(image.convert("1"), "PNG")
    yield "palette.png", saved(image.quantize(32), "PNG")
    yield "palette-transparent.png", saved(image.quantize(32), "PNG", transparency=3)
    yield "alpha.png", saved(transparent, "PNG")
    yield "grey-alpha.png", saved(transparent.convert("LA"), "PNG")
    yield "sixteen-bit.png", saved(Image.fromarray(grey.astype(np.uint16) * 257), "PNG")
    yield "sixteen-bit.tiff", saved(Image.fromarray(grey.astype(np.uint16) * 131), "TIFF")
    yield "float.tiff", saved(Image.fromarray(grey.astype(np.float32) / 255), "TIFF")
    yield "rgb.tiff", saved(image, "TIFF", compression="tiff_lzw")
    yield "cmyk.tiff", saved(image.convert("CMYK"), "TIFF")
    yield "rgb.jpg", saved(image, "JPEG", quality=90)
    yield "progressive.jpg", saved(image, "JPEG", progressive=True)
    yield "grey.jpg", saved(image.convert("L"), "JPEG")
    yield "cmyk.jpg", saved(image.convert("CMYK"), "JPEG")
    yield "lossy.webp", saved(image, "WEBP")
    yield "alpha.webp", saved(transparent, "WEBP", lossless=True)
    yield "animated.gif", saved(image, "GIF", save_all=True, append_images=[picture(rng, size)])
    yield "rgb.bmp", saved(image, "BMP")
    yield "grey.pgm", saved(image.convert("L"), "PPM")
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = turn
        yield f"turn-{turn}.jpg", saved(image, "JPEG", exif=exif)


def write_pictures(folder: Path, number: int, seed: int = 0) -> list[Path]:
    """Writes files of all kinds in all sizes, in turns; returns their paths."""
    rng, paths = np.random.default_rng(seed), []
    while len(paths) < number:
        size = SIZES[len(paths) % len(SIZES)]
        for name, content in kinds(rng, size):
            if (len(paths) + len(name)) % 3 and len(paths) < number:  # not every kind in every size, or it takes long
                path = folder / f"{len(paths):04}-{size[0]}x{size[1]}-{name}"
                path.write_bytes(content)
                paths.append(path)
    return paths
