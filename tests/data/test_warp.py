"""Augmentation of whole batches: every image a pure function of its key, and still readable."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from riformer.config import AugmentConfig, DataConfig, Recipe, check
from riformer.data.batches import TrainBatches
from riformer.data.dataset import ImageList, open_dataset
from riformer.data.warp import _mix, normals, uniforms, warp

WARP = AugmentConfig(policy="warp")
SMALL = DataConfig(img_size=16)


def squares(num: int) -> Tensor:
    """A light square in the middle."""
    images = torch.zeros(num, 64, 64, dtype=torch.uint8)
    images[:, 20:44, 20:44] = 255
    return images


def test_draws_are_splitmix64() -> None:
    def reference(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    keys = [0, 1, -1, 2**63 - 1, -(2**63), 123456789]
    assert [int(x) % 2**64 for x in _mix(torch.tensor(keys))] == [reference(key % 2**64) for key in keys]


def test_draws_are_uniform_normal_and_unrelated() -> None:
    keys = torch.arange(20_000)
    drawn = uniforms(keys, 8)
    assert 0 <= drawn.min() <= drawn.max() < 1
    torch.testing.assert_close(drawn.mean(0), torch.full((8,), 0.5), atol=0.01, rtol=0)
    torch.testing.assert_close(12 * drawn.var(0), torch.ones(8), atol=0.04, rtol=0)
    beside = torch.cat([drawn[:-1], drawn[1:]], 1)  # a key's draws, and those of the next key
    torch.testing.assert_close(torch.corrcoef(beside.T), torch.eye(16), atol=0.04, rtol=0)
    gauss = normals(torch.arange(100), 1001)
    assert gauss.shape == (100, 1001)
    assert gauss.isfinite().all()
    assert abs(gauss.mean()) < 0.01
    assert abs(gauss.var() - 1) < 0.02
    assert abs((gauss**4).mean() - 3) < 0.1


def test_an_image_depends_on_itself_and_its_key_alone() -> None:
    images = torch.randint(0, 256, (9, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    keys = torch.tensor([5, -7, 2**60, 3, 3, 8, 9, 10, 11])
    together = warp(images, keys, 32)
    alone = torch.cat([warp(images[i : i + 1], keys[i : i + 1], 32) for i in range(9)])
    torch.testing.assert_close(together, alone, atol=0, rtol=0)
    backwards = warp(images.flip(0), keys.flip(0), 32).flip(0)
    torch.testing.assert_close(together, backwards, atol=0, rtol=0)
    same_draws = warp(images[:1].expand(2, -1, -1), keys[3:5], 32)
    torch.testing.assert_close(same_draws[0], same_draws[1], atol=0, rtol=0)


def test_what_is_drawn_varies_in_place_size_and_light_and_stays_inside() -> None:
    drawn = warp(squares(500), torch.arange(500), 32)
    assert drawn.shape == (500, 32, 32)
    assert 0 <= drawn.min() <= drawn.max() <= 1
    corners = drawn[:, [0, 0, -1, -1], [0, -1, 0, -1]].median(1).values  # the background
    inverted = corners > 0.55
    assert 0.4 < inverted.float().mean() < 0.6
    ink = torch.where(inverted[:, None, None], 1 - drawn, drawn)
    mask = (ink > (ink.amin((1, 2)) + ink.amax((1, 2)))[:, None, None] / 2).float()
    area = mask.sum((1, 2))
    assert area.min() > 25  # of 144 when it is as it was
    assert area.quantile(0.9) > 1.8 * area.quantile(0.1)
    place = torch.linspace(-1, 1, 32)
    centre = (mask * place).sum((1, 2)) / area
    assert centre.std() > 0.15
    border = torch.cat([mask[:, 0], mask[:, -1], mask[:, :, 0], mask[:, :, -1]], 1)
    assert (border.sum(1) > 8).float().mean() < 0.05


@pytest.fixture(scope="module")
def digits() -> ImageList:
    images = open_dataset(DataConfig(name="digits")).splits["train"]
    return replace(images, names=images.names[:50], labels=images.labels[:50])


def steps(digits: ImageList, epoch: int = 0, seed: int = 0, start_step: int = 0, **knobs: int) -> list:
    return list(TrainBatches(digits, 10, SMALL, WARP, seed, 8, **knobs).epoch(epoch, start_step))


def test_batches_are_warped_as_functions_of_seed_epoch_and_index(digits: ImageList) -> None:
    whole = steps(digits)
    assert len(whole) == 6
    images, targets, indices = whole[0][0]
    assert images.shape == (8, 3, 16, 16)
    assert targets.argmax(1).tolist() == [digits.labels[i] for i in indices.tolist()]
    torch.testing.assert_close(steps(digits, start_step=4), whole[4:], atol=0, rtol=0)
    ranks = [steps(digits, rank=rank, world_size=2) for rank in range(2)]
    for step, *halves in zip(whole, *ranks, strict=True):
        joined = torch.cat([half[0][0] for half in halves])
        torch.testing.assert_close(joined, step[0][0], atol=0, rtol=0)

    def of(index: int, **where: int) -> Tensor:
        return next(x[i == index][0] for step in steps(digits, **where) for x, _, i in step if (i == index).any())

    index = int(indices[0])
    seen = set(range(10)) & {int(i) for part in steps(digits, epoch=1) for i in part[0][2]}
    assert (of(index) - images[0]).abs().max() == 0
    assert (of(index, seed=1) - images[0]).abs().max() > 0.1
    other = min(seen & {int(i) for step in whole for i in step[0][2]})
    assert (of(other) - of(other, epoch=1)).abs().max() > 0.1


def test_kept_augmentations_come_round_again(digits: ImageList) -> None:
    first, third = (steps(digits, epoch=epoch, num_augmentations=2) for epoch in (0, 2))
    by_index = {
        int(i): image for step in first for images, _, indices in step for image, i in zip(images, indices, strict=True)
    }
    compared = 0
    for step in third:
        for image, i in zip(step[0][0], step[0][2].tolist(), strict=True):
            if i in by_index:
                torch.testing.assert_close(image, by_index[i], atol=0, rtol=0)
                compared += 1
    assert compared > 30


def test_what_cannot_be_warped_is_refused(tmp_path, image_folder) -> None:
    files = open_dataset(DataConfig(name=f"folder:{image_folder}")).splits["train"]
    with pytest.raises(ValueError, match="policy warp is for grey images in memory"):
        TrainBatches(files, 10, SMALL, WARP, 0, 8)
    colored = ImageList(["a"] * 8, [0] * 8, np.zeros((8, 32, 32, 3), np.uint8), "")
    with pytest.raises(ValueError, match="policy warp is for grey images in memory"):
        TrainBatches(colored, 10, SMALL, WARP, 0, 8)
    check(Recipe(augment=WARP))
    with pytest.raises(ValueError, match=r"--augment\.hflip is 0\.0, but has no effect: --augment\.policy is warp"):
        check(Recipe(augment=replace(WARP, hflip=0.0)))
