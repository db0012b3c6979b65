"""What the verbs share: consoles, parsers, and what a command line names."""

import json
from argparse import ArgumentParser as PlainParser
from argparse import Namespace
from collections.abc import Callable
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_type_hints

import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from torch import nn

from riformer.config import Recipe, from_dict, upgrade
from riformer.model.weights import load
from riformer.recipes import RECIPES
from riformer.train.distributed import is_main_process
from riformer.train.run import Run

console = Console()
errors = Console(stderr=True)


def verb_parser(name: str, verb: Callable) -> ArgumentParser:
    """A parser whose help is the verb's docstring."""
    return ArgumentParser(prog=f"riformer {name}", description=verb.__doc__)


def recipe_parser(name: str, verb: Callable, given: Namespace) -> ArgumentParser:
    parser = verb_parser(name, verb)
    if not given.config and not given.resume:
        name = given.recipe or "quickstart"
        parser.epilog = f"The recipe {name}: {RECIPES[name].__doc__}"
    names = ", ".join(RECIPES)
    parser.add_argument("--recipe", type=str, default="quickstart", help=f"settings to start from: {names}")
    parser.add_argument("--config", type=str, help="start from a run's recipe.json instead")
    return parser


def base_recipe(argv: list[str]) -> tuple[Namespace, Recipe]:
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
            return given, from_dict(upgrade(json.loads(Path(given.config).read_text())))
        except json.JSONDecodeError as error:
            raise ValueError(f"--config {given.config} is not JSON: {error}") from error
    return given, RECIPES[known(given.recipe or "quickstart", RECIPES, "recipe")]()


def parse_recipe(parser: ArgumentParser, base: Recipe, argv: list[str]) -> tuple[Any, Recipe]:
    """The parsed options, and the recipe that `base` becomes with the overrides in them."""
    kinds = get_type_hints(Recipe)
    helps = {"name": "what reports call it", "seed": "decides initialisation, order, augmentation and every other draw"}
    for field in fields(Recipe):
        kind, default = kinds[field.name], getattr(base, field.name)
        parser.add_argument(f"--{field.name}", type=kind, default=default, help=helps.get(field.name))
    options = parser.instantiate(parser.parse_args(argv))
    return options, Recipe(**{field.name: getattr(options, field.name) for field in fields(Recipe)})


def load_model(path: str | Path) -> nn.Module:
    """The model, in float32 and where it runs fastest."""
    return load(path).to("cuda" if torch.cuda.is_available() else "cpu", torch.float32)


def known(name: str, table: Any, kind: str) -> str:
    if name not in table:
        near = get_close_matches(name, table)
        raise ValueError(
            f"no {kind} {name!r}; " + (f"did you mean {near[0]}?" if near else f"known: {', '.join(table)}")
        )
    return name


def main_console() -> Console:
    """The console; a silent one in all but the first process of a distributed run."""
    return console if is_main_process() else Console(quiet=True)
