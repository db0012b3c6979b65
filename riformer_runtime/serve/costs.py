"""Image files that cost far more than their bytes and pixels say, told before anything is decoded.

A progressive JPEG may have any number of scans, each a pass over all pixels for a few bytes: a small file can take
hours. A TIFF may have a strip for each pixel, which Pillow holds as Python objects: a small file can take gigabytes.
"""

import re
import struct

MAX_SCANS = 100  # cameras and editors write about ten
MAX_PIECES = 65_536  # strips or tiles

_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # those that are followed by a length, and the end of the image
_END, _SCAN = 0xD9, 0xDA
_PIECES = (273, 324)  # tags of a TIFF: offsets of strips, offsets of tiles


class CostlyImageError(ValueError):
    """An image file that this module refuses."""


def check_cost(content: bytes | bytearray, name: str) -> None:
    """Checks an image file of any format.

    Args:
        content: of the file.
        name: of the file, for the message.

    Raises:
        CostlyImageError: it is one of those of this module.
    """
    if content[:2] == b"\xff\xd8" and _num_scans(content) > MAX_SCANS:
        raise CostlyImageError(f"{name}: the JPEG has more than the {MAX_SCANS} scans allowed")
    if content[:2] in (b"II", b"MM") and _num_pieces(content) > MAX_PIECES:
        raise CostlyImageError(f"{name}: the TIFF has more than the {MAX_PIECES:,} strips or tiles allowed")


def _num_scans(content: bytes | bytearray) -> int:
    """Scans of a JPEG's first image, counted up to one more than allowed. Segments between scans are skipped whole."""
    num, position = 0, 2
    while num <= MAX_SCANS and (found := _MARKER.search(content, position)):
        kind, position = content[found.start() + 1], found.end()
        if kind == _END:
            break
        num += kind == _SCAN
        position += int.from_bytes(content[position : position + 2], "big")
    return num


def _num_pieces(content: bytes | bytearray) -> int:
    """Strips or tiles of a TIFF's first image; 0 where the file is cut short, which its decoder says better."""
    order = "<" if content[:2] == b"II" else ">"
    try:
        is_big = struct.unpack_from(f"{order}H", content, 2)[0] == 43
        header, count, entry = (8, "Q", "HHQQ") if is_big else (4, "H", "HHII")
        (start,) = struct.unpack_from(f"{order}{'Q' if is_big else 'I'}", content, header)
        (num_entries,) = struct.unpack_from(order + count, content, start)
        start += struct.calcsize(order + count)
        sizes = [0]
        for i in range(num_entries):
            tag, _, size, _ = struct.unpack_from(order + entry, content, start + i * struct.calcsize(order + entry))
            sizes += [size] if tag in _PIECES else []
        return max(sizes)
    except struct.error:
        return 0
