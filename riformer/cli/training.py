"""Verbs that train and evaluate."""

import logging
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

from rich.table import Table
from torch import nn

from riformer.cli.models import open_model
from riformer.cli.options import console, errors, load_model, main_console, verb_parser
from riformer.cli.progress import TrainProgress
from riformer.cli.recipe import RecipeOptions
from riformer.cli.tables import print_evaluations, print_projections, print_runs
from riformer.config import DataConfig
from riformer.data.orders import read_class_names
from riformer.measure.dryrun import dry_run
from riformer.recipes import DEFAULT_RUNGS
from riformer.runtime.runner import AsModule
from riformer.study.evaluation import evaluate_model, evaluation
from riformer.study.ladder import run_ladder, run_recipe
from riformer.train.run import Run
from riformer_runtime.artifact import is_artifact
from riformer_runtime.cli.parsing import written
from riformer_runtime.cli.predict import chosen_runner
from riformer_runtime.walk import describe

logger = logging.getLogger(__name__)


def train(argv: list[str]) -> int:
    """Trains one network, and its own teacher first where the recipe says so; then evaluates it.

    The recipe gives every setting, and any of them can be overridden. The same command, given again, goes on exactly
    with an interrupted run. Several processes: torchrun --nproc-per-node N -m riformer train ...
    """
    settings = RecipeOptions("train", train, argv)
    parser = settings.parser
    dry_help = "build everything, time some steps on synthetic images and say what the training takes; write nothing"
    parser.add_argument("--dry-run", action="store_true", help=dry_help)
    parser.add_argument(
        "--rung", type=str, default="full", help="train this rung of a ladder, see `riformer list rungs`"
    )
    resume_help = "run folder to go on with, all settings as they were; --data.name says where moved data is now"
    parser.add_argument("--resume", type=str, help=resume_help)
    parser.add_argument("--out", type=str, help="run folder (default: runs/RECIPE-seedN)")
    options, recipe = settings.parse()
    (recipe,) = settings.on_rungs(recipe, [options.rung])
    if options.dry_run:
        with errors.activity() as show:
            projections = dry_run(recipe, show)
        print_projections(projections, console)
        return 0
    folder = Path(settings.resumed or options.out or f"runs/{recipe.name}-seed{recipe.seed}")
    with TrainProgress(main_console()) as progress:
        finished = run_recipe(recipe, folder, progress)
    print_runs([finished], main_console())
    return 0


