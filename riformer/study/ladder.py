"""Runs and resumes a comparison: several recipes over several seeds, a run folder each."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from multiprocessing import Manager, get_context
from pathlib import Path
from queue import Empty, Queue
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

    With `jobs` above 1, so many trainings share the processor side by side, which small networks use better than one
    training can. Evaluation, which also measures speed, comes after all trainings and one by one.

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
    """Each training in one of `jobs` processes with its share of the cores; their progress comes through a queue."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with Manager() as manager, ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        lines: Queue = manager.Queue()
        futures = [pool.submit(_train_one, recipe, path, lines, threads) for recipe, path in todo]
        while not (all(future.done() for future in futures) and lines.empty()):
            with suppress(Empty):
                progress(lines.get(timeout=0.1))
        for future in futures:
            future.result()


def _train_one(recipe: Recipe, path: Path, lines: Queue, threads: int) -> None:
    torch.set_num_threads(threads)
    train(recipe, path, lines.put)
