"""Reading images: every kind of file becomes the RGB that the policy says, or a ValueError that names it."""

import io
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from riformer_runtime.images import EXTENSIONS, FORMATS, read_image

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def pixels(image: Image.Image) -> torch.Tensor:
    assert image.mode == "RGB"
    return torch.from_numpy(np.array(image))


def grey(values: list[int]) -> torch.Tensor:
    """One row of grey pixels."""
    return torch.tensor(values, dtype=torch.uint8)[None, :, None].expand(-1, -1, 3)


def noise(height: int = 20, width: int = 30) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(size: tuple[int, int] = (30, 20)) -> bytes:
    file = io.BytesIO()
    Image.fromarray(noise(size[1], size[0])).save(file, "PNG")
    return file.getvalue()


def test_plain_image_from_path_string_and_open_file(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png())
    expected = torch.from_numpy(noise())
    torch.testing.assert_close(pixels(read_image(path)), expected)
    torch.testing.assert_close(pixels(read_image(str(path))), expected)
    file = io.BytesIO(png())
    file.read()  # an open file is read from its start, wherever it stands
    torch.testing.assert_close(pixels(read_image(file)), expected)


def test_format_comes_from_the_content_not_the_suffix(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(png())
    torch.testing.assert_close(pixels(read_image(path)), torch.from_numpy(noise()))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff"])
def test_exif_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = 255  # the top left quarter is white
    undo = {  # what a camera stores: the picture turned the other way
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.ascontiguousarray(undo[orientation](upright))).save(path, exif=exif)
    torch.testing.assert_close(pixels(read_image(path)), torch.from_numpy(upright), atol=2, rtol=0)


def test_exif_that_cannot_be_parsed_counts_as_none(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(noise()).save(path, exif=b"Exif\x00\x00garbage that is no EXIF")
    torch.testing.assert_close(pixels(read_image(path)), torch.from_numpy(noise()))


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_16_bit_is_scaled_from_its_full_range(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.array([[0, 257, 32896, 65535]], np.uint16)).save(path)
    torch.testing.assert_close(pixels(read_image(path)), grey([0, 1, 128, 255]))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 257, 65535]], np.int32), [0, 1, 255]),
        (np.array([[-1000, 0, 1000]], np.int32), [0, 128, 255]),
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.25, 0.25, 0.25]], np.float32), [64, 64, 64]),
        (np.array([[0.0, 7.4, 255.0]], np.float32), [0, 7, 255]),
        (np.array([[1e9, 1.5e9, 2e9]], np.float32), [0, 128, 255]),
        (np.array([[300.0, 300.0, 300.0]], np.float32), [0, 0, 0]),
    ],
)
def test_integers_and_floats_are_scaled_by_the_stated_rule(
    tmp_path: Path, values: np.ndarray, expected: list[int]
) -> None:
    path = tmp_path / "a.tiff"
    Image.fromarray(values).save(path)
    torch.testing.assert_close(pixels(read_image(path)), grey(expected))


def test_floats_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tiff"
    Image.fromarray(np.array([[0.0, np.nan]], np.float32)).save(path)
    with pytest.raises(ValueError, match=r"a\.tiff: some pixels are not finite"):
        read_image(path)


def test_transparency_shows_white(tmp_path: Path) -> None:
    rgba = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 128]]], np.uint8)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    expected = torch.tensor([[RED, WHITE, (127, 127, 127)]], dtype=torch.uint8)
    torch.testing.assert_close(pixels(read_image(tmp_path / "rgba.png")), expected)

    Image.fromarray(rgba[..., [0, 3]], "LA").save(tmp_path / "la.png")
    torch.testing.assert_close(pixels(read_image(tmp_path / "la.png")), grey([255, 255, 127]))

    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([*RED, *GREEN])
    palette.save(tmp_path / "p.png", transparency=1)
    expected = torch.tensor([[RED, WHITE]], dtype=torch.uint8)
    torch.testing.assert_close(pixels(read_image(tmp_path / "p.png")), expected)


