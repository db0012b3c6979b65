"""Runs and resumes a comparison: several recipes over several seeds, a run folder each.

Runs whose own teachers are the same training share it: the first of them trains it, the others take a copy. So does a
run that is itself this training, as the rung `mixer` is.
"""

import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing import Queue, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import Empty
from typing import Any

import torch

from riformer.atomic import replace_folder
from riformer.config import Recipe, check, to_dict
from riformer.recipes import teacher_recipe
from riformer.study.evaluation import evaluate_run
from riformer.train.distributed import is_main_process
from riformer.train.loop import train
from riformer.train.run import Run

logger = logging.getLogger(__name__)

Progress = Callable[[dict[str, Any]], None]
Job = tuple[Recipe, Path]
Lenders = dict[Path, tuple[Path, Path]]
"""For each run that need not train its own teacher, the run that does and the folder in which the teacher then lies."""
ERRORS = (ValueError, RuntimeError, OSError, MemoryError)


def run_recipe(recipe: Recipe, folder: str | Path, progress: Progress) -> Run:
    """Trains (or goes on with) a run and evaluates it once it is finished; finished work is not done again."""
    run = train(recipe, folder, progress)
    if is_main_process() and run.read("evaluation.json") is None:
        evaluate_run(run.path)
    return run


def run_ladder(recipes: Sequence[Recipe], folder: str | Path, progress: Progress, jobs: int = 1) -> list[Run]:
    """Runs every recipe in `folder`/NAME-seedN. Interrupted, the same call goes on where it was.

    With `jobs` above 1, so many trainings run side by side and share the processor's cores. Evaluation, which also
    measures speed, comes after all trainings and one by one. A teacher that several runs have in common is trained once
    for each seed.

    A training that fails is logged at once. The others go on, except those that need its teacher.

    Raises:
        ValueError: `jobs` below 1, or a recipe that contradicts itself; before anything runs.
        RuntimeError: trainings failed; after all others have ended and are evaluated.
    """
    if jobs < 1:
        raise ValueError(f"jobs is {jobs}; it must be 1 or more")
    for recipe in recipes:
        check(recipe)
    todo = [(recipe, Path(folder) / f"{recipe.name}-seed{recipe.seed}") for recipe in recipes]
    lenders = _lenders(todo)
    for recipe, path in todo:
        if Run(path).is_trained():
            Run(path).begin(recipe, world_size=1)  # which refuses a run of another recipe
    missing = [one for one in todo if not Run(one[1]).is_trained()]
    missing.sort(key=lambda one: one[1] in lenders)  # those that lend a teacher come before those that borrow it
    if jobs > 1:
        failed = _train_side_by_side(missing, lenders, progress, jobs)
    else:
        failed = _train_one_by_one(missing, lenders, progress)
    runs = [Run(path) for _, path in todo if path not in failed]
    for run in runs:
        if run.read("evaluation.json") is None:
            evaluate_run(run.path)
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(todo)} trainings failed:\n"
            + "\n".join(f"  {path}: {message}" for path, message in failed.items())
            + "\nthe others are finished; the same call tries these again"
        )
    return runs


def _lenders(todo: list[Job]) -> Lenders:
    first = {repr(replace(recipe, name="")): (path, path) for recipe, path in todo}
    lenders: Lenders = {}
    for recipe, path in todo:
        if recipe.distill.trains_teacher:
            training = repr(replace(teacher_recipe(recipe), name=""))
            lender = first.setdefault(training, (path, path / "teacher"))
            if lender[0] != path:
                lenders[path] = lender
    return lenders


def _lacks_teacher(path: Path, lenders: Lenders, failed: dict[Path, str]) -> bool:
    """Whether a run has no teacher because the run that trains it failed before; then it is noted as failed too."""
    lender, teacher = lenders.get(path, (None, path))
    lacks = lender in failed and not (path / "teacher").exists() and not Run(teacher).is_trained()
    if lacks:
        _note_failure(failed, path, f"its teacher is that of {lender}, which failed")
    return lacks


def _borrow_teacher(recipe: Recipe, path: Path, lender: tuple[Path, Path] | None) -> None:
    """Puts a copy of the lender's finished training into a run that has not begun a teacher; the names alone differ."""
    teacher = path / "teacher"
    if lender is None or teacher.exists():
        return
    Run(path).begin(recipe, world_size=1)
    with replace_folder(teacher) as beside:
        shutil.copytree(lender[1], beside, dirs_exist_ok=True, ignore=shutil.ignore_patterns("evaluation.json"))
        Run(beside).write("recipe.json", to_dict(teacher_recipe(recipe)))


def _train_one_by_one(todo: list[Job], lenders: Lenders, progress: Progress) -> dict[Path, str]:
    """The failures, by run folder."""
    failed: dict[Path, str] = {}
    for recipe, path in todo:
        if _lacks_teacher(path, lenders, failed):
            continue
        try:
            _borrow_teacher(recipe, path, lenders.get(path))
            train(recipe, path, progress)
        except ERRORS as error:
            _note_failure(failed, path, _message(error))
    return failed


def _train_side_by_side(todo: list[Job], lenders: Lenders, progress: Progress, jobs: int) -> dict[Path, str]:
    """Each training in a process of its own, `jobs` at a time, with its share of the cores. Returns the failures.

    A training that borrows a teacher waits until the lender has finished. Progress comes through a queue.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    spawn = get_context("spawn")
    lines = spawn.Queue()
    waiting = list(todo)
    running: dict[Path, BaseProcess] = {}
    failed: dict[Path, str] = {}
    before = signal.getsignal(signal.SIGTERM)
    with suppress(ValueError):  # not the main thread: signals go where they go
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the trainings are ended with this one
    try:
        while waiting or running:
            busy = {*running, *(path for _, path in waiting)}
            ready = [one for one in waiting if lenders.get(one[1], (None,))[0] not in busy]
            for recipe, path in ready[: jobs - len(running)]:
                waiting.remove((recipe, path))
                if _lacks_teacher(path, lenders, failed):
                    continue
                arguments = (recipe, path, lenders.get(path), lines, threads)
                running[path] = spawn.Process(target=_train_one, args=arguments)
                running[path].start()
            ended = [path for path, process in running.items() if not process.is_alive()]
            with suppress(Empty):
                line = lines.get(timeout=0.1)
                if line["kind"] == "failed":
                    _note_failure(failed, line["path"], line["message"])
                else:
                    progress(line)
            if lines.empty():  # with the last lines of those that have ended
                for path in ended:
                    code = running.pop(path).exitcode
                    if code and path not in failed:
                        _note_failure(failed, path, f"its process ended with exit code {code}")
    finally:
        for process in running.values():
            process.terminate()  # it saves its state and ends
            process.join()
        with suppress(ValueError):
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
    return failed


def _train_one(recipe: Recipe, path: Path, lender: tuple[Path, Path] | None, lines: Queue, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        _borrow_teacher(recipe, path, lender)
        train(recipe, path, lines.put)
    except (*ERRORS, KeyboardInterrupt) as error:
        lines.put({"kind": "failed", "path": path, "message": _message(error)})
        sys.exit(1)


def _message(error: BaseException) -> str:
    return "interrupted" if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__


def _note_failure(failed: dict[Path, str], path: Path, message: str) -> None:
    failed[path] = message
    logger.error("%s failed, the other trainings go on: %s", path, message)
