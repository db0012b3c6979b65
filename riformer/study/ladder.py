"""Runs and resumes a comparison: several recipes over several seeds, a run folder each.

Runs whose own teachers are the same training share it: the first of them trains it, the others take a copy. So does a
run that is itself this training, as the rung `mixer` is.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
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

Progress = Callable[[dict[str, Any]], None]


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

    Raises:
        ValueError: a recipe that contradicts itself; before anything runs.
    """
    for recipe in recipes:
        check(recipe)
    todo = [(recipe, Path(folder) / f"{recipe.name}-seed{recipe.seed}") for recipe in recipes]
    lenders = _lenders(todo)

    def missing() -> list[tuple[Recipe, Path]]:
        """What is not yet trained, who lends before who borrows."""
        return sorted((one for one in todo if not Run(one[1]).is_trained()), key=lambda one: one[1] in lenders)

    for recipe, path in todo:
        if Run(path).is_trained():
            Run(path).begin(recipe, world_size=1)  # which refuses a run of another recipe
    threads = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else torch.get_num_threads()
    if jobs > 1:
        _train_side_by_side(missing(), lenders, progress, jobs, threads)
    with _num_threads(threads):  # on which the bits of a training depend
        for recipe, path in missing():
            _borrow_teacher(recipe, path, lenders.get(path))
            train(recipe, path, progress)
    runs = [Run(path) for _, path in todo]
    for run in runs:
        if run.read("evaluation.json") is None:
            evaluate_run(run.path)
    return runs


@contextmanager
def _num_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _lenders(todo: list[tuple[Recipe, Path]]) -> dict[Path, tuple[Path, Path]]:
    """For each run that need not train its own teacher, the run that does and the folder in which it then lies."""
    first = {repr(replace(recipe, name="")): (path, path) for recipe, path in todo}
    lenders = {}
    for recipe, path in todo:
        if recipe.distill.trains_teacher:
            training = repr(replace(teacher_recipe(recipe), name=""))
            lender = first.setdefault(training, (path, path / "teacher"))
            if lender[0] != path:
                lenders[path] = lender
    return lenders


def _borrow_teacher(recipe: Recipe, path: Path, lender: tuple[Path, Path] | None) -> None:
    """Puts a copy of the lender's finished training into a run that has not begun a teacher; the names alone differ."""
    teacher = path / "teacher"
    if lender is None or teacher.exists():
        return
    Run(path).begin(recipe, world_size=1)
    with replace_folder(teacher) as beside:
        shutil.copytree(lender[1], beside, dirs_exist_ok=True, ignore=shutil.ignore_patterns("evaluation.json"))
        Run(beside).write("recipe.json", to_dict(teacher_recipe(recipe)))


def _train_side_by_side(
    todo: list[tuple[Recipe, Path]],
    lenders: dict[Path, tuple[Path, Path]],
    progress: Progress,
    jobs: int,
    threads: int,
) -> None:
    """Each training in a process of its own, `jobs` at a time, with its share of the cores.

    Who borrows a teacher waits until the lender has finished. Their progress comes through a queue. When a training
    fails, quietly, no more are begun: trying it again says why.
    """
    spawn = get_context("spawn")
    lines = spawn.Queue()
    waiting = list(todo)
    running: dict[Path, BaseProcess] = {}
    before = signal.getsignal(signal.SIGTERM)
    with suppress(ValueError):  # not the main thread: signals go where they go
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the trainings are ended with this one
    try:
        while waiting or running:
            busy = {*running, *(path for _, path in waiting)}
            ready = [one for one in waiting if lenders.get(one[1], (None,))[0] not in busy]
            for recipe, path in ready[: jobs - len(running)]:
                waiting.remove((recipe, path))
                arguments = (recipe, path, lenders.get(path), lines, threads)
                running[path] = spawn.Process(target=_train_one, args=arguments)
                running[path].start()
            with suppress(Empty):
                progress(lines.get(timeout=0.1))
            if any(process.exitcode for process in running.values()):
                waiting.clear()
            if lines.empty():
                running = {path: process for path, process in running.items() if process.is_alive()}
    finally:
        for process in running.values():
            process.terminate()  # it saves its state and ends
            process.join()
        with suppress(ValueError):
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _train_one(recipe: Recipe, path: Path, lender: tuple[Path, Path] | None, lines: Queue, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        _borrow_teacher(recipe, path, lender)
        train(recipe, path, lines.put)
    except (KeyboardInterrupt, ValueError, RuntimeError, OSError):
        sys.exit(1)
