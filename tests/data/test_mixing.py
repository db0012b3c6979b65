"""Mixup and cutmix are functions of (seed, epoch, step) over the whole batch, however it is divided."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from timm.data import Mixup
from torch import Tensor

from riformer.config import AugmentConfig, DataConfig
from riformer.data.batches import TrainBatches, seeded
from riformer.data.dataset import ImageList, open_dataset

SMALL = DataConfig(img_size=16)
BATCH = 16
Sample = tuple[Tensor, Tensor]  # image and target
MIXINGS = [{"mixup": 0.8, "cutmix": 0.0}, {"mixup": 0.0, "cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}]


@dataclass(frozen=True, eq=False)
class Counted(ImageList):
    """Images that record which of them are read."""

    read_indices: list[int] = field(default_factory=list)

    def read(self, index):
        self.read_indices.append(index)
        return super().read(index)


@pytest.fixture
def images() -> Counted:
    digits = open_dataset(DataConfig(name="digits")).splits["train"]
    return Counted(digits.names[:50], list(range(50)), digits.source, digits.sha256)  # each image its own class


def samples(images: ImageList, augment: AugmentConfig, epoch: int = 0, **division: int) -> list[dict[int, Sample]]:
    """For each step, image and target by the image's index, over all processes and parts."""
    steps: list[dict[int, Sample]] = [{} for _ in range(len(images) // BATCH)]
    for rank in range(division.get("world_size", 1)):
        batches = TrainBatches(images, len(images), SMALL, augment, 0, BATCH, rank=rank, **division)
        for step, parts in zip(steps, batches.epoch(epoch), strict=True):
            for part in parts:
                for image, target, index in zip(*part, strict=True):
                    assert int(index) not in step
                    step[int(index)] = image, target
    return steps


DIVISIONS = [
    {"world_size": 2},
    {"accumulation": 2},
    {"world_size": 8},
    {"accumulation": 8},
    {"world_size": 2, "accumulation": 4},
    {"world_size": 4, "accumulation": 2},
]


@pytest.mark.parametrize("mixing", MIXINGS, ids=str)
@pytest.mark.parametrize("division", DIVISIONS, ids=str)
def test_a_divided_step_has_the_same_images_and_targets_bit_for_bit(images, mixing, division):
    augment = AugmentConfig(**mixing)
    whole = samples(images, augment)
    num_read = len(images.read_indices)
    assert_equal(samples(images, augment, **division), whole)
    assert len(images.read_indices) == 2 * num_read == 2 * 48  # no image is read for a partner in another part


@pytest.mark.parametrize("mixing", MIXINGS, ids=str)
def test_the_whole_batch_is_what_timm_makes_of_it(images, mixing):
    batches = TrainBatches(images, 50, SMALL, AugmentConfig(), 0, BATCH)
    order = torch.cat([indices for ((_, _, indices),) in batches.epoch(1)]).tolist()
    plain = samples(images, AugmentConfig(mixup=0.0, cutmix=0.0), epoch=1)
    mixed = samples(images, AugmentConfig(**mixing), epoch=1)
    for number, (before, after) in enumerate(zip(plain, mixed, strict=True)):
        indices = order[number * BATCH : (number + 1) * BATCH]
        assert before.keys() == after.keys() == set(indices)
        with seeded(0, 1, number):
            mixup = Mixup(mixing["mixup"], mixing["cutmix"], label_smoothing=0.0, num_classes=50)
            expected = mixup(torch.stack([before[index][0] for index in indices]), torch.tensor(indices))
        actual = [torch.stack(values) for values in zip(*(after[index] for index in indices), strict=True)]
        torch.testing.assert_close(actual, list(expected), atol=0, rtol=0)
        assert any((before[index][0] - after[index][0]).abs().max() > 0.1 for index in indices)


def test_draws_differ_between_steps_epochs_and_seeds(images):
    augment = AugmentConfig()

    def shares(epoch: int = 0, seed: int = 0) -> list[float]:
        steps = TrainBatches(images, 50, SMALL, augment, seed, BATCH).epoch(epoch)
        return [float(targets.max()) for ((_, targets, _),) in steps]

    drawn = shares() + shares(epoch=1) + shares(seed=1)
    assert len(set(drawn)) > 6  # cutmix may draw an empty box more than once
    assert shares() == drawn[:3]


def test_workers_mix_alike(images):
    augment = AugmentConfig()
    batches = TrainBatches(images, 50, replace(SMALL, num_workers=2), augment, 0, BATCH, accumulation=2)
    here = TrainBatches(images, 50, SMALL, augment, 0, BATCH, accumulation=2)
    torch.testing.assert_close(list(batches.epoch(0)), list(here.epoch(0)), atol=0, rtol=0)


@pytest.mark.parametrize("division", [{"world_size": 16}, {"accumulation": 16}, {"world_size": 4, "accumulation": 4}])
def test_pairs_that_would_be_torn_are_refused(images, division):
    with pytest.raises(ValueError, match=r"mixup and cutmix pair images, but --optim\.batch-size 16 makes parts of 1"):
        TrainBatches(images, 50, SMALL, AugmentConfig(), 0, BATCH, **division)
    TrainBatches(images, 50, SMALL, AugmentConfig(mixup=0.0, cutmix=0.0), 0, BATCH, **division)


def test_without_mixing_the_parts_of_a_batch_follow_its_order(images):
    plain = AugmentConfig(mixup=0.0, cutmix=0.0)
    whole = torch.cat([part[2] for (part,) in TrainBatches(images, 50, SMALL, plain, 0, BATCH).epoch(0)])
    ranks = [list(TrainBatches(images, 50, SMALL, plain, 0, BATCH, 2, rank, 2).epoch(0)) for rank in range(2)]
    divided = [part[2] for steps in zip(*ranks, strict=True) for parts in steps for part in parts]
    torch.testing.assert_close(torch.cat(divided), whole)


def assert_equal(actual: list[dict[int, Sample]], expected: list[dict[int, Sample]]) -> None:
    assert [step.keys() for step in actual] == [step.keys() for step in expected]
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close([one[index] for index in other], list(other.values()), atol=0, rtol=0)
