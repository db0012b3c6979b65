"""Runs and resumes a comparison: several recipes over several seeds, a run folder each."""

import os
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

from riformer.config import Recipe, check
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


def run_ladder(
    recipes: Sequence[Recipe], seeds: Sequence[int], folder: str | Path, progress: Progress, jobs: int = 1
) -> list[Run]:
    """Every recipe with every seed, in `folder`/NAME-seedN. Interrupted, the same call goes on where it was.

    With `jobs` above 1, so many trainings run side by side and share the processor's cores. Evaluation, which also
    measures speed, comes after all trainings and one by one.

    Raises:
        ValueError: a recipe that contradicts itself; before anything runs.
    """
    for recipe in recipes:
        check(recipe)
    todo = [
        (replace(recipe, seed=seed), Path(folder) / f"{recipe.name}-seed{seed}") for seed in seeds for recipe in recipes
    ]
    if jobs > 1:
        _train_side_by_side(todo, progress, jobs)
    return [run_recipe(recipe, path, progress) for recipe, path in todo]


def _train_side_by_side(todo: list[tuple[Recipe, Path]], progress: Progress, jobs: int) -> None:
    """Each training in a process of its own, `jobs` at a time, with its share of the cores.

    Their progress comes through a queue. When a training fails, quietly, no more are begun: trying it again says why.
    """
    spawn = get_context("spawn")
    lines = spawn.Queue()
    threads = max(1, (os.cpu_count() or 1) // jobs)
    waiting = list(todo)
    running: list[BaseProcess] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(spawn.Process(target=_train_one, args=(*waiting.pop(0), lines, threads)))
                running[-1].start()
            with suppress(Empty):
                progress(lines.get(timeout=0.1))
            if any(process.exitcode for process in running):
                waiting.clear()
            if lines.empty():
                running = [process for process in running if process.is_alive()]
    finally:
        for process in running:
            process.terminate()  # it saves its state and ends
            process.join()


def _train_one(recipe: Recipe, path: Path, lines: Queue, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        train(recipe, path, lines.put)
    except (KeyboardInterrupt, ValueError, RuntimeError, OSError):
        sys.exit(1)
