"""One training, from a recipe to a run folder: a function of named sections, one process or many (torchrun)."""

import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import chain, islice
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from riformer.config import Recipe, check
from riformer.data.batches import TrainBatches, TrainPart, eval_batches, preprocessing
from riformer.data.dataset import open_dataset
from riformer.distill.imitation import fit_affines
from riformer.distill.objective import Objective, imitation_scale
from riformer.distill.teachers import open_model
from riformer.model.weights import save, start_at, start_from
from riformer.recipes import teacher_recipe
from riformer.train.build import (
    build_imitation,
    build_model,
    build_objective,
    build_optimizer,
    build_teachers,
    try_on_paper,
)
from riformer.train.distributed import (
    any_process,
    average_gradients,
    barrier,
    gather,
    main_process_first,
    mean_over_processes,
    process_group,
    share_buffers,
)
from riformer.train.evaluate import evaluate
from riformer.train.outputs import origin, teacher_cache
from riformer.train.run import Run

Recall = Callable[[Tensor, Callable[[], Tensor]], Tensor]  # indices of images and the teacher's run on them -> logits
SAVE_SECONDS = 120  # a kill loses at most this much work, or an epoch if that is shorter


def train(recipe: Recipe, folder: str | Path, progress: Callable[[dict[str, Any]], None] = lambda line: None) -> Run:
    """Trains, or goes on with, the run in `folder`; a finished run is left as it is.

    A run that was interrupted at any moment goes on exactly: the losses of its remaining steps are those of a run that
    was never interrupted, bit for bit, on the same machine with as many processes and threads. Under torchrun every
    process calls this. A teacher named "own" is trained first, as a run of its own in `folder`/teacher.

    Args:
        recipe: the whole configuration.
        folder: the run folder, made or resumed.
        progress: called with each line of the metrics, the run and its name added; a `start` line comes first.

    Raises:
        ValueError: a recipe that contradicts itself or the data, or a folder with another run, or one that another
            process trains in.
        KeyboardInterrupt: after an interrupt or termination signal, when the state is saved.
        RuntimeError: the loss is no longer finite.
    """
    check(recipe)
    if recipe.distill.trains_teacher:
        check(teacher_recipe(recipe))
    with process_group() as (rank, world_size, device), ExitStack() as locks:
        return _train(recipe, Run(folder), progress, rank, world_size, device, locks)


