"""Accuracy of a model on a split, exact over all processes."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Evaluation:
    """What a model did on a split: percentages, mean cross-entropy, counts of (true class, predicted class)."""

    top1: float
    top5: float
    loss: float
    num_images: int
    confusion: Tensor


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], num_classes: int, precision: str = "fp32"
) -> Evaluation:
    """Runs the model in eval mode over the batches of this process and adds the counts of all processes.

    The model's mode is restored. With fewer than six classes, top5 is top1's trivial upper bound, 100.

    Shape: batches of images [N, 3, H, W] and labels [N].

    Raises:
        ValueError: no process had an image.
    """
    parameter = next(model.parameters())
    device = parameter.device
    was_training = model.training
    model.eval()
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # images, right in the first five, cross-entropy
    for images, labels in batches:
        images, labels = images.to(parameter), labels.to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            logits = model(images)
        logits = logits.float()
        top = logits.topk(min(5, num_classes), dim=1).indices
        confusion.view(-1).index_add_(0, labels * num_classes + top[:, 0], torch.ones_like(labels))
        in_top = (top == labels[:, None]).any(dim=1).sum()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([torch.full_like(loss, len(labels)), in_top, loss])
    model.train(was_training)
    if dist.is_initialized():
        dist.all_reduce(confusion)
        dist.all_reduce(sums)
    num_images, in_top5, total_loss = sums.tolist()
    if not num_images:
        raise ValueError("no images to evaluate on")
    return Evaluation(
        top1=100 * confusion.diagonal().sum().item() / num_images,
        top5=100 * in_top5 / num_images,
        loss=total_loss / num_images,
        num_images=int(num_images),
        confusion=confusion.cpu(),
    )
