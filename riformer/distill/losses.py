"""The terms of the training objective, as pure functions of tensors. All return a scalar, the mean over the batch."""

from collections.abc import Sequence
from difflib import get_close_matches

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_MATCHES = ("normalised", "raw")


def label(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy to the targets, which may be mixtures of classes.

    Shape: logits [N, K], targets [N, K] probabilities.
    """
    return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)


def hard(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross-entropy to the teacher's arg-max.

    Shape: both [N, K].
    """
    return F.cross_entropy(logits.float(), teacher_logits.argmax(dim=1))


def soft(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of softened probabilities, times the temperature's square.

    Choice: temperature 1 and no division by the number of classes, because the paper gives neither. Dividing, as DeiT's
    code does, would make the term a thousand times smaller on ImageNet and leave the imitation terms as they are.

    Shape: both [N, K].
    """
    student = F.log_softmax(logits.float() / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def block(student: Tensor, teacher: Tensor, match: str = "normalised") -> Tensor:
    """L_in': mean squared error between the outputs of two blocks.

    Choice: `match` is "normalised", which compares after a norm over C, H and W without parameters, because the next
    block also begins with that norm. "raw" values differ tenfold between a teacher and a fresh student, and outweigh
    the other terms.

    Shape: both [N, C, H, W].

    Raises:
        ValueError: an unknown `match`, or maps of different shapes.
    """
    check_choice("match", match, BLOCK_MATCHES)
    _same_shape("block", student, teacher)
    student, teacher = student.float(), teacher.float()
    if match == "normalised":
        student, teacher = (F.layer_norm(x, x.shape[1:]) for x in (student, teacher))
    return F.mse_loss(student, teacher)


def mixer(student: Tensor, teacher: Tensor) -> Tensor:
    """L_out: mean squared error between the affine's output and the teacher's mixer's, before the residual add.

    Shape: both [N, C, H, W].

    Raises:
        ValueError: maps of different shapes.
    """
    _same_shape("mixer", student, teacher)
    return F.mse_loss(student.float(), teacher.float())


def relation(student: Tensor, teacher: Tensor, max_tokens: int = 196) -> Tensor:
    """L_rel: mean squared error between the token-by-token cosine similarities of two maps.

    Choice: maps of more than `max_tokens` tokens are average-pooled to a smaller grid of the same proportions, because
    at stage 1 of a 224 px image the full matrix has 3136 x 3136 entries.

    Shape: [N, C, H, W] and [N, D, H, W]; the widths may differ.

    Raises:
        ValueError: maps of different heights or widths.
    """
    _same_shape("relation", student[:, :1], teacher[:, :1])
    grams = []
    for x in (student.float(), teacher.float()):
        height, width = x.shape[-2:]
        if height * width > max_tokens:
            shrink = (max_tokens / (height * width)) ** 0.5
            x = F.adaptive_avg_pool2d(x, (max(1, int(height * shrink)), max(1, int(width * shrink))))
        tokens = F.normalize(x.flatten(2), dim=1)
        with torch.autocast(x.device.type, enabled=False):  # autocast would round the products to bf16
            grams.append(tokens.transpose(1, 2) @ tokens)
    return F.mse_loss(*grams)


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Refuses a word that is not among the allowed ones.

    Raises:
        ValueError: with what is allowed and the word that was probably meant.
    """
    if value not in allowed:
        near = get_close_matches(str(value), allowed, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name} is {value!r}; allowed are {', '.join(allowed)}{hint}")


def _same_shape(term: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"the {term} term compares maps of one shape, not {tuple(student.shape)} (student) with "
            f"{tuple(teacher.shape)} (teacher): take a module teacher of the student's sizes"
        )