def _train(
    recipe: Recipe, run: Run, progress: Callable, rank: int, world_size: int, device: torch.device, locks: ExitStack
) -> Run:
    optim, distill = recipe.optim, recipe.distill
    main = rank == 0

    # run folder and data: the main process first, which also scans the images and records their split
    with main_process_first(rank):
        if main:
            locks.enter_context(run.locked())
            run.begin(recipe, world_size)
        record = run.read("data.json")
        data = open_dataset(recipe.data, recipe.seed, record)
        if main and record is None:
            run.write("data.json", data.record())
    cache = teacher_cache(recipe, run, data)
    if distill.trains_teacher:
        own = Run(run.path / "teacher")
        if cache:
            cache.check_space()
        if not own.metrics():
            try_on_paper(recipe, data)
        _train(teacher_recipe(recipe), own, progress, rank, world_size, device, locks)

    # model
    state = run.load_state()
    torch.manual_seed(recipe.seed)
    model = build_model(recipe, data).to(device)
    if recipe.model.start and not state:
        start_at(model, open_model(recipe.model.start, recipe.data.img_size), recipe.model.start)

    # teachers
    logit_teacher, module_teacher = build_teachers(recipe, run, data.classes, device)
    if distill.start_from_teacher and module_teacher:
        start_from(model, module_teacher.model)
    imitation = build_imitation(recipe, model, module_teacher)
    projections = imitation.projections if imitation else nn.ModuleDict()

    # optimiser
    batches = TrainBatches(
        data.splits["train"], len(data.classes), recipe.data, recipe.augment, recipe.seed,
        optim.batch_size, optim.accumulation, rank, world_size, distill.cache_augmentations, device,
    )  # fmt: skip
    num_steps = optim.epochs * batches.steps_per_epoch
    warmup_steps = min(round(optim.warmup_epochs * batches.steps_per_epoch), num_steps - 1)
    if distill.fit_affine_batches and module_teacher and not state:
        first = chain.from_iterable(islice(batches.epoch(0), distill.fit_affine_batches))
        fit_affines(model, module_teacher, (images.to(device) for images, _, _ in first), mean_over_processes)
    optimizer = build_optimizer(recipe, model, projections)
    schedule = CosineLRScheduler(
        optimizer, t_initial=num_steps - warmup_steps, lr_min=optim.min_lr, warmup_t=warmup_steps,
        warmup_lr_init=optim.lr / max(1, warmup_steps), warmup_prefix=True, t_in_epochs=False,
    )  # fmt: skip
    ema = ModelEmaV3(model, decay=optim.ema_decay, use_warmup=True) if optim.ema_decay else None

    # resume
    torch.manual_seed(recipe.seed * 1000 + rank)
    step, best = 0, -1.0
    if state:
        if state["world_size"] != world_size:
            raise ValueError(f"{run.path} was begun with {state['world_size']} processes; resume it with as many")
        step, best = state["step"], state["best"]
        model.load_state_dict(state["model"])
        projections.load_state_dict(state.get("projections", {}))
        optimizer.load_state_dict(state["optimizer"])
        if ema:
            ema.module.load_state_dict(state["ema"])
        _set_rng_state(state["rng"][rank])
    if main:
        run.cut_metrics(step)
        if step < num_steps:  # an evaluation of what it was so far
            (run.path / "evaluation.json").unlink(missing_ok=True)

    def tell(line: dict[str, Any]) -> None:
        progress({"run": str(run.path), "name": recipe.name, "num_steps": num_steps, **line})

    pairs, outputs = imitation.describe() if imitation else [], cache.describe() if cache else ""
    tell({"kind": "start", "step": step, "pairs": pairs, "teacher_outputs": outputs})

    # teacher outputs that are kept, their size told before they are made
    if cache and logit_teacher and step < num_steps:
        with main_process_first(rank):
            if main:
                cache.create(origin(recipe, data, logit_teacher))
            cache.open()

    # objective
    student = torch.compile(model) if optim.compile else model
    if world_size > 1:
        student = DistributedDataParallel(student, device_ids=[device.index] if device.type == "cuda" else None)
    objective = build_objective(recipe, student, logit_teacher, imitation)

    def save_state() -> None:
        rng = gather(_rng_state(device))
        if main and cache:
            cache.flush()  # which covers what the other processes have written until they gathered
        if main:
            states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            states |= {"projections": projections.state_dict()}
            states |= {"ema": ema.module.state_dict()} if ema else {}
            run.save_state({**states, "step": step, "best": best, "rng": rng, "world_size": world_size})

    # epochs
    with objective, _signals() as interrupted:
        saved_at = time.monotonic()
        for epoch in range(step // batches.steps_per_epoch, optim.epochs):
            epoch_began = time.monotonic()
            step_began = time.monotonic()
            taught = objective.taught
            recall = partial(cache.logits, epoch % distill.cache_augmentations) if cache else None
            model.train()
            for parts in batches.epoch(epoch, start_step=step % batches.steps_per_epoch):
                schedule.step_update(step)
                scale = imitation_scale(distill.schedule, step / num_steps, distill.phase)
                terms = _backward(objective, parts, scale, student, optim.precision, device, recall)
                if not isfinite(terms["loss"]):
                    raise RuntimeError(
                        f"the loss is not finite after step {step}: {terms}; lower optim.lr or set optim.clip_grad"
                    )
                average_gradients(projections)  # which stand outside of what DDP wraps
                if optim.clip_grad:
                    nn.utils.clip_grad_norm_(chain(model.parameters(), projections.parameters()), optim.clip_grad)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                step += 1
                if ema:
                    ema.update(model, step)
                line = {"kind": "step", "step": step, "epoch": epoch, "lr": optimizer.param_groups[0]["lr"], **terms}
                line["images_per_s"] = round(optim.batch_size / (time.monotonic() - step_began), 1)
                step_began = time.monotonic()
                if main:
                    run.log(line)
                tell(line)
                due = bool(interrupted) or (main and time.monotonic() - saved_at > SAVE_SECONDS)
                if any_process(due, device) and step % batches.steps_per_epoch:
                    save_state()
                    saved_at = time.monotonic()
                    if any_process(bool(interrupted), device):
                        raise KeyboardInterrupt

            # end of the epoch
            if recall and logit_teacher and epoch < distill.cache_augmentations:
                _remember(batches.left_out(epoch), logit_teacher, optim.precision, device, recall)
            kept = ema.module if ema else model
            share_buffers(kept)
            size = optim.batch_size // world_size // optim.accumulation
            val_batches = eval_batches(
                data.splits["val"], preprocessing(recipe.data), size, recipe.data.num_workers, rank, world_size
            )
            result = evaluate(kept, val_batches, len(data.classes), optim.precision)
            line = {
                "kind": "epoch", "epoch": epoch, "step": step, "val_top1": result.top1, "val_top5": result.top5,
                "val_loss": result.loss, "val_images": result.num_images,
                "seconds": round(time.monotonic() - epoch_began, 3),
            }  # fmt: skip
            if cache:
                line["teacher_batches"] = sum(gather(objective.taught - taught))
            if main:
                run.log(line)
                if result.top1 > best:
                    save(kept, run.path / "best")
            best = max(best, result.top1)
            save_state()
            saved_at = time.monotonic()
            tell(line)
            if any_process(bool(interrupted), device):
                raise KeyboardInterrupt
    barrier()
    return run


def _backward(
    objective: Objective,
    parts: list[TrainPart],
    scale: float,
    student: nn.Module,
    precision: str,
    device: torch.device,
    recall: Recall | None,
) -> dict[str, float]:
    """Gradients of the mean loss over the parts, and each term's mean over the parts and processes."""
    sums: dict[str, Tensor] = {}
    for i, (images, targets, indices) in enumerate(parts):
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        last = i == len(parts) - 1
        no_sync = student.no_sync() if isinstance(student, DistributedDataParallel) and not last else nullcontext()
        with no_sync:
            with _autocast(precision, device):
                terms = objective(images, targets, scale, partial(recall, indices) if recall else None)
            (terms["loss"] / len(parts)).backward()
        right = (terms.pop("output").argmax(1) == targets.argmax(1)).float().mean()
        for name, value in {**terms, "top1": 100 * right}.items():
            sums[name] = sums.get(name, torch.zeros((), device=device)) + value.detach() / len(parts)
    return dict(zip(sums, mean_over_processes(torch.stack(list(sums.values()))).tolist(), strict=True))


def _remember(
    parts: Iterable[TrainPart], teacher: nn.Module, precision: str, device: torch.device, recall: Recall
) -> None:
    """Keeps the teacher's outputs on images that this epoch leaves out, but a later one may take."""
    for images, _, indices in parts:
        with _autocast(precision, device):
            recall(indices, partial(teacher, images.to(device)))


def _autocast(precision: str, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying of them, so that the state can be saved; a second one kills."""
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, before[signal.Signals(number)])

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals go where they go
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _rng_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def _set_rng_state(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])