def ladder(argv: list[str]) -> int:
    """Trains rungs of a comparison over several seeds, each in a run folder of its own, and prints them side by side.

    A rung changes one thing in the recipe, such as learning from labels alone; overrides apply to all rungs. The same
    command, given again, goes on where it stopped.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("a ladder runs in one process; give each of its trainings to torchrun by itself")
    settings = RecipeOptions("ladder", ladder, argv, without=("seed",))
    parser = settings.parser
    rungs_help = "what to compare, see `riformer list rungs`"
    parser.add_argument("--rungs", type=list[str], default=list(DEFAULT_RUNGS), help=rungs_help)
    budgets_help = (
        "how many times the recipe's epochs, those of its teacher too; several show what lasts (default: once)"
    )
    parser.add_argument("--budgets", type=list[int], default=[], help=budgets_help)
    parser.add_argument("--seeds", type=list[int], default=[0, 1, 2], help="seeds of each rung")
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side, each with its share of the cores")
    parser.add_argument("--out", type=str, help="folder of the run folders (default: runs/RECIPE)")
    options, recipe = settings.parse()
    for name in ("rungs", "seeds", "budgets"):
        values = getattr(options, name)
        if len(set(values)) < len(values):
            raise ValueError(f"--{name} {written(values)} names one twice")
    changed = settings.on_rungs(recipe, options.rungs, options.budgets)
    recipes = [replace(rung, seed=seed) for seed in options.seeds for rung in changed]
    with TrainProgress(main_console()) as progress:
        folder = Path(options.out or f"runs/{recipe.name}")
        finished = run_ladder(recipes, folder, progress, options.jobs)
    print_runs(finished, main_console())
    return 0


def evaluate(argv: list[str]) -> int:
    """Accuracy before and after the fuse.

    Of a run: on its own data, with its teacher, parity and speed; recorded in the run folder. Of any saved model, or
    with --data.name (--data for short): on the data given, with the model's own preprocessing and class names; of a
    folder of class folders without splits, on all its images, but for those that the model was trained on. What
    riformer export wrote is evaluated like a saved model, on the engine that predict takes.
    """
    argv = [re.sub(r"^--data(?==|$)", "--data.name", argument) for argument in argv]
    parser = verb_parser("eval", evaluate)
    model_help = "run folder, model folder, weights file, or what riformer export wrote"
    parser.add_argument("model", type=str, help=model_help)
    engine_help = "native, onnxruntime and so on, of what riformer export wrote (default: the fastest)"
    parser.add_argument("--engine", type=str, default="auto", help=engine_help)
    parser.add_argument("--precision", type=str, default="", help="fp32, bf16, int8 and so on, likewise")
    split_help = "train, val or test (default: test where there is one)"
    parser.add_argument("--split", type=str, default="", help=split_help)
    for name in ("name", "root", "val_fraction", "split_seed", "on_bad", "num_workers"):
        default = "" if name == "name" else getattr(DataConfig(), name)
        parser.add_argument(f"--data.{name}", type=get_type_hints(DataConfig)[name], default=default, help="see train")
    classes_help = (
        "text file with the classes of a model that carries no names: one a line, in the order of its outputs"
    )
    parser.add_argument("--classes", type=str, default="", help=classes_help)
    options = parser.parse_args(argv)
    path, run = Path(options.model), Run(options.model)
    is_run = (path / "recipe.json").is_file()
    recipe = run.recipe() if is_run else None
    if recipe and not options.data.name:
        if ignored := [argument for argument in argv if argument.startswith(("--data.", "--classes"))]:
            raise ValueError(
                f"{path} is evaluated on its own data, which {' '.join(ignored)} would change; add --data.name"
            )
        if not options.split:
            if left_out := (run.read("data.json") or {}).get("left_out"):
                errors.print(f"{recipe.data.name}: {describe(left_out)}", soft_wrap=True)
            measured = evaluation(path)
            print_evaluations({recipe.name: [measured]}, main_console())
            try:
                run.write("evaluation.json", measured)
            except OSError as error:  # the run may be read-only
                logger.warning("the evaluation is not recorded: %s", error)
            return 0
        data, origin = recipe.data, {"record": run.read("data.json")}
    elif recipe and options.data.name == recipe.data.name:  # of what it trained on, what it did not train on
        data = DataConfig(**vars(options.data))
        origin = {"record": run.read("data.json")}
    elif options.data.name:
        data, origin = DataConfig(**vars(options.data)), {}
    else:
        what = "is not a run folder, so it names no data: give --data.name" if path.exists() else "is not there"
        raise ValueError(f"{path} {what}")
    if is_artifact(path):
        model: nn.Module = AsModule(chosen_runner(str(path), open_model, options.engine, options.precision))
    elif options.engine != "auto" or options.precision:
        raise ValueError(f"--engine and --precision choose among what riformer export wrote, and {path} is none of it")
    else:
        model = load_model(path)
    table = Table("form", "top-1 %", "top-5 %", "loss", "images", title=f"{path} on {data.name}")
    classes = read_class_names(options.classes, "--classes")
    for form, result in evaluate_model(model, data, options.split, classes=classes, **origin).items():
        table.add_row(form, f"{result.top1:.2f}", f"{result.top5:.2f}", f"{result.loss:.4f}", str(result.num_images))
    console.print(table)
    return 0