def test_palette_1_bit_and_grey(tmp_path: Path) -> None:
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([*RED, *GREEN])
    palette.save(tmp_path / "p.gif")
    expected = torch.tensor([[RED, GREEN]], dtype=torch.uint8)
    torch.testing.assert_close(pixels(read_image(tmp_path / "p.gif")), expected)

    Image.fromarray(np.array([[False, True]])).save(tmp_path / "1.png")
    torch.testing.assert_close(pixels(read_image(tmp_path / "1.png")), grey([0, 255]))

    Image.fromarray(np.array([[3, 200]], np.uint8)).save(tmp_path / "l.png")
    torch.testing.assert_close(pixels(read_image(tmp_path / "l.png")), grey([3, 200]))


@pytest.mark.parametrize("suffix", ["jpg", "tiff"])
def test_cmyk(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(path)
    expected = torch.tensor(RED, dtype=torch.uint8).expand(16, 16, 3)
    torch.testing.assert_close(pixels(read_image(path)), expected, atol=3, rtol=0)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff"])
def test_first_frame_of_an_animation(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    frames = [Image.new("RGB", (16, 16), color) for color in (RED, GREEN)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    expected = torch.tensor(RED, dtype=torch.uint8).expand(16, 16, 3)
    torch.testing.assert_close(pixels(read_image(path)), expected, atol=3, rtol=0)


def test_files_that_are_no_whole_image_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing\.png: No such file"):
        read_image(tmp_path / "missing.png")
    with pytest.raises(ValueError, match="not a regular file"):
        read_image(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match=r"pipe\.png: not a regular file"):
        read_image(tmp_path / "pipe.png")
    (tmp_path / "empty.png").touch()
    with pytest.raises(ValueError, match=r"empty\.png: the file is empty"):
        read_image(tmp_path / "empty.png")
    (tmp_path / "text.png").write_text("no image at all")
    with pytest.raises(ValueError, match=r"text\.png: not an image in a format that is read"):
        read_image(tmp_path / "text.png")
    with pytest.raises(ValueError, match="image: not an image"):
        read_image(io.BytesIO(b"no image at all"))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tiff"])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(noise(64, 64)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"cut\.{suffix}: "):
        read_image(path)


def test_flipped_bytes_raise_nothing_but_value_error(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    path = tmp_path / "a.png"
    reasons = []
    for _ in range(300):
        content = bytearray(png())
        for position in generator.integers(0, 80, 4):
            content[position] = generator.integers(256)
        path.write_bytes(content)
        try:
            read_image(path)
        except ValueError as error:
            reasons.append(str(error))
    assert len(reasons) > 100
    assert all(reason.startswith(f"{path}: ") for reason in reasons)


def test_size_is_checked_before_decoding(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="30 x 20 pixels are more than the 599 allowed"):
        read_image(io.BytesIO(png()), max_pixels=599)
    assert read_image(io.BytesIO(png()), max_pixels=600).size == (30, 20)

    path = tmp_path / "bomb.png"
    content = bytearray(png())
    content[16:24] = (60_000).to_bytes(4, "big") * 2  # 3.6 gigapixels, says the header
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bomb\.png: .*3600000000"):
        read_image(path)


def test_formats_that_run_programs_are_not_opened() -> None:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    with pytest.raises(ValueError, match="not an image in a format that is read"):
        read_image(io.BytesIO(eps))


def test_extensions_are_those_that_pil_knows_for_the_formats() -> None:
    registered = Image.registered_extensions()
    known = {suffix for suffix in EXTENSIONS if registered.get(suffix) in {*FORMATS, "MPO"}}
    assert {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"} <= known
    assert EXTENSIONS - known <= {".avif", ".webp", ".jp2", ".j2k", ".jpx"}  # optional in a build of Pillow
