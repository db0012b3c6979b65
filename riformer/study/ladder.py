"""Runs and resumes a comparison: several recipes over several seeds, a run folder each."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from riformer.config import Recipe, check
from riformer.study.evaluation import evaluate_run
from riformer.train.loop import train
from riformer.train.run import Run


def run_recipe(recipe: Recipe, folder: str | Path, progress: Callable[[dict[str, Any]], None]) -> Run:
    """Trains (or goes on with) a run and evaluates it once it is finished; finished work is not done again."""
    run = train(recipe, folder, progress)
    if run.read("evaluation.json") is None:
        evaluate_run(run.path)
    return run


def run_ladder(
    recipes: Sequence[Recipe], seeds: Sequence[int], folder: str | Path, progress: Callable[[dict[str, Any]], None]
) -> list[Run]:
    """Every recipe with every seed, in `folder`/NAME-seedN. Interrupted, the same call goes on where it was.

    Raises:
        ValueError: a recipe that contradicts itself; before anything runs.
    """
    for recipe in recipes:
        check(recipe)
    return [
        run_recipe(replace(recipe, seed=seed), Path(folder) / f"{recipe.name}-seed{seed}", progress)
        for seed in seeds
        for recipe in recipes
    ]
