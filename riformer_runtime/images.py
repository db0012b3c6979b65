"""One image file to 8-bit RGB, the same way wherever the package reads images.

The policy:
    - the format is told from the content, not from the suffix, and must be one of `FORMATS`;
    - of an animation or a file with several pages, the first;
    - turned and mirrored as EXIF says; EXIF that cannot be parsed counts as none;
    - 16-bit grey: 0..65535 becomes 0..255. Integers of 32 bits likewise, if all are in 0..65535. Floats: 0..1 becomes
      0..255, otherwise 0..255 is rounded. Integers and floats outside those ranges: from the image's own smallest and
      largest value;
    - transparent pixels show white. Choice: white, because drawings and cut-out objects are mostly meant for paper;
    - palettes, CMYK, YCbCr and 1-bit converted by PIL; colour profiles ignored.
"""

from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

FORMATS: dict[str, tuple[str, ...]] = {
    "AVIF": (".avif",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "JPEG2000": (".jp2", ".j2k", ".jpx"),
    "PNG": (".png", ".apng"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "QOI": (".qoi",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
"""PIL's names of the formats that are read, each with its file suffixes. Left out are formats that start other
programs (EPS), that have no signature (TGA), or that hold no photographs."""

PLUGINS = ("Avif", "Bmp", "Gif", "Jpeg", "Jpeg2K", "Png", "Ppm", "Qoi", "Tiff", "WebP")
"""Pillow's modules that read `FORMATS`."""

EXTENSIONS = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)
"""File suffixes that count as images, in lower case."""

MAX_PIXELS = 178_956_970
"""Largest image that is decoded; PIL itself refuses more, unless its `Image.MAX_IMAGE_PIXELS` is raised."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnknownFormatError(ValueError):
    """A file that is no image in one of `FORMATS`."""


class TooManyPixelsError(ValueError):
    """An image that is larger than allowed."""


def read_image(source: str | Path | IO[bytes], max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image in a file or an open, seekable binary file, as 8-bit RGB under the policy of this module.

    The size is read from the header and checked before anything is decoded.

    Raises:
        UnknownFormatError: it is no image in a format that is read.
        TooManyPixelsError: it is too large.
        ValueError: the file is missing, empty, damaged or cut short; like the others, it names it and says which.
    """
    is_path = isinstance(source, str | Path)
    name = source if is_path else getattr(source, "name", None) or "image"
    try:
        if not is_path:
            return _decode(source, max_pixels)
        if Path(source).exists() and not Path(source).is_file():  # opening a pipe would wait for ever
            raise ValueError("not a regular file")
        with open(source, "rb") as file:
            return _decode(file, max_pixels)
    except UnidentifiedImageError as error:
        formats = ", ".join(FORMATS)
        raise UnknownFormatError(f"{name}: not an image in a format that is read ({formats})") from error
    except (TooManyPixelsError, Image.DecompressionBombError) as error:
        raise TooManyPixelsError(f"{name}: {error}") from error
    except Exception as error:  # on damaged files PIL's decoders raise nearly anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(f"{name}: {reason}") from error


def _decode(file: IO[bytes], max_pixels: int) -> Image.Image:
    file.seek(0)
    if not file.read(1):
        raise ValueError("the file is empty")
    image: Image.Image = Image.open(file, formats=_formats())
    width, height = image.size
    if width * height > max_pixels:
        raise TooManyPixelsError(f"{width} x {height} pixels are more than the {max_pixels} allowed")
    image.load()
    turn = _TURNS.get(_orientation(image))
    image = _to_rgb(image)
    return image if turn is None else image.transpose(turn)


@cache
def _formats() -> list[str]:
    """The formats that this version of Pillow can read. `Image.init()` would take longer: it imports all plugins."""
    for name in PLUGINS:
        with suppress(ImportError):  # older versions have no AVIF
            import_module(f"PIL.{name}ImagePlugin")
    return [name for name in FORMATS if name in Image.OPEN]


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # nearly anything, as above; the pixels are whole
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_to_bytes(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_bytes(values: np.ndarray) -> np.ndarray:
    """Integers or floats scaled to uint8: from the smallest usual range that holds them, or else from their own."""
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise ValueError("some pixels are not finite numbers")
    usual = (1, 255) if values.dtype.kind == "f" else (65535,)
    fitting = [top for top in usual if low >= 0 and high <= top]
    if fitting:
        low, high = 0.0, fitting[0]
    return np.rint((values.astype(np.float64) - low) * (255 / (high - low or 1.0))).astype(np.uint8)
