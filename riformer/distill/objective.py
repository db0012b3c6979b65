"""Student + teachers + weights -> named scalars: L = sum of weight * term (RIFormer, training paradigm)."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from torch import Tensor, nn

from riformer.distill import losses
from riformer.distill.imitation import TERMS as IMITATION
from riformer.distill.imitation import Imitation
from riformer.distill.teachers import Ensemble, Teacher

TERMS = ("label", "hard", "soft", *IMITATION)
SCHEDULES = ("constant", "cosine", "first_phase")
Recall = Callable[[Callable[[], Tensor]], Tensor]


def imitation_scale(schedule: str, progress: float, phase: float = 0.5) -> float:
    """Factor on the imitation weights: constant (1), cosine (from 1 to 0), or first_phase (1 until `phase`, then 0).

    `progress` and `phase` are shares of the training, from 0 to 1.

    Choice: all three are offered because the paper does not say whether its weights change.

    Raises:
        ValueError: an unknown schedule.
    """
    losses.check_choice("schedule", schedule, SCHEDULES)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return float(schedule == "constant" or progress < phase)


class Objective:
    """Computes the loss of a batch; a context manager, inside which the student and the module teacher are tapped.

    Args:
        student: the model that learns, possibly wrapped by DDP or torch.compile (not yet called, if compiled).
        weights: weight of each term by name (label, hard, soft, block, mixer, relation); a weight of 0 skips the term.
        logit_teacher: needed by hard and soft.
        imitation: student and module teacher, needed by block, mixer and relation. The module teacher may be the logit
            teacher, or one of them; it then runs once.

    `teacher_batches` counts the batches for which a teacher ran.

    Shape: images [N, 3, H, W], targets [N, K] probabilities -> scalars.

    Raises:
        ValueError: a term lacks its teacher; before the first step.
    """

    def __init__(
        self,
        student: nn.Module,
        weights: dict[str, float],
        logit_teacher: Teacher | Ensemble | None = None,
        imitation: Imitation | None = None,
        temperature: float = 1.0,
        label_smoothing: float = 0.0,
    ):
        self.student = student
        self.weights = {name: weight for name, weight in weights.items() if weight}
        from_logits, from_modules = {"hard", "soft"} & self.weights.keys(), set(IMITATION) & self.weights.keys()
        if from_logits and logit_teacher is None:
            raise ValueError(f"the terms {sorted(from_logits)} need a logit teacher")
        if from_modules and imitation is None:
            raise ValueError(f"the terms {sorted(from_modules)} need a module teacher")
        self.logit_teacher = logit_teacher if from_logits else None
        self.imitation = imitation if from_modules else None
        self.teacher_batches = 0
        self.logit_terms: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "label": lambda logits, targets: losses.label(logits, targets, label_smoothing),
            "hard": losses.hard,
            "soft": lambda logits, teacher: losses.soft(logits, teacher, temperature),
        }
        self._taps = ExitStack()

    def __enter__(self) -> "Objective":
        if self.imitation:
            self._taps.enter_context(self.imitation.tapped())
        return self

    def __exit__(self, *error: object) -> None:
        self._taps.close()

    def __call__(
        self, images: Tensor, targets: Tensor, scale: float = 1.0, recall: Recall | None = None
    ) -> dict[str, Tensor]:
        """`loss`, the student's logits as `output`, and every active term before it is weighted.

        Args:
            images: of this batch.
            targets: of this batch.
            scale: factor on the weights of the imitation terms; 0 skips them.
            recall: returns the logit teacher's logits for this batch. It is given a function that runs the teacher, and
                need not call it where it has kept the logits.
        """
        imitation = self.imitation if scale > 0 else None
        if imitation:
            imitation.forget()
        output = self.student(images)
        ran: list[Teacher | Ensemble] = []

        def run(teacher: Teacher | Ensemble) -> Tensor:
            ran.append(teacher)
            return teacher(images)

        teacher_logits = None
        if self.logit_teacher:
            run_teacher = partial(run, self.logit_teacher)
            teacher_logits = recall(run_teacher).to(images.device) if recall else run_teacher()
        terms = {
            name: term(output, targets if name == "label" else teacher_logits)
            for name, term in self.logit_terms.items()
            if name in self.weights
        }
        if imitation:
            if not imitation.teacher_ran:
                run(imitation.teacher)
            terms |= imitation.terms()
        self.teacher_batches += bool(ran)
        loss = sum(self.weights[name] * (scale if name in IMITATION else 1) * term for name, term in terms.items())
        return {"loss": loss, "output": output, **terms}
