"""The settings of a recipe on the command line: where they come from, options that override them, and rungs."""

import ast
import inspect
import json
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

from riformer.cli.options import check_name, verb_parser
from riformer.config import MOVABLE, Recipe, from_dict, reset_unused, upgrade
from riformer.config.knobs import default_of, option, value_of, with_value
from riformer.config.serialise import MOVED
from riformer.recipes import RECIPES, RENAMED, RUNGS, at_budget
from riformer.train.run import Run
from riformer_runtime.cli.parsing import Parser, dashed, written

SHORT_HELP = (
    *("data.name", "data.img_size", "data.num_workers", "augment.hflip", "model.name", "model.start"),
    *("teacher.name", "teacher.epochs", "distill.logit_teacher", "distill.module_teacher", "distill.trust_teacher"),
    *("optim.lr", "optim.epochs", "optim.batch_size", "optim.accumulation", "optim.precision"),
)
"""Knobs that --help explains; --help-all explains all of them."""


class RecipeOptions:
    """A parser for a verb that trains, with an option for every knob of a recipe.

    The recipe is that of --recipe, --config or --resume, which are read first, because its values are the defaults.

    Args:
        verb: name of the verb.
        function: the verb, whose docstring describes it.
        argv: the command line.
        without: knobs that the verb sets itself.

    Raises:
        ValueError: an unknown recipe, a file or run without one, or several sources at once.
    """

    def __init__(self, verb: str, function: Callable, argv: list[str], without: tuple[str, ...] = ()):
        self.argv = argv
        self.without = without
        self.base, about, self.resumed = _source(argv)
        moved = {option(old): option(new) for old, new in MOVED.items()}
        self.parser: Parser = verb_parser(verb, function, about=about, renamed=moved)
        self.parser.add_argument(
            "--help-all", action="store_true", help="explain all settings, not only the usual ones"
        )
        recipe_help = "settings to start from, see `riformer list recipes`"
        self.parser.add_argument("--recipe", type=str, default="quickstart", help=recipe_help)
        self.parser.add_argument("--config", type=str, help="start from a run's recipe.json instead")

    def parse(self) -> tuple[Any, Recipe]:
        """The options of the verb, and the recipe with its overrides.

        Settings of the recipe that only the overrides leave without effect go back to their defaults.
        """
        self._add_knobs()
        options, given = self.parser.parse_given(self.argv)
        if self.resumed and (refused := given.keys() - {"resume", *MOVABLE}):
            raise ValueError(
                f"--resume takes every setting from the run; {', '.join(sorted(map(option, refused)))} cannot be given "
                f"with it, but for {', '.join(map(option, MOVABLE))}, if the data was moved"
            )
        recipe = self.base
        self.overrides = {knob: value for knob, value in given.items() if knob in KNOBS}
        for knob, value in self.overrides.items():
            recipe = with_value(recipe, knob, value)
        return options, reset_unused(recipe, since=self.base)

    def _add_knobs(self) -> None:
        section, group = "", self.parser.add_argument_group("run")
        for knob, (kind, about) in KNOBS.items():
            name = knob.rpartition(".")[0]
            if name != section:
                section, group = name, self.parser.add_argument_group(name, KNOBS_ABOUT[name])
            if knob not in self.without:
                shown = not name or knob in SHORT_HELP
                default = value_of(self.base, knob)
                self.parser.option(option(knob), type=kind, default=default, help=about, group=group, shown=shown)

    def on_rungs(self, recipe: Recipe, names: Sequence[str], budgets: Sequence[int] = ()) -> list[Recipe]:
        """What each rung makes of the recipe, for each budget.

        Raises:
            ValueError: an unknown rung; an override that one replaces by another value, or that none of them uses.
        """
        times: Sequence[int | None] = budgets or [None]
        rungs = [(check_name(name, RUNGS, "rung"), budget) for budget in times for name in names]
        changed = [_on_rung(recipe, *rung) for rung in rungs]
        for knob, value in self.overrides.items():
            without = with_value(recipe, knob, value_of(self.base, knob))
            lost = [
                (name, value_of(after, knob))
                for (name, budget), after in zip(rungs, changed, strict=True)
                if value_of(after, knob) != value and _is_made_of(after, without, name, budget)
            ]
            for name, instead in lost:
                if instead != default_of(knob) or len(lost) == len(rungs):
                    raise ValueError(
                        f"{option(knob)} {written(value)} has no effect in the rung {name}, where it is "
                        f"{written(instead) or 'empty'}; leave one of the two out"
                    )
        return changed


def _on_rung(recipe: Recipe, name: str, budget: int | None) -> Recipe:
    return RUNGS[name](recipe if budget is None else at_budget(recipe, budget))


def _is_made_of(after: Recipe, recipe: Recipe, name: str, budget: int | None) -> bool:
    """Whether the rung makes `after` of this recipe too."""
    try:
        return _on_rung(recipe, name, budget) == after
    except ValueError:  # the rung is not for this recipe
        return False


def _source(argv: list[str]) -> tuple[Recipe, str, str]:
    """The recipe that --recipe, --config or --resume name, what to say about it, and the run to resume, if any."""
    first = ArgumentParser(prog="riformer", add_help=False, allow_abbrev=False, argument_default=SUPPRESS)
    for name in ("--recipe", "--config", "--resume"):
        first.add_argument(name)
    found, _ = first.parse_known_args([dashed(argument) for argument in argv])
    given = vars(found)
    if len(given) > 1:
        raise ValueError(f"{' and '.join(option(name) for name in given)} each name a recipe; give one of them")
    if run := given.get("resume", ""):
        return Run(run).recipe(), "", run
    if file := given.get("config", ""):
        try:
            return from_dict(upgrade(json.loads(Path(file).read_text(encoding="utf-8")))), "", ""
        except ValueError as error:
            raise ValueError(f"--config {file}: {error}") from error
    name = given.get("recipe") or "quickstart"
    if name in RENAMED:
        raise ValueError(f"the recipe {name} is now {RENAMED[name]}")
    recipe = RECIPES[check_name(name, RECIPES, "recipe")]
    return recipe(), f"The recipe {name}: {inspect.cleandoc(recipe.__doc__ or '')}", ""


def _knobs(cls: type, section: str = "") -> dict[str, tuple[Any, str]]:
    """The type of each knob and what the string below it says, by names such as `optim.lr`."""
    body = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(body, ast.ClassDef)
    texts = {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairwise(body.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }  # fmt: skip
    kinds = get_type_hints(cls)
    knobs: dict[str, tuple[Any, str]] = {}
    for field in fields(cls):
        if is_dataclass(kinds[field.name]):
            knobs |= _knobs(kinds[field.name], f"{field.name}.")
        else:
            knobs[section + field.name] = kinds[field.name], texts[field.name]
    return knobs


KNOBS = _knobs(Recipe)
KNOBS_ABOUT = {name: kind.__doc__ for name, kind in get_type_hints(Recipe).items() if is_dataclass(kind)}
