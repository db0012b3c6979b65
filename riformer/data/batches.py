"""Images of a split -> batches that are pure functions of (seed, epoch, step), on any number of processes.

Each image is augmented under a seed of its own, each step is mixed under one, and the global generators are restored
afterwards. The policy warp uses no generator.
"""

import hashlib
import random
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import Mixup, auto_augment, create_transform
from torch import Tensor

from riformer.config import AugmentConfig, DataConfig
from riformer.data.dataset import ImageList
from riformer.data.warp import GOLDEN, warp
from riformer.data.workers import check_shared_memory, load
from riformer_runtime.preprocess import Preprocessing


@contextmanager
def seeded(*keys: int) -> Iterator[None]:
    """Draws inside depend on the keys alone; Python's, NumPy's and torch's CPU generators are restored at the end."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        _seed_generators(*keys)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _seed_generators(*keys: int) -> None:
    seed = _seed_from(*keys)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs too


def _seed_from(*keys: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(keys).encode()).digest()[:8], "big")


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's posterize; its strongest level keeps 0 bits, which is black, and which Pillow 13 refuses."""
    return auto_augment.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


def _mend_posterize(transform: Any) -> None:
    """Replaces timm's posterize by `_posterize` in the operations of this transform; timm itself stays as it is."""
    for step in getattr(transform, "transforms", ()):
        _mend_posterize(step)
        policies = [getattr(step, "ops", ()), *(getattr(step, "policy", None) or ())]
        for operation in (operation for policy in policies for operation in policy):
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = _posterize


def train_transform(data: DataConfig, augment: AugmentConfig) -> Callable[[Image.Image], Tensor]:
    """timm's training transform: random crop, flip, colour, erasing. Draws from the global generators: see `seeded`.

    Choice: bicubic, and erased rectangles filled with normal noise, as in the trainings of DeiT and PoolFormer.

    Shape: RGB image -> [3, img_size, img_size], normalised.

    Raises:
        ValueError: timm knows no such `auto_augment`.
    """
    for section in augment.auto_augment.split("-")[1:]:
        if not section.startswith("t") and not re.search(r"\d", section):  # which timm leaves out without a word
            raise ValueError(f"--augment.auto-augment {augment.auto_augment}: {section!r} lacks its number")
    try:
        transform = create_transform(
            data.img_size,
            is_training=True,
            scale=augment.crop_scale,
            hflip=augment.hflip,
            color_jitter=augment.color_jitter or None,
            auto_augment=augment.auto_augment or None,
            interpolation="bicubic",
            mean=data.mean,
            std=data.std,
            re_prob=augment.random_erasing,
            re_mode="pixel",
        )
    except (AssertionError, ValueError) as error:
        raise ValueError(f"--augment.auto-augment {augment.auto_augment} is refused by timm: {error}") from error
    _mend_posterize(transform)
    return transform


def preprocessing(data: DataConfig) -> Preprocessing:
    """How images are evaluated: the shorter side resized to img_size / crop_pct (bicubic), then the centre."""
    size = (3, data.img_size, data.img_size)
    return Preprocessing(size, data.crop_pct, "center", "bicubic", data.mean, data.std)


TrainPart = tuple[Tensor, Tensor, Tensor]  # images, targets, and the indices of the images in their list


