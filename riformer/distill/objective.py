"""Student + teachers + weights -> named scalars: L = sum of weight * term (RIFormer, training paradigm)."""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from riformer.distill import losses
from riformer.distill.taps import tap, unwrapped
from riformer.distill.teachers import Teacher, match_blocks, mixer_name

IMITATION = ("block", "mixer", "relation")
TERMS = ("label", "hard", "soft", *IMITATION)


def imitation_scale(schedule: str, progress: float, phase: float = 0.5) -> float:
    """Factor on the imitation weights: constant, cosine (1 to 0), or first_phase (1 until `phase`, then 0).

    Choice: the paper does not say whether its weights change; all three are offered.
    """
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return float(schedule == "constant" or progress < phase)


class Objective:
    """Computes the loss of a batch; a context manager, because it taps the student and the module teacher meanwhile.

    Args:
        student: the model that learns, possibly wrapped by DDP or torch.compile (not yet called, if compiled).
        weights: weight of each term by name (label, hard, soft, block, mixer, relation); a weight of 0 skips the term.
        logit_teacher: needed by hard and soft.
        module_teacher: needed by block, mixer and relation. May be the same object as the logit teacher.

    Shape: images [N, 3, H, W], targets [N, K] probabilities -> scalars.

    Raises:
        ValueError: a term lacks its teacher, or teacher and student do not fit; before the first step.
    """

    def __init__(
        self,
        student: nn.Module,
        weights: dict[str, float],
        logit_teacher: Teacher | None = None,
        module_teacher: Teacher | None = None,
        temperature: float = 1.0,
        label_smoothing: float = 0.0,
        positions: str | Sequence[str] = "last",
        block_match: str = "normalised",
        relation_tokens: int = 196,
    ):
        self.student = student
        self.weights = {name: weight for name, weight in weights.items() if weight}
        self.logit_teacher = logit_teacher if {"hard", "soft"} & self.weights.keys() else None
        self.module_teacher = module_teacher if set(IMITATION) & self.weights.keys() else None
        for names, teacher, role in (
            (("hard", "soft"), self.logit_teacher, "logit"),
            (IMITATION, self.module_teacher, "module"),
        ):
            if teacher is None and set(names) & self.weights.keys():
                raise ValueError(f"the terms {sorted(set(names) & self.weights.keys())} need a {role} teacher")
        self.pairs = []
        if self.module_teacher:
            self.pairs = match_blocks(unwrapped(student), self.module_teacher.model, positions)
        self.logit_terms: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "label": lambda logits, targets: losses.label(logits, targets, label_smoothing),
            "hard": losses.hard,
            "soft": lambda logits, teacher: losses.soft(logits, teacher, temperature),
        }
        self.module_terms: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "block": lambda student, teacher: losses.block(student, teacher, block_match),
            "mixer": losses.mixer,
            "relation": lambda student, teacher: losses.relation(student, teacher, relation_tokens),
        }
        self._taps = ExitStack()

    def __enter__(self) -> "Objective":
        self._own, self._theirs = {}, {}
        if self.module_teacher:
            student, teacher = unwrapped(self.student), self.module_teacher.model
            own = [name for block, _ in self.pairs for name in (block, mixer_name(student, block))]
            theirs = [name for _, block in self.pairs for name in (block, mixer_name(teacher, block))]
            self._own = self._taps.enter_context(tap(student, own))
            self._theirs = self._taps.enter_context(tap(teacher, theirs))
        return self

    def __exit__(self, *error: object) -> None:
        self._taps.close()

    def __call__(self, images: Tensor, targets: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        """`loss`, the student's logits as `output`, and every active term unweighted; `scale` is that of imitation."""
        self._own.clear()
        output = self.student(images)
        imitated = self.module_teacher if scale > 0 else None
        if imitated and not self._own:
            raise RuntimeError("the student ran but its modules were not seen: tap it before its first compiled call")
        teacher_logits = self.logit_teacher(images) if self.logit_teacher else None
        terms = {
            name: term(output, targets if name == "label" else teacher_logits)
            for name, term in self.logit_terms.items()
            if name in self.weights
        }
        if imitated:
            if imitated is not self.logit_teacher:
                imitated(images)
            terms |= self._imitation(imitated.model)
        loss = sum(self.weights[name] * (scale if name in IMITATION else 1) * term for name, term in terms.items())
        return {"loss": loss, "output": output, **terms}

    def _imitation(self, teacher: nn.Module) -> dict[str, Tensor]:
        """Choice: the mean over the positions, so that a weight means the same with one position as with many."""
        student = unwrapped(self.student)
        terms = {}
        for name, term in self.module_terms.items():
            if name in self.weights:
                pairs = self.pairs
                if name == "mixer":
                    pairs = [(mixer_name(student, own), mixer_name(teacher, theirs)) for own, theirs in pairs]
                terms[name] = torch.stack([term(self._own[own], self._theirs[theirs]) for own, theirs in pairs]).mean()
        return terms
