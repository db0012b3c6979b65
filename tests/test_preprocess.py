"""The one evaluation transform: timm's for ordinary images, and bounded for very thin ones."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from riformer.preprocess import MAX_ASPECT, Preprocessing, cut_long

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)


def noise(width: int, height: int) -> Image.Image:
    generator = np.random.default_rng(width + 1000 * height)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(40, 30), (30, 41), (7, 7), (2, 64), (320, 10)])
def test_ordinary_images_are_transformed_as_by_timm(size: tuple[int, int], mode: str) -> None:
    ours = Preprocessing((3, 24, 24), 0.9, mode, "bicubic", MEAN, STD).transform()
    timms = create_transform((3, 24, 24), crop_pct=0.9, crop_mode=mode, interpolation="bicubic", mean=MEAN, std=STD)
    torch.testing.assert_close(ours(noise(*size)), timms(noise(*size)), atol=0, rtol=0)


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1), (2, 3_000_000), (3, 97)])
def test_thin_images_are_cut_around_their_centre_before_they_are_resized(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, "red")
    middle = cut_long(image)
    assert max(middle.size) == MAX_ASPECT * min(size)
    transform = Preprocessing((3, 24, 24), 0.9, "center", "bicubic", (0, 0, 0), (1, 1, 1)).transform()
    resized = [step for step in transform.transforms if "Resize" in repr(step)]
    assert len(resized) == 1
    assert max(resized[0](middle).size) <= MAX_ASPECT * 27
    expected = torch.tensor([1.0, 0, 0]).view(3, 1, 1).expand(3, 24, 24)
    torch.testing.assert_close(transform(image), expected)


def test_the_cut_keeps_what_the_crop_would_have_kept() -> None:
    image = noise(4, 4 * MAX_ASPECT + 40)
    timms = create_transform((3, 24, 24), crop_pct=0.9, interpolation="bicubic", mean=MEAN, std=STD)
    ours = Preprocessing((3, 24, 24), 0.9, "center", "bicubic", MEAN, STD).transform()
    assert cut_long(image).size != image.size
    torch.testing.assert_close(ours(image), timms(image), atol=0.05, rtol=0)
