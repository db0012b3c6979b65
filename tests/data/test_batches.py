"""Batches are pure functions of seed, epoch and step."""

import pickle
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_folders import fill, opened
from PIL import Image
from timm.data import auto_augment
from torch import Tensor

from riformer.config import AugmentConfig, DataConfig
from riformer.data.batches import TrainBatches, eval_batches, preprocessing, seeded, train_transform
from riformer.data.dataset import Dataset, ImageList, open_dataset

SMALL = DataConfig(img_size=16, crop_pct=1.0)
EVERYTHING = AugmentConfig()
LIGHT = AugmentConfig(
    crop_scale=(0.7, 1.0), hflip=0.0, color_jitter=0.0, auto_augment="", random_erasing=0.0, mixup=0.0, cutmix=0.0
)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return open_dataset(DataConfig(name="digits"))


def train_batches(digits: Dataset, augment: AugmentConfig = EVERYTHING, **knobs: Any) -> TrainBatches:
    data = replace(SMALL, num_workers=knobs.pop("num_workers", 0))
    return TrainBatches(some(digits, 50), 10, data, augment, **{"seed": 0, "batch_size": 8, **knobs})


def some(digits: Dataset, count: int) -> ImageList:
    images = digits.splits["train"]
    return replace(images, names=images.names[:count], labels=images.labels[:count])


def draws() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()]


def test_seeded_depends_on_keys_alone_and_restores() -> None:
    random.gauss(0, 1)  # leaves half a pair behind in Python's generator
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    with seeded(1, 2):
        first = draws()
    after = draws()
    with seeded(1, 2):
        again = draws()
    with seeded(1, 3):
        other = draws()
    assert again == first
    assert not set(other) & set(first)
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    assert draws() == after
    before = torch.get_rng_state()
    with pytest.raises(KeyError), seeded(0):
        raise KeyError
    torch.testing.assert_close(torch.get_rng_state(), before)


def test_sample_is_a_pure_function_of_seed_epoch_and_index(digits: Dataset) -> None:
    parts = train_batches(digits).parts
    alone, *_ = parts[2, 0, [7, 11]]
    draws()
    unmixed = train_batches(digits, replace(EVERYTHING, mixup=0.0, cutmix=0.0)).parts
    company, *_ = unmixed[2, 5, [3, 11, 7]]
    pair, *_ = unmixed[2, 0, [7, 11]]
    torch.testing.assert_close(pair, company[[2, 1]], atol=0, rtol=0)
    again, *_ = parts[2, 0, [7, 11]]
    torch.testing.assert_close(again, alone, atol=0, rtol=0)
    other_epoch, *_ = unmixed[3, 0, [7, 11]]
    other_seed, *_ = train_batches(digits, replace(EVERYTHING, mixup=0.0, cutmix=0.0), seed=1).parts[2, 0, [7, 11]]
    assert (other_epoch - pair).abs().max() > 0.1
    assert (other_seed - pair).abs().max() > 0.1


def test_generators_are_untouched_by_an_epoch(digits: Dataset) -> None:
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    for num_workers in (0, 2):
        assert len(list(train_batches(digits, num_workers=num_workers).epoch(0))) == 6
        assert len(list(eval_batches(some(digits, 10), preprocessing(SMALL), 4, num_workers))) == 3
    assert random.getstate() == states[0]
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])
    torch.testing.assert_close(torch.get_rng_state(), states[2])


