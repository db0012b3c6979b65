"""`riformer VERB ...`: one short function a verb, each around one library function."""

import io
import json
import logging
import os
import sys
from argparse import ArgumentParser as PlainParser
from argparse import Namespace
from collections.abc import Callable
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_type_hints

import timm
import torch
from jsonargparse import ArgumentParser, set_parsing_settings
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import track
from rich.table import Column, Table
from torch import nn

from riformer.config import DataConfig, Recipe, from_dict
from riformer.deploy.parity import compare
from riformer.deploy.predict import Prediction, find_images, predict
from riformer.model.fuse import FORMS, deploy_form, mixing
from riformer.model.hub import check_repository, push
from riformer.model.metaformer import MetaFormer
from riformer.model.mixers import MIXERS
from riformer.model.weights import convert, load, save, save_pretrained
from riformer.progress import TrainProgress
from riformer.recipes import DEFAULT_RUNGS, RECIPES, RUNGS
from riformer.study.card import model_card
from riformer.study.cost import count_params
from riformer.study.dryrun import dry_run
from riformer.study.evaluation import describe, evaluate_model, evaluate_run
from riformer.study.ladder import run_ladder, run_recipe
from riformer.study.report import write_report
from riformer.tables import print_projections, print_runs
from riformer.train.data import DATASETS
from riformer.train.distributed import is_main_process
from riformer.train.run import Run

console = Console()
errors = Console(stderr=True)


def run(verb: str, argv: list[str]) -> int:
    """Runs a verb and returns the exit code. What the user can mend is one message, not a traceback."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    handler = RichHandler(console=errors, show_time=False, show_path=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("riformer").setLevel(logging.INFO)
    try:
        return VERBS[verb]([_underscored(argument) for argument in argv])
    except (ValueError, RuntimeError, OSError) as error:
        errors.print(f"[bold red]riformer {verb}:[/] ", end="")
        errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        errors.print(f"riformer {verb}: interrupted; the same command goes on where it stopped")
        return 130


def train(argv: list[str]) -> int:
    """Trains one network, and its own teacher first where the recipe says so; then evaluates it.

    The recipe gives every setting, and any of them can be overridden. The same command, given again, goes on exactly
    with an interrupted run. Several processes: torchrun --nproc-per-node N -m riformer train ...
    """
    given, base = _base_recipe(argv)
    parser = _recipe_parser(train, given)
    dry_help = (
        "build everything, time some steps on synthetic images and say what the training will take; write nothing"
    )
    parser.add_argument("--dry_run", action="store_true", help=dry_help)
    parser.add_argument("--rung", type=str, default="full", help="train this rung of a ladder, see `riformer list`")
    parser.add_argument("--resume", type=str, help="run folder to go on with, all settings as they were")
    parser.add_argument("--out", type=str, help="run folder (default: runs/RECIPE-seedN)")
    options, recipe = _parse_recipe(parser, base, argv)
    recipe = RUNGS[_known(options.rung, RUNGS, "rung")](recipe)
    if options.dry_run:
        with errors.status("") as status:
            projections = dry_run(recipe, status.update)
        print_projections(projections, console)
        return 0
    folder = Path(given.resume or options.out or f"runs/{recipe.name}-seed{recipe.seed}")
    with TrainProgress(_main_console()) as progress:
        finished = run_recipe(recipe, folder, progress)
    print_runs([finished], _main_console())
    return 0


def ladder(argv: list[str]) -> int:
    """Trains rungs of a comparison over several seeds, each in a run folder of its own, and prints them side by side.

    A rung changes one thing in the recipe, such as learning from labels alone; overrides apply to all rungs. The same
    command, given again, goes on where it stopped.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("a ladder runs in one process; give each of its trainings to torchrun by itself")
    given, base = _base_recipe(argv)
    parser = _recipe_parser(ladder, given)
    rungs_help = "what to compare, see `riformer list`"
    parser.add_argument("--rungs", type=list[str], default=list(DEFAULT_RUNGS), help=rungs_help)
    parser.add_argument("--seeds", type=list[int], default=[0, 1, 2], help="seeds of each rung")
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side, each with its share of the cores")
    parser.add_argument("--out", type=str, help="folder of the run folders (default: runs/RECIPE)")
    options, recipe = _parse_recipe(parser, base, argv)
    if len(set(options.seeds)) < len(options.seeds):
        raise ValueError(f"--seeds {options.seeds} has a seed twice")
    rungs = [RUNGS[_known(name, RUNGS, "rung")](recipe) for name in options.rungs]
    with TrainProgress(_main_console()) as progress:
        folder = Path(options.out or f"runs/{recipe.name}")
        finished = run_ladder(rungs, options.seeds, folder, progress, options.jobs)
    print_runs(finished, _main_console())
    return 0


