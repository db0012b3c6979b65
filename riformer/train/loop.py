"""One training, from a recipe to a run folder: a function of named sections, one process or many (torchrun)."""

import logging
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from riformer.config import Recipe, check, to_dict
from riformer.data.batches import TrainBatches, TrainPart, eval_batches, preprocessing
from riformer.data.dataset import Dataset, open_dataset
from riformer.data.leaks import check_leaks
from riformer.data.workers import dead_workers_explained
from riformer.distill.imitation import fit_affines
from riformer.distill.objective import imitation_scale
from riformer.distill.teachers import Teacher
from riformer.model.weights import save
from riformer.recipes import teacher_recipe
from riformer.runtime.parity import full_float32
from riformer.train.build import check_before_teacher
from riformer.train.distributed import (
    any_process,
    barrier,
    gather,
    main_process_first,
    mean_over_processes,
    process_group,
    share_buffers,
)
from riformer.train.evaluate import evaluate
from riformer.train.inputs import check_teachers, order_start, record_inputs
from riformer.train.outputs import origin, teacher_cache
from riformer.train.run import Run
from riformer.train.step import LogitLookup, autocast, build, step

logger = logging.getLogger(__name__)

SAVE_SECONDS = 120  # a kill loses at most this much work, or an epoch if that is shorter
MAX_SKIPPED = 10  # steps in a row that are not finite before a training gives up

Group = tuple[int, int, torch.device]  # rank, number of processes, device