def assert_same_steps(actual: list, expected: list) -> None:
    assert len(actual) == len(expected) > 0
    torch.testing.assert_close(actual, expected, atol=0, rtol=0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_at_a_step_equals_going_there(digits: Dataset, num_workers: int) -> None:
    whole = list(train_batches(digits, accumulation=2).epoch(1))
    assert len(whole) == 6
    assert all(len(parts) == 2 for parts in whole)
    draws()
    batches = train_batches(digits, accumulation=2, num_workers=num_workers)
    assert_same_steps(list(batches.epoch(1, start_step=4)), whole[4:])
    assert_same_steps(list(batches.epoch(1)), whole)
    assert list(batches.epoch(1, start_step=6)) == []


def test_skipped_steps_are_not_decoded(tmp_path: Path) -> None:
    images = opened(fill(tmp_path, {"a": 10, "b": 10}), val_fraction=0.1).splits["train"]
    numbered = replace(images, labels=list(range(18)))  # the targets then tell which images a step took
    batches = TrainBatches(numbered, 18, SMALL, LIGHT, seed=0, batch_size=6)
    whole = list(batches.epoch(0))
    skipped = torch.cat([step[0][1] for step in whole[:2]]).argmax(dim=1).tolist()
    assert len(set(skipped)) == 12
    for index in skipped:
        (tmp_path / images.names[index]).unlink()
    assert_same_steps(list(batches.epoch(0, start_step=2)), whole[2:])
    with pytest.raises(ValueError, match="No such file"):
        next(batches.epoch(0, start_step=1))


def test_two_epochs_in_turn_do_not_disturb_each_other(digits: Dataset) -> None:
    batches = train_batches(digits)
    alone = [list(batches.epoch(0)), list(batches.epoch(1))]
    both = list(zip(batches.epoch(0), batches.epoch(1), strict=True))
    assert_same_steps([steps[0] for steps in both], alone[0])
    assert_same_steps([steps[1] for steps in both], alone[1])
    assert (alone[0][0][0][0] - alone[1][0][0][0]).abs().max() > 0.1


def step_images(digits: Dataset, **knobs: Any) -> list[Tensor]:
    """All images of each step of epoch 3, over ranks and parts, in the order of the global batch."""
    world_size = knobs.get("world_size", 1)
    ranks = [list(train_batches(digits, LIGHT, rank=rank, **knobs).epoch(3)) for rank in range(world_size)]
    return [torch.cat([images for parts in step for images, *_ in parts]) for step in zip(*ranks, strict=True)]


@pytest.mark.parametrize("knobs", [{"world_size": 2}, {"accumulation": 2}, {"world_size": 2, "accumulation": 4}])
def test_a_step_sees_the_same_images_however_divided(digits: Dataset, knobs: dict[str, int]) -> None:
    expected = step_images(digits)
    assert len(expected) == 6
    assert_same_steps(step_images(digits, **knobs), expected)


def test_an_epoch_takes_each_image_at_most_once(digits: Dataset) -> None:
    numbered = replace(some(digits, 50), labels=list(range(50)))  # each image is its own class
    batches = TrainBatches(numbered, 50, SMALL, LIGHT, seed=0, batch_size=8)
    assert batches.steps_per_epoch == 6
    targets = torch.cat([target for step in batches.epoch(0) for _, target, _ in step])
    assert targets.sum(0).max() == 1
    assert targets.sum() == 48


def test_augmentations_come_in_turns_and_the_order_is_always_new(digits: Dataset) -> None:
    batches = train_batches(digits, replace(EVERYTHING, mixup=0.0, cutmix=0.0), num_augmentations=2)
    seen: list[dict[int, Tensor]] = []
    for epoch in range(4):
        parts = [part for step in batches.epoch(epoch) for part in step] + list(batches.left_out(epoch))
        indices = torch.cat([indices for *_, indices in parts]).tolist()
        assert set(indices) == set(range(50))
        seen.append(dict(zip(indices, torch.cat([images for images, *_ in parts]), strict=True)))
    orders = [list(images) for images in seen]
    assert all(orders[i] != orders[j] for i in range(4) for j in range(i))
    for i in range(50):
        torch.testing.assert_close(seen[2][i], seen[0][i], atol=0, rtol=0)
        torch.testing.assert_close(seen[3][i], seen[1][i], atol=0, rtol=0)
    assert all((seen[1][i] - seen[0][i]).abs().max() > 0 for i in range(50))
    live = train_batches(digits, replace(EVERYTHING, mixup=0.0, cutmix=0.0))
    assert_same_steps(list(batches.epoch(1)), list(live.epoch(1)))
    assert not torch.equal(next(batches.epoch(2))[0][0], next(live.epoch(2))[0][0])


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_an_epoch_leaves_out_is_shared_by_the_processes(digits: Dataset, world_size: int) -> None:
    ranks = [train_batches(digits, LIGHT, batch_size=14, world_size=world_size, rank=r) for r in range(world_size)]
    left = [part for batches in ranks for part in batches.left_out(1)]
    taken = [part for batches in ranks for step in batches.epoch(1) for part in step]
    missed, seen = (set(torch.cat([indices for *_, indices in parts]).tolist()) for parts in (left, taken))
    assert (len(missed), missed | seen) == (50 % 14, set(range(50)))
    assert not missed & seen
    assert {len(images) for images, *_ in left} == {14 // world_size}  # filled up
    assert list(train_batches(digits, LIGHT, batch_size=10).left_out(0)) == []


def test_targets_are_one_hot_or_mixed(digits: Dataset) -> None:
    (images, targets, _), *_ = next(train_batches(digits, LIGHT).epoch(0))
    assert images.shape == (8, 3, 16, 16)
    assert (images.dtype, targets.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(targets.sort(dim=1).values, torch.eye(10)[9].expand(8, 10))
    for mix in ({"mixup": 0.8}, {"cutmix": 1.0}):
        mixing = train_batches(digits, replace(LIGHT, **mix))
        steps = [step[0] for step in mixing.epoch(0)]
        again = [step[0] for step in mixing.epoch(0)]
        assert_same_steps(again, steps)
        mixed = torch.cat([targets for _, targets, _ in steps])
        assert mixed.dtype == torch.float32
        torch.testing.assert_close(mixed.sum(1), torch.ones(48))
        assert ((mixed > 0.01) & (mixed < 0.99)).any()


@pytest.mark.parametrize("mixing", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
@pytest.mark.parametrize("divided", [{"world_size": 2}, {"accumulation": 4}, {"world_size": 2, "accumulation": 2}])
def test_mixing_is_the_same_however_a_step_is_divided(digits: Dataset, mixing: dict, divided: dict[str, int]) -> None:
    images = replace(some(digits, 32), labels=list(range(32)))
    augment = replace(EVERYTHING, **{"mixup": 0.0, "cutmix": 0.0, **mixing})

    def steps(rank: int = 0, **divided: int) -> list[dict[int, tuple[Tensor, Tensor]]]:
        batches = TrainBatches(images, 32, SMALL, augment, 0, 16, rank=rank, **divided)
        return [{int(i): (x, y) for part in parts for x, y, i in zip(*part, strict=True)} for parts in batches.epoch(0)]

    whole = steps()
    shares = [steps(rank, **divided) for rank in range(divided.get("world_size", 1))]
    for number, step in enumerate(whole):
        union = {index: mixed for share in shares for index, mixed in share[number].items()}
        assert union.keys() == step.keys()
        for index, (image, target) in step.items():
            torch.testing.assert_close(union[index][0], image, rtol=0, atol=0)
            torch.testing.assert_close(union[index][1], target, rtol=0, atol=0)
    assert len({float(step[index][1].max()) for step in whole for index in step}) > 1  # a draw for each step


def test_batches_that_cannot_be_made(digits: Dataset) -> None:
    with pytest.raises(ValueError, match=r"--optim\.batch-size 64 is more than the 50 training images"):
        train_batches(digits, batch_size=64)
    with pytest.raises(ValueError, match=r"--optim\.batch-size 8 does not divide by 3 processes x 1 parts"):
        train_batches(digits, world_size=3)
    with pytest.raises(ValueError, match=r"--optim\.batch-size 8 does not divide by 2 processes x 3 parts"):
        train_batches(digits, world_size=2, accumulation=3)
    with pytest.raises(ValueError, match=r"mixup and cutmix pair images, but --optim\.batch-size 6 makes parts of 3"):
        train_batches(digits, batch_size=6, world_size=2)
    for policy in ("rund", "rand-q9", "rand-m9x", "original-m9"):
        with pytest.raises(ValueError, match=rf"--augment\.auto-augment {policy} is refused by timm"):
            train_batches(digits, replace(EVERYTHING, auto_augment=policy))
    with pytest.raises(ValueError, match=r"--augment\.auto-augment rand-m9-mstd-inc1: 'mstd' lacks its number"):
        train_batches(digits, replace(EVERYTHING, auto_augment="rand-m9-mstd-inc1"))


def test_augmentation_knobs_reach_timm() -> None:
    described = repr(train_transform(SMALL, LIGHT))
    assert "scale=(0.7, 1.0)" in described
    assert "bicubic" in described
    assert not any(name in described for name in ("Flip", "ColorJitter", "RandAugment", "RandomErasing"))
    described = repr(train_transform(SMALL, EVERYTHING))
    assert all(name in described for name in ("Flip", "RandAugment", "RandomErasing(p=0.25, mode=pixel"))
    assert "ColorJitter" in repr(train_transform(SMALL, replace(EVERYTHING, auto_augment="")))


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "rand-m1", "rand-m9-mstd0.5-inc1", "augmix-m10", "v0", "original"])
def test_augmentation_survives_its_strongest_levels(policy: str) -> None:
    transform = train_transform(SMALL, replace(LIGHT, auto_augment=policy))
    image = Image.new("RGB", (8, 8), (250, 100, 50))
    with seeded(0):
        drawn = torch.stack([transform(image) for _ in range(100)])
    assert drawn.isfinite().all()
    assert drawn.std(dim=0).max() > 0.1


def test_posterizing_to_no_bits_is_black_and_timm_stays_as_it_is() -> None:
    before = dict(auto_augment.NAME_TO_OP)
    transform = train_transform(SMALL, replace(LIGHT, auto_augment="rand-m10-inc1"))
    (policy,) = [step for step in transform.transforms if isinstance(step, auto_augment.RandAugment)]
    (strongest,) = [operation for operation in policy.ops if operation.name == "PosterizeIncreasing"]
    strongest.prob = 1.0
    assert strongest(Image.new("RGB", (2, 2), (250, 100, 50))).getpixel((0, 0)) == (0, 0, 0)
    assert before == auto_augment.NAME_TO_OP
    assert auto_augment.NAME_TO_OP["PosterizeIncreasing"] is auto_augment.posterize


def test_eval_transform_crops_and_normalises() -> None:
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    config = DataConfig(img_size=10, crop_pct=0.5, mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 0.5))
    expected = torch.tensor([1.0, -2.0, -1.0])[:, None, None].expand(3, 10, 10)
    torch.testing.assert_close(torch.from_numpy(preprocessing(config)(image)), expected)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_eval_batches_cover_each_image_once(digits: Dataset, world_size: int, num_workers: int) -> None:
    numbered = replace(some(digits, 10), labels=list(range(10)))
    data = replace(SMALL, num_workers=num_workers)
    shares = [list(eval_batches(numbered, preprocessing(data), 4, 0, rank, world_size)) for rank in range(world_size)]
    batches = [batch for share in shares for batch in share]
    labels = torch.cat([labels for _, labels in batches])
    assert labels.dtype == torch.int64
    assert sorted(labels.tolist()) == list(range(10))
    transform = preprocessing(data)
    expected = torch.from_numpy(np.stack([transform(numbered.read(i)) for i in labels.tolist()]))
    torch.testing.assert_close(torch.cat([pixels for pixels, _ in batches]), expected, atol=0, rtol=0)


def test_eval_batches_of_a_rank_without_images(digits: Dataset) -> None:
    assert list(eval_batches(some(digits, 1), preprocessing(SMALL), 4, 2, rank=1, world_size=2)) == []


def test_batches_can_be_sent_to_spawned_workers(digits: Dataset) -> None:
    parts = train_batches(digits).parts
    key = (0, 0, [1, 2])
    torch.testing.assert_close(pickle.loads(pickle.dumps(parts))[key], parts[key], atol=0, rtol=0)
