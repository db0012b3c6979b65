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
Recall = Callable[[Callable[[], Tensor]], Tensor]


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
        asks, imitates = {"hard", "soft"} & self.weights.keys(), set(IMITATION) & self.weights.keys()
        if asks and logit_teacher is None:
            raise ValueError(f"the terms {sorted(asks)} need a logit teacher")
        if imitates and imitation is None:
            raise ValueError(f"the terms {sorted(imitates)} need a module teacher")
        self.logit_teacher = logit_teacher if asks else None
        self.imitation = imitation if imitates else None
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
        """`loss`, the student's logits as `output`, and every active term unweighted; `scale` is that of imitation.

        `recall` stands between the objective and its logit teacher: it is given a function that runs the teacher on
        this batch, and returns the teacher's logits, without calling it where it knows them.
        """
        imitated = self.imitation if scale > 0 else None
        if imitated:
            imitated.forget()
        output = self.student(images)
        ran: list[Teacher | Ensemble] = []

        def run(teacher: Teacher | Ensemble) -> Tensor:
            ran.append(teacher)
            return teacher(images)

        teacher_logits = None
        if self.logit_teacher:
            ask = partial(run, self.logit_teacher)
            teacher_logits = recall(ask).to(images.device) if recall else ask()
        terms = {
            name: term(output, targets if name == "label" else teacher_logits)
            for name, term in self.logit_terms.items()
            if name in self.weights
        }
        if imitated:
            if not imitated.teacher_ran:
                run(imitated.teacher)
            terms |= imitated.terms()
        self.teacher_batches += bool(ran)
        loss = sum(self.weights[name] * (scale if name in IMITATION else 1) * term for name, term in terms.items())
        return {"loss": loss, "output": output, **terms}