@dead_workers_explained()
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
        ValueError: a recipe that contradicts itself or the data, a folder with another run, or one that another process
            trains in; teachers that have changed since the run began, or that do not know the data's classes.
        KeyboardInterrupt: after an interrupt or termination signal, when the state is saved.
        RuntimeError: loss or gradient were not finite in `MAX_SKIPPED` steps in a row, or the weights are not; a worker
            died.
    """
    check(recipe)
    if recipe.distill.trains_teacher:
        check(teacher_recipe(recipe))
    with process_group() as group, ExitStack() as context:
        if recipe.optim.precision == "fp32":
            context.enter_context(full_float32())
        run = Run(folder)
        data = _open(recipe, run, group, context)
        if group[0] == 0:
            data.log()
        if not run.metrics():
            distill = recipe.distill
            trusted = {*distill.logit_teachers} - {distill.module_teacher} if distill.trust_teacher else set()
            check_leaks(data, [recipe.model.start, *distill.logit_teachers, distill.module_teacher], trusted)
        if recipe.distill.trains_teacher:
            teacher, teacher_run = teacher_recipe(recipe), Run(run.path / "teacher")
            if not teacher_run.metrics():
                check_before_teacher(recipe, run, data)
            _train(teacher, teacher_run, _open(teacher, teacher_run, group, context), group, progress)
        _train(recipe, run, data, group, progress)
        barrier()
    return run


def _open(recipe: Recipe, run: Run, group: Group, context: ExitStack) -> Dataset:
    """Locks the run folder and opens the data: first the main process, which scans the images and records the split."""
    rank, world_size, _ = group
    with main_process_first(rank):
        if rank == 0:
            context.enter_context(run.locked())
            run.begin(recipe, world_size, moving=True)
        record = run.read("data.json")
        data = open_dataset(recipe.data, record)
        if rank == 0 and (record is None or run.recipe().data != recipe.data):  # new, or moved with equal content
            run.write("data.json", data.record())
            run.write("recipe.json", to_dict(recipe))
    return data


def _train(recipe: Recipe, run: Run, data: Dataset, group: Group, progress: Callable) -> None:
    """One training in an open run folder, its own teacher trained already."""
    optim, distill = recipe.optim, recipe.distill
    rank, world_size, device = group
    main, num_classes = rank == 0, len(data.classes)
    state = run.load_state()
    if not state and run.is_trained():  # finished, and its states were deleted
        return
    if state and state["world_size"] != world_size:
        raise ValueError(f"{run.path} was begun with {state['world_size']} processes; resume it with as many")

    # data
    batches = TrainBatches(
        data.splits["train"], num_classes, recipe.data, recipe.augment, recipe.seed,
        optim.batch_size, optim.accumulation, rank, world_size, distill.cache_augmentations, device,
    )  # fmt: skip
    num_steps = optim.epochs * batches.steps_per_epoch

    # networks, objective, optimiser
    def initialise(model: nn.Module, module_teacher: Teacher | None) -> None:
        if not state:
            order_start(model, recipe, data, rank, world_size)
        if recipe.research.fit_affine_batches and module_teacher and not state:
            first = chain.from_iterable(islice(batches.epoch(0), recipe.research.fit_affine_batches))
            fit_affines(model, module_teacher, (images.to(device) for images, _, _ in first), mean_over_processes)

    torch.manual_seed(recipe.seed)
    training = build(recipe, run, data, device, world_size, start=not state, initialise=initialise)
    warmup_steps = min(round(optim.warmup_epochs * batches.steps_per_epoch), num_steps - 1)
    schedule = CosineLRScheduler(
        training.optimizer, t_initial=num_steps - warmup_steps, lr_min=optim.min_lr, warmup_t=warmup_steps,
        warmup_lr_init=optim.lr / max(1, warmup_steps), warmup_prefix=True, t_in_epochs=False,
    )  # fmt: skip
    if main:
        record_inputs(run, training)

    # resume
    torch.manual_seed(recipe.seed * 1000 + rank)
    done, best, num_skipped = 0, -1.0, 0
    if state:
        done, best, num_skipped = state["step"], state["best"], state.get("num_skipped", 0)
        training.load_state_dict(state)
        _set_rng_state(state["rng"][rank])
    if main:
        run.cut_metrics(done)
        if done < num_steps:  # an evaluation of what it was so far
            (run.path / "evaluation.json").unlink(missing_ok=True)

    def report(line: dict[str, Any]) -> None:
        progress({"run": str(run.path), "name": recipe.name, "num_steps": num_steps, **line})

    cache = teacher_cache(recipe, run, data)
    pairs = training.imitation.describe() if training.imitation else []
    report({"kind": "start", "step": done, "pairs": pairs, "teacher_outputs": cache.describe() if cache else ""})
    if not done:
        check_teachers(training, data, rank, world_size)

    # teacher outputs that are kept
    if cache and training.logit_teacher and done < num_steps:
        with main_process_first(rank):
            if main:
                cache.create(origin(recipe, data, training.logit_teacher))
            cache.open()

    def save_state() -> None:
        if not _is_finite(training.model, training.evaluated, training.projections):
            raise RuntimeError(
                f"the weights of {run.path} are not finite after step {done}, which is not saved; the state before it "
                f"is still there. Lower --optim.lr or set --optim.clip-grad, and train into another folder"
            )
        rng = gather(_rng_state(device))
        if main:
            if cache:
                cache.flush()  # which covers what the other processes have written until they gathered
            counts = {"step": done, "best": best, "num_skipped": num_skipped, "world_size": world_size}
            run.save_state({**training.state_dict(), **counts, "rng": rng}, finished=done == num_steps)

    # epochs
    with training.objective as objective, _signals() as interrupted:
        saved_at = time.monotonic()
        for epoch in range(done // batches.steps_per_epoch, optim.epochs):
            epoch_began = step_began = time.monotonic()
            teacher_batches = objective.teacher_batches
            lookup = partial(cache.logits, epoch % distill.cache_augmentations) if cache else None
            training.model.train()
            for parts in batches.epoch(epoch, start_step=done % batches.steps_per_epoch):
                schedule.step_update(done)
                scale = imitation_scale(distill.schedule, done / num_steps, recipe.research.phase)
                terms = step(training, parts, done + 1, scale, lookup)
                done += 1
                num_skipped = num_skipped + 1 if "skipped" in terms else 0
                lr = training.optimizer.param_groups[0]["lr"]
                line = {"kind": "step", "step": done, "epoch": epoch, "lr": lr, **terms}
                line["images_per_s"] = round(optim.batch_size / (time.monotonic() - step_began), 1)
                step_began = time.monotonic()
                if main:
                    run.log(line)
                report(line)
                if num_skipped:
                    _say_skipped(run, line, num_skipped, main)
                due = bool(interrupted) or (main and time.monotonic() - saved_at > SAVE_SECONDS)
                if any_process(due, device) and done % batches.steps_per_epoch:
                    save_state()
                    saved_at = time.monotonic()
                    if any_process(bool(interrupted), device):
                        raise KeyboardInterrupt

            # end of the epoch
            if lookup and training.logit_teacher and epoch < distill.cache_augmentations:
                _compute_outputs(batches.left_out(epoch), training.logit_teacher, optim.precision, device, lookup)
            share_buffers(training.evaluated)
            size = optim.batch_size // world_size // optim.accumulation
            val_batches = eval_batches(
                data.splits["val"], preprocessing(recipe.data), size, recipe.data.num_workers, rank, world_size
            )
            result = evaluate(training.evaluated, val_batches, num_classes, optim.precision)
            line = {
                "kind": "epoch", "epoch": epoch, "step": done, "val_top1": result.top1, "val_top5": result.top5,
                "val_loss": result.loss, "val_images": result.num_images,
                "seconds": round(time.monotonic() - epoch_began, 3),
            }  # fmt: skip
            if cache:
                line["teacher_batches"] = sum(gather(objective.teacher_batches - teacher_batches))
            if main:
                run.log(line)
                if not result.finite:
                    logger.warning("%s: %d images have logits that are not finite", run.path, result.num_nonfinite)
                elif result.top1 > best:
                    save(training.evaluated, run.path / "best")
            best = max(best, result.top1) if result.finite else best
            save_state()
            saved_at = time.monotonic()
            report(line)
            if any_process(bool(interrupted), device):
                raise KeyboardInterrupt


def _say_skipped(run: Run, line: dict[str, Any], num_skipped: int, main: bool) -> None:
    """Says that a step was skipped.

    Raises:
        RuntimeError: too many were, one after the other.
    """
    if main:
        what = "its loss" if line["loss"] != line["loss"] or abs(line["loss"]) == float("inf") else "its gradient"
        logger.warning("%s: step %d is skipped, %s is not finite", run.path, line["step"], what)
    if num_skipped >= MAX_SKIPPED:
        raise RuntimeError(
            f"loss or gradient of {run.path} were not finite in {num_skipped} steps in a row, the last of them step "
            f"{line['step']}: lower --optim.lr, set --optim.clip-grad, or look at the images named by `skipped` in "
            f"metrics.jsonl. The weights are as they were before the first of these steps"
        )


@torch.no_grad()
def _is_finite(*modules: nn.Module) -> bool:
    """Whether all parameters and buffers are finite."""
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    return not tensors or bool(torch.stack(torch._foreach_norm(tensors, float("inf"))).isfinite().all())


def _compute_outputs(
    parts: Iterable[TrainPart], teacher: nn.Module, precision: str, device: torch.device, lookup: LogitLookup
) -> None:
    """Keeps the teacher's outputs on images that this epoch leaves out, but a later one may take."""
    for images, _, indices in parts:
        with autocast(precision, device):
            lookup(indices, partial(teacher, images.to(device)))


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM, so that the state can be saved first; a second one ends the process."""
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
