"""What takes part in a training, and one step of its optimiser; the loop and the dry run share both."""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from math import isfinite
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from riformer.config import Recipe
from riformer.data.batches import TrainPart
from riformer.data.dataset import Dataset
from riformer.distill.imitation import Imitation
from riformer.distill.objective import Objective
from riformer.distill.teachers import Ensemble, Teacher, open_model
from riformer.model.start import start_at, start_from
from riformer.train.build import build_imitation, build_model, build_objective, build_optimizer, build_teachers
from riformer.train.distributed import average_gradients, gather, mean_over_processes
from riformer.train.run import Run

logger = logging.getLogger(__name__)

LogitLookup = Callable[[Tensor, Callable[[], Tensor]], Tensor]
"""(indices of images, function that runs the teacher on them) -> the teacher's logits on these images."""


@dataclass
class Training:
    """The networks of a training, its objective and its optimiser.

    Attributes:
        model: the student, plain.
        student: the student as it is called, perhaps compiled and wrapped by DistributedDataParallel.
        projections: 1x1 convolutions of imitation, trained with the student.
        ema: the moving average of the weights, if the recipe wants one.
    """

    recipe: Recipe
    device: torch.device
    model: nn.Module
    student: nn.Module
    logit_teacher: Teacher | Ensemble | None
    module_teacher: Teacher | None
    imitation: Imitation | None
    projections: nn.Module
    objective: Objective
    optimizer: Optimizer
    ema: ModelEmaV3 | None

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated and kept: the moving average where there is one."""
        return self.ema.module if self.ema else self.model

    def parameters(self) -> list[nn.Parameter]:
        """All parameters that the optimiser updates."""
        return [*self.model.parameters(), *self.projections.parameters()]

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs of the networks and the optimiser."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"projections": self.projections.state_dict()}
        return state | ({"ema": self.ema.module.state_dict()} if self.ema else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.projections.load_state_dict(state.get("projections", {}))
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])


def build(
    recipe: Recipe,
    run: Run,
    data: Dataset,
    device: torch.device,
    world_size: int = 1,
    *,
    start: bool = True,
    initialise: Callable[[nn.Module, Teacher | None], None] = lambda model, module_teacher: None,
    opened: Callable[[str, int], nn.Module] = open_model,
) -> Training:
    """Everything that takes part in the recipe's training.

    Args:
        run: in whose folder the own teacher lies.
        start: load the weights that training starts from; a resume has its own.
        initialise: called with student and module teacher, once their weights are there, before the optimiser is made.
        opened: opens the models that the recipe names.

    Raises:
        ValueError: a network that cannot be built, a teacher that cannot be read or does not fit.
    """
    optim = recipe.optim
    model = build_model(recipe, data).to(device)
    if recipe.model.start and start:
        start_at(model, opened(recipe.model.start, recipe.data.img_size), recipe.model.start)
    logit_teacher, module_teacher = build_teachers(recipe, run, data.classes, device, opened)
    if recipe.distill.start_from_teacher and module_teacher:
        start_from(model, module_teacher.model)
    imitation = build_imitation(recipe, model, module_teacher)
    projections = imitation.projections if imitation else nn.ModuleDict()
    initialise(model, module_teacher)
    optimizer = build_optimizer(recipe, model, projections)
    ema = ModelEmaV3(model, decay=optim.ema_decay, use_warmup=True) if optim.ema_decay else None
    student = torch.compile(model) if optim.compile else model
    if world_size > 1:
        student = DistributedDataParallel(student, device_ids=[device.index] if device.type == "cuda" else None)
    objective = build_objective(recipe, student, logit_teacher, imitation)
    return Training(
        recipe, device, model, student, logit_teacher, module_teacher, imitation, projections, objective, optimizer, ema
    )


def step(
    training: Training, parts: Sequence[TrainPart], number: int, scale: float = 1.0, lookup: LogitLookup | None = None
) -> dict[str, Any]:
    """One update of the weights by the mean loss over the parts and all processes.

    A step whose loss or gradient is not finite changes nothing on any process: neither weights, nor buffers, nor the
    moving average. It is skipped and says so.

    Args:
        parts: images, targets and indices, as `TrainBatches` yields them.
        number: of this step, from 1; the warm-up of the moving average depends on it.
        scale: factor on the weights of imitation.
        lookup: stands between the objective and the logit teacher, for outputs that are kept.

    Returns:
        Every active term and `loss`, unweighted, and `top1` on the training images, each the mean over parts and
        processes; where the step was skipped, also `skipped`: the indices of its images.
    """
    buffers = [(buffer, buffer.clone()) for buffer in training.model.buffers()]
    terms = backward(training, parts, scale, lookup)
    skipped = terms.pop("finite_gradient") != 1.0 or not isfinite(terms["loss"])
    if skipped:
        for buffer, before in buffers:
            buffer.copy_(before)
    else:
        update(training, number)
    training.optimizer.zero_grad(set_to_none=True)
    if not skipped:
        return terms
    indices = chain.from_iterable(gather([int(index) for _, _, part in parts for index in part]))
    return {**terms, "skipped": list(indices)}


def backward(
    training: Training, parts: Sequence[TrainPart], scale: float = 1.0, lookup: LogitLookup | None = None
) -> dict[str, float]:
    """Gradients of the mean loss over the parts; each term's mean over parts and processes, see `step`.

    `finite_gradient` is 1 where the gradients of all processes are finite.

    Raises:
        RuntimeError: a part does not fit into the GPU's memory.
    """
    sums: dict[str, Tensor] = {}
    student, device = training.student, training.device
    for i, (images, targets, indices) in enumerate(parts):
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        last = i == len(parts) - 1
        no_sync = student.no_sync() if isinstance(student, DistributedDataParallel) and not last else nullcontext()
        try:
            with no_sync:
                with autocast(training.recipe.optim.precision, device):
                    terms = training.objective(images, targets, scale, partial(lookup, indices) if lookup else None)
                (terms["loss"] / len(parts)).backward()
        except torch.OutOfMemoryError as error:
            advice = "raise --optim.accumulation, or share the images among more processes"
            raise RuntimeError(f"{len(images)} images at once do not fit; {advice}: {error}") from error
        right = (terms.pop("output").argmax(1) == targets.argmax(1)).float().mean()
        for name, value in {**terms, "top1": 100 * right}.items():
            sums[name] = sums.get(name, torch.zeros((), device=device)) + value.detach() / len(parts)
    average_gradients(training.projections)  # which DistributedDataParallel does not hold
    gradients = [parameter.grad for parameter in training.parameters() if parameter.grad is not None]
    sums["finite_gradient"] = nn.utils.get_total_norm(gradients).isfinite().float()
    return dict(zip(sums, mean_over_processes(torch.stack(list(sums.values()))).tolist(), strict=True))


def update(training: Training, number: int) -> None:
    """Clips the gradients where the recipe says so, and updates weights and moving average."""
    if training.recipe.optim.clip_grad:
        nn.utils.clip_grad_norm_(training.parameters(), training.recipe.optim.clip_grad)
    training.optimizer.step()
    if training.ema:
        training.ema.update(training.model, number)


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """bf16 autocast, or none for fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