def evaluate(argv: list[str]) -> int:
    """Accuracy before and after the fuse.

    Of a run: on its own data, with its teacher, parity and speed; recorded in the run folder. Of any saved model, or
    with --data.name: on the data given, with the model's own preprocessing and class names.
    """
    parser = _parser(evaluate)
    parser.add_argument("model", type=str, help="run folder, model folder or weights file")
    parser.add_argument("--split", type=str, default="", help="train, val or test (default: test where there is one)")
    for name in ("name", "root", "val_fraction", "on_bad", "num_workers"):
        default = "" if name == "name" else getattr(DataConfig(), name)
        parser.add_argument(f"--data.{name}", type=get_type_hints(DataConfig)[name], default=default, help="see train")
    options = parser.parse_args(argv)
    path, run = Path(options.model), Run(options.model)
    is_run = (path / "recipe.json").is_file()
    if is_run and not options.data.name:
        if ignored := [argument for argument in argv if argument.startswith("--data.")]:
            raise ValueError(
                f"{path} is evaluated on its own data, which {' '.join(ignored)} would change; add --data.name"
            )
        if not options.split:
            evaluate_run(path)
            print_runs([run], _main_console())
            return 0
        recipe = run.recipe()
        data, origin = recipe.data, {"seed": recipe.seed, "record": run.read("data.json")}
    elif options.data.name:
        data, origin = DataConfig(**vars(options.data)), {}
    else:
        raise ValueError(f"{path} is not a run folder, so it names no data: give --data.name")
    table = Table("form", "top-1 %", "top-5 %", "loss", "images", title=f"{path} on {data.name}")
    for form, result in evaluate_model(_load(path), data, options.split, **origin).items():
        table.add_row(form, f"{result.top1:.2f}", f"{result.top5:.2f}", f"{result.loss:.4f}", str(result.num_images))
    console.print(table)
    return 0


def fuse_verb(argv: list[str]) -> int:
    """Writes the deploy form of a run or model, after checking that it computes the same.

    The check compares logits on random images; a difference above --tolerance of the largest logit writes nothing.
    """
    parser = _parser(fuse_verb)
    parser.add_argument("source", type=str, help="run folder, model folder or weights file")
    parser.add_argument("destination", type=str, help="FILE.safetensors, or a folder that timm's local-dir: reads too")
    parser.add_argument("--fold", action="store_true", help="also fold the layer scales into norms and MLPs")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest difference allowed")
    options = parser.parse_args(argv)
    model = load(options.source)
    if mixers := mixing(model):
        raise ValueError(f"{options.source} mixes tokens ({mixers}), which nothing can merge away")
    fused, difference = _in_form("folded" if options.fold else "deploy", model, options.tolerance)
    save(fused, options.destination)
    console.print(f"{options.destination}: {_outcome(model, fused, difference)}", highlight=False)
    return 0


def predict_verb(argv: list[str]) -> int:
    """Labels images with a run or a saved model, fused first.

    Images that cannot be read are named, the others still labelled; the exit code is then 1.
    """
    parser = _parser(predict_verb)
    parser.add_argument("model", type=str, help="run folder, model folder or weights file")
    parser.add_argument(
        "images", type=str, nargs="+", help="image files, folders, or - for one image on standard input"
    )
    parser.add_argument("--top_k", type=int, default=1, help="classes to name for each image, the most probable first")
    parser.add_argument("--json", action="store_true", help="a JSON line for each image instead of a table")
    parser.add_argument("--batch_size", type=int, default=32, help="images computed at once")
    options = parser.parse_args(argv)
    piped = options.images == ["-"]
    images = [io.BytesIO(sys.stdin.buffer.read())] if piped else list(find_images(options.images))
    predictions = predict(deploy_form(_load(options.model)), images, options.top_k, options.batch_size)
    failed = False
    headings = [f"class {i + 1}" if options.top_k > 1 else "class" for i in range(options.top_k)]
    table = Table(Column("image", overflow="fold"), *headings)
    quiet = options.json or not errors.is_terminal
    for prediction in track(predictions, total=len(images), console=errors, transient=True, disable=quiet):
        failed |= bool(prediction.error)
        if options.json:
            print(json.dumps(_as_json(prediction)), flush=True)  # noqa: T201
        elif prediction.error:
            errors.print(prediction.error, markup=False, highlight=False, soft_wrap=True)
        else:
            table.add_row(prediction.path, *[f"{name} {probability:.1%}" for name, probability in prediction.classes])
    if table.rows:
        console.print(table)
    return int(failed)