class _TrainParts:
    """Parts of batches; each is a pure function of its key (epoch, step, indices)."""

    def __init__(
        self,
        images: ImageList,
        num_classes: int,
        data: DataConfig,
        augment: AugmentConfig,
        seed: int,
        num_augmentations: int,
    ):
        self.images = images
        self.num_classes = num_classes
        self.transform = train_transform(data, augment)
        self.warps = augment.policy == "warp"
        self.mixup = None
        if augment.mixes:
            self.mixup = Mixup(augment.mixup, augment.cutmix, label_smoothing=0.0, num_classes=num_classes)
        self.seed = seed
        self.num_augmentations = num_augmentations
        pixels = images.source[0].nbytes if self.warps else _image_bytes(3, data.img_size, data.img_size)
        self.bytes_per_image = pixels + 4 * num_classes

    def __getitem__(self, key: tuple[int, int, list[int]]) -> TrainPart:
        epoch, step, indices = key
        labels = torch.tensor([self.images.labels[index] for index in indices])
        if self.warps:
            targets = F.one_hot(labels, self.num_classes).float()
            return torch.from_numpy(self.images.source[indices]), targets, torch.tensor(indices)
        with seeded(self.seed, epoch):  # restores the generators once; each draw below has its own seed
            images = torch.stack([self.augmented(epoch, index) for index in indices])
            if self.mixup is None:
                return images, F.one_hot(labels, self.num_classes).float(), torch.tensor(indices)
            _seed_generators(self.seed, epoch, step)  # not of the part: one draw for the whole step
            return *self.mixup(images, labels), torch.tensor(indices)

    def augmented(self, epoch: int, index: int) -> Tensor:
        image = self.images.read(index)
        _seed_generators(self.seed, epoch % self.num_augmentations if self.num_augmentations else epoch, index)
        return self.transform(image)


