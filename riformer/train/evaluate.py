"""Accuracy of a model on a split, exact over all processes."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from riformer.runtime.optimize import device_and_dtype

NO_PAIR = -1  # of an image without a prediction


@dataclass(frozen=True)
class Evaluation:
    """What a model did on a split.

    Attributes:
        top1: percentage of all images whose class is the first of the model's.
        top5: percentage of all images whose class is among the model's first five.
        loss: mean cross-entropy.
        num_images: number of images.
        confusion: number of images by true class and, inside, predicted class; pairs that do not occur are left out.
        num_nonfinite: images with a logit that is not finite. They count as wrong, their prediction is in no count of
            `confusion`, and the loss is then not finite either.
    """

    top1: float
    top5: float
    loss: float
    num_images: int
    confusion: dict[int, dict[int, int]]
    num_nonfinite: int = 0

    @property
    def finite(self) -> bool:
        """Whether all logits were finite; otherwise the accuracy says nothing and must not be ranked."""
        return self.num_nonfinite == 0


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], num_classes: int, precision: str = "fp32"
) -> Evaluation:
    """Runs the model in eval mode over the batches of this process and adds the counts of all processes.

    The model's mode is restored. With five classes or fewer, top5 is 100.

    Shape: batches of images [N, 3, H, W] and labels [N].

    Raises:
        ValueError: no process had an image.
    """
    device, dtype = device_and_dtype(model)
    was_training = model.training
    model.eval()
    pairs = [torch.zeros(0, dtype=torch.int64, device=device)]  # true class * num_classes + predicted class
    sums = torch.zeros(5, dtype=torch.float64, device=device)  # images, finite, first right, in first five, loss
    for images, labels in batches:
        images, labels = images.to(device, dtype), labels.to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            logits = model(images)
        logits = logits.float()
        finite = logits.isfinite().all(dim=1)
        top = logits.topk(min(5, num_classes), dim=1).indices
        right = (top == labels[:, None]) & finite[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        counts = (torch.ones_like(finite).sum(), finite.sum(), right[:, 0].sum(), right.sum(), loss)
        sums += torch.stack([count.double() for count in counts])
        pairs.append(torch.where(finite, labels * num_classes + top[:, 0], NO_PAIR))
    model.train(was_training)
    if dist.is_initialized():
        dist.all_reduce(sums)
    num_images, num_finite, first, in_top5, total_loss = sums.tolist()
    if not num_images:
        raise ValueError("no images to evaluate on")
    return Evaluation(
        top1=100 * first / num_images,
        top5=100 * in_top5 / num_images,
        loss=total_loss / num_images,
        num_images=int(num_images),
        confusion=_confusion(_of_all_processes(torch.cat(pairs)), num_classes),
        num_nonfinite=int(num_images - num_finite),
    )


def _of_all_processes(pairs: Tensor) -> Tensor:
    """The values of all processes, which may have different numbers of them; NO_PAIR fills up the shorter ones."""
    if not dist.is_initialized():
        return pairs
    longest = torch.tensor(len(pairs), device=pairs.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    padded = F.pad(pairs, (0, int(longest) - len(pairs)), value=NO_PAIR)
    gathered = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, padded)
    return torch.cat(gathered)


def _confusion(pairs: Tensor, num_classes: int) -> dict[int, dict[int, int]]:
    """Counts by true and predicted class; memory grows with the images, not with the square of the classes."""
    counts: dict[int, dict[int, int]] = {}
    for pair, count in zip(*(x.tolist() for x in pairs[pairs != NO_PAIR].unique(return_counts=True)), strict=True):
        true, predicted = divmod(pair, num_classes)
        counts.setdefault(true, {})[predicted] = count
    return counts