def publish(argv: list[str]) -> int:
    """Writes a run's best model and a model card to a folder that timm reads, and pushes it to the Hugging Face Hub.

    The card is the folder's README.md, with what the run folder says of the model, its accuracy and its training. A
    model folder that was there is replaced, card and all. Pushing takes a network and a token (`hf auth login`).
    """
    parser = _parser(publish)
    parser.add_argument("run", type=str, help="run folder")
    parser.add_argument("folder", type=str, help="where to write; timm reads it as local-dir:FOLDER")
    form_help = "deploy (fused), folded (layer scales merged as well), or training (as it was trained)"
    parser.add_argument("--form", type=Literal["deploy", "folded", "training"], default="deploy", help=form_help)
    parser.add_argument("--push", type=str, metavar="OWNER/NAME", default="", help="push it to this Hub repository too")
    parser.add_argument("--private", action="store_true", help="make that repository private, where it is new")
    options = parser.parse_args(argv)
    if options.push:
        check_repository(options.push)
    elif options.private:
        raise ValueError("--private is about the repository of --push OWNER/NAME, which was not given")
    best = Run(options.run).best()
    if best.resolve() == Path(options.folder).resolve():
        raise ValueError(f"{options.folder} is the run's own best model, which it goes on needing; give another folder")
    card, model = model_card(options.run, options.form, options.push), load(best)
    published, difference = _in_form(options.form, model)
    save_pretrained(published, options.folder, card)
    console.print(f"{options.folder}: {_outcome(model, published, difference)}; README.md is its card", highlight=False)
    if options.push:
        push(options.folder, options.push, options.private)
        console.print(f"pushed: hf-hub:{options.push}", highlight=False)
    return 0


def convert_verb(argv: list[str]) -> int:
    """Reads an mmpretrain, PoolFormer or timm checkpoint and writes safetensors with this package's names.

    Nothing in a checkpoint is executed. One that does not fit the architecture is refused, each difference named.
    """
    parser = _parser(convert_verb)
    parser.add_argument("source", type=str, help="checkpoint file, .pth or .safetensors")
    parser.add_argument("destination", type=str, help="FILE.safetensors, or a folder that timm's local-dir: reads too")
    model_help = "what it must be, such as riformer_s12.mmpretrain_in1k_384 (default: told from its shapes, at 224 px)"
    parser.add_argument("--model", type=str, help=model_help)
    options = parser.parse_args(argv)
    written = convert(options.source, options.destination, options.model)
    model = load(written)
    console.print(f"{written}: {describe(model)}, {count_params(model):,} parameters", highlight=False)
    return 0


def report(argv: list[str]) -> int:
    """Writes one self-contained HTML page about the runs: results, curves, speed, predictions, settings."""
    parser = _parser(report)
    parser.add_argument("runs", type=str, nargs="+", help="run folders, or folders that contain run folders")
    parser.add_argument("--out", type=str, help="file to write (default: report.html in the first folder)")
    options = parser.parse_args(argv)
    runs = [Path(name) for name in options.runs]
    written = write_report(runs, Path(options.out or runs[0] / "report.html"))
    console.print(f"report: {written}", highlight=False, soft_wrap=True)
    return 0


def list_verb(argv: list[str]) -> int:
    """Lists the models, token mixers, recipes, rungs of a ladder and data sets that can be named."""
    parser = _parser(list_verb)
    kinds = ("models", "mixers", "recipes", "rungs", "datasets")
    parser.add_argument("kinds", type=str, nargs="*", help=f"what to list: {', '.join(kinds)} (default: all)")
    options = parser.parse_args(argv)
    for kind in options.kinds or kinds:
        _known(kind, kinds, "list")
        table = Table("name", "", title=kind, title_justify="left", title_style="bold", show_header=False, box=None)
        for name, text in _entries(kind):
            table.add_row(name, text)
        console.print(table)
    return 0


VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "ladder": ladder,
    "eval": evaluate,
    "fuse": fuse_verb,
    "predict": predict_verb,
    "publish": publish,
    "convert": convert_verb,
    "report": report,
    "list": list_verb,
}


def _entries(kind: str) -> list[tuple[str, str]]:
    """Names of a kind, and a line about each."""
    if kind == "models":
        with torch.device("meta"):
            sizes = {
                name: count_params(timm.create_model(name)) for name in timm.list_models(["riformer_*", "gfnet_*"])
            }
        return [(name, f"{size / 1e6:.1f} M parameters") for name, size in sizes.items()]
    if kind == "datasets":
        return list(DATASETS.items())
    tables: dict[str, Any] = {"mixers": MIXERS, "recipes": RECIPES, "rungs": RUNGS}
    return [(name, (entry.__doc__ or "").splitlines()[0]) for name, entry in tables[kind].items()]