class TrainBatches:
    """Augmented batches of a training split; what they hold depends on the arguments, the epoch and the step alone.

    `batch_size` images make one optimiser step: over all `world_size` processes, of which this is `rank`, and all
    `accumulation` parts of each. Which images a step sees does not depend on how it is divided. Images at the end of
    an epoch's order that fill no batch are left out.

    Images are augmented anew in every epoch. With `num_augmentations` above 0 each image has that many augmentations,
    and epoch e uses number e mod `num_augmentations`; the order is still a new one in every epoch.

    With the policy warp, whole parts are augmented on `device` and stay there.

    Raises:
        ValueError: the batch cannot be divided, there are fewer images than one batch, they cannot be warped, or the
            workers' parts do not fit into shared memory.
    """

    def __init__(
        self,
        images: ImageList,
        num_classes: int,
        data: DataConfig,
        augment: AugmentConfig,
        seed: int,
        batch_size: int,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        num_augmentations: int = 0,
        device: torch.device | str = "cpu",
    ):
        if augment.policy == "warp" and (isinstance(images.source, Path) or images.source.ndim != 3):
            raise ValueError("--augment.policy warp is for grey images in memory: digits, fashion-mnist, glyphs")
        if batch_size % (world_size * accumulation):
            raise ValueError(
                f"--optim.batch-size {batch_size} does not divide by {world_size} processes x {accumulation} parts"
            )
        if len(images) < batch_size:
            raise ValueError(f"--optim.batch-size {batch_size} is more than the {len(images)} training images")
        self.part_size = batch_size // (world_size * accumulation)
        if augment.mixes and self.part_size % 2:
            raise ValueError(
                f"mixup and cutmix pair images, but --optim.batch-size {batch_size} makes parts of {self.part_size}"
            )
        self.data, self.augment, self.device = data, augment, device
        self.num_augmentations = num_augmentations
        self.num_images = len(images)
        self.num_workers = data.num_workers
        self.seed = seed
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.rank = rank
        self.world_size = world_size
        self.steps_per_epoch = len(images) // batch_size
        self.parts = _TrainParts(images, num_classes, data, augment, seed, num_augmentations)
        check_shared_memory(
            self.part_size * self.parts.bytes_per_image,
            self.steps_per_epoch * accumulation,
            data.num_workers,
            held=2 * accumulation,  # the parts of a step, while those of the next one come
        )

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[TrainPart]]:
        """For each optimiser step from `start_step` on, this process's `accumulation` parts.

        A part is images, targets, and the indices of the images among all. Targets are probabilities: one-hot, or mixed
        by mixup and cutmix.

        Shape: images [n, 3, img_size, img_size], targets [n, num_classes], indices [n], n = batch_size / world_size /
        accumulation.
        """
        order = self._order(epoch)
        keys = []
        for step in range(start_step, self.steps_per_epoch):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            keys += [(epoch, step, self._part(batch, part)) for part in range(self.accumulation)]
        loaded = iter(load(self.parts, keys, self.num_workers))
        for _ in range(start_step, self.steps_per_epoch):
            yield [self._finished(epoch, next(loaded)) for _ in range(self.accumulation)]

    def _part(self, batch: list[int], part: int) -> list[int]:
        """This process's part of that number of a whole batch.

        Mixup and cutmix pair the first image of a batch with the last, the second with the last but one, and so on. A
        part then takes as many images from the front as from the back, so that every pair lies in one part, and the
        images of a step are mixed the same however it is divided.
        """
        number = self.rank * self.accumulation + part
        if not self.augment.mixes:
            return batch[number * self.part_size : (number + 1) * self.part_size]
        half = self.part_size // 2
        return (
            batch[number * half : (number + 1) * half]
            + batch[len(batch) - (number + 1) * half : len(batch) - number * half]
        )

    def left_out(self, epoch: int) -> Iterable[TrainPart]:
        """This process's share of the images that fill no batch of an epoch, in parts like those of `epoch`.

        The last part is filled up by repeating its images.
        """
        left = self._order(epoch)[self.steps_per_epoch * self.batch_size :][self.rank :: self.world_size]
        starts = range(0, len(left), self.part_size)
        parts = [left[start : start + self.part_size] for start in starts]
        full = [(part * self.part_size)[: self.part_size] for part in parts]  # a teacher's last bits depend on n
        keys = [(epoch, self.steps_per_epoch, part) for part in full]
        return (self._finished(epoch, part) for part in load(self.parts, keys, self.num_workers))

    def _finished(self, epoch: int, part: TrainPart) -> TrainPart:
        """The part, warped if that is the policy. The keys depend on seed, epoch and index alone."""
        if self.augment.policy != "warp":
            return part
        images, targets, indices = part
        number = epoch % self.num_augmentations if self.num_augmentations else epoch
        start = int.from_bytes(_seed_from(self.seed, number).to_bytes(8, "big"), "big", signed=True)
        keys = (indices * GOLDEN + start).to(self.device)
        grey = warp(images.to(self.device, non_blocking=True), keys, self.data.img_size)[:, None]
        mean, std = (
            torch.tensor(values, device=grey.device).view(3, 1, 1) for values in (self.data.mean, self.data.std)
        )
        return (grey - mean) / std, targets, indices

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(_seed_from(self.seed, epoch))
        return torch.randperm(self.num_images, generator=generator).tolist()


class _EvalParts:
    """Batches of evaluation; the key of one is the range of its indices."""

    def __init__(self, images: ImageList, preprocessing: Preprocessing):
        self.images, self.preprocessing = images, preprocessing

    def __getitem__(self, indices: range) -> tuple[Tensor, Tensor]:
        images = np.stack([self.preprocessing(self.images.read(index)) for index in indices])
        return torch.from_numpy(images), torch.tensor([self.images.labels[index] for index in indices])


def eval_batches(
    images: ImageList,
    preprocessing: Preprocessing,
    batch_size: int,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterable[tuple[Tensor, Tensor]]:
    """Batches of this process's share of a split; over all processes each image comes once.

    Shape: images [n, *preprocessing.input_size], labels [n], n <= batch_size.

    Raises:
        ValueError: the workers' batches do not fit into shared memory.
    """
    share = range(rank, len(images), world_size)
    keys = [share[start : start + batch_size] for start in range(0, len(share), batch_size)]
    check_shared_memory(batch_size * _image_bytes(*preprocessing.input_size), len(keys), num_workers)
    return load(_EvalParts(images, preprocessing), keys, num_workers)


def _image_bytes(channels: int, height: int, width: int) -> int:
    """Size of an image in float32."""
    return 4 * channels * height * width