def _parser(verb: Callable) -> ArgumentParser:
    name = next(name for name, function in VERBS.items() if function is verb)
    return ArgumentParser(prog=f"riformer {name}", description=verb.__doc__)


def _recipe_parser(verb: Callable, given: Namespace) -> ArgumentParser:
    parser = _parser(verb)
    if not given.config and not given.resume:
        name = given.recipe or "quickstart"
        parser.epilog = f"The recipe {name}: {RECIPES[name].__doc__}"
    names = ", ".join(RECIPES)
    parser.add_argument("--recipe", type=str, default="quickstart", help=f"settings to start from: {names}")
    parser.add_argument("--config", type=str, help="start from a run's recipe.json instead")
    return parser


def _base_recipe(argv: list[str]) -> tuple[Namespace, Recipe]:
    """The recipe that --recipe, --config or --resume name, read before the other options, whose defaults it gives."""
    start = PlainParser(add_help=False, allow_abbrev=False)
    start.add_argument("--recipe")
    start.add_argument("--config")
    start.add_argument("--resume")
    given, others = start.parse_known_args(argv)
    sources = [f"--{name}" for name, value in vars(given).items() if value]
    if len(sources) > 1:
        raise ValueError(f"{' and '.join(sources)} each say where all settings come from; give one of them")
    if given.resume:
        if others and not {"-h", "--help"} & set(others):
            raise ValueError(f"--resume takes every setting from the run; {' '.join(others)} cannot be given with it")
        return given, Run(given.resume).recipe()
    if given.config:
        try:
            return given, from_dict(json.loads(Path(given.config).read_text()))
        except json.JSONDecodeError as error:
            raise ValueError(f"--config {given.config} is not JSON: {error}") from error
    return given, RECIPES[_known(given.recipe or "quickstart", RECIPES, "recipe")]()


def _parse_recipe(parser: ArgumentParser, base: Recipe, argv: list[str]) -> tuple[Any, Recipe]:
    """The parsed options, and the recipe that `base` becomes with the overrides in them."""
    kinds = get_type_hints(Recipe)
    helps = {"name": "what reports call it", "seed": "decides initialisation, order, augmentation and every other draw"}
    for field in fields(Recipe):
        kind, default = kinds[field.name], getattr(base, field.name)
        parser.add_argument(f"--{field.name}", type=kind, default=default, help=helps.get(field.name))
    options = parser.instantiate(parser.parse_args(argv))
    return options, Recipe(**{field.name: getattr(options, field.name) for field in fields(Recipe)})


def _load(path: str | Path) -> nn.Module:
    """The model, in float32 and where it runs fastest."""
    return load(path).to("cuda" if torch.cuda.is_available() else "cpu", torch.float32)


def _in_form(form: str, model: MetaFormer, tolerance: float = 1e-4) -> tuple[MetaFormer, float]:
    """The model in that form, and how far logits of random images are apart, as a share of the largest logit."""
    changed = FORMS[form](model)
    images = torch.randn(8, *model.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(0))
    difference = compare(model, changed, [images.to(next(model.parameters()))]).max_rel
    if not difference <= tolerance:
        raise RuntimeError(f"the {form} form differs by {difference:.2g} of the largest logit; nothing was written")
    return changed, difference


def _outcome(before: MetaFormer, after: MetaFormer, difference: float) -> str:
    return (
        f"{describe(after)}, {count_params(after):,} parameters, {count_params(before):,} before; "
        f"largest difference {difference:.1e} of the largest logit"
    )


def _known(name: str, table: Any, kind: str) -> str:
    if name not in table:
        near = get_close_matches(name, table)
        raise ValueError(
            f"no {kind} {name!r}; " + (f"did you mean {near[0]}?" if near else f"known: {', '.join(table)}")
        )
    return name


def _underscored(argument: str) -> str:
    """`--data.on-bad=x` as `--data.on_bad=x`."""
    name, equals, value = argument.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if argument.startswith("--") else argument


def _main_console() -> Console:
    """The console; a silent one in all but the first process of a distributed run."""
    return console if is_main_process() else Console(quiet=True)


def _as_json(prediction: Prediction) -> dict[str, Any]:
    if prediction.error:
        return {"path": prediction.path, "error": prediction.error}
    classes = [{"class": name, "probability": probability} for name, probability in prediction.classes]
    return {"path": prediction.path, "classes": classes}
