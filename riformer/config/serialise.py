"""Recipes as plain JSON types, and back."""

from dataclasses import asdict, fields
from typing import Any

from riformer.config.knobs import Recipe, ResearchConfig
from riformer_runtime.validate import build, refusals

MOVED = {f"distill.{f.name}": f"research.{f.name}" for f in fields(ResearchConfig)}
"""Knobs that had another place in earlier versions, with the place of today."""


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain JSON types."""
    return asdict(recipe)


def from_dict(values: dict[str, Any], cls: type = Recipe) -> Any:
    """The recipe that `to_dict` wrote; knobs that it lacks have their defaults. See also `upgrade`.

    Raises:
        ValueError: a knob that does not exist, or a value that its knob does not allow; the message names it.
    """
    for old, new in MOVED.items():
        if cls is Recipe and _has(values, *old.split(".")):
            raise ValueError(f"{old} is now {new}")
    recipe = build(values, cls)
    if reasons := refusals(recipe):
        raise ValueError("\n".join(reasons))
    return recipe


def upgrade(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a recipe that an earlier version wrote, each under its name of today."""
    for old, new in MOVED.items():
        (section, name), (new_section, new_name) = old.split("."), new.split(".")
        if _has(values, section, name):
            rest = {key: value for key, value in values[section].items() if key != name}
            moved = dict(values.get(new_section) or {}) | {new_name: values[section][name]}
            values = {**values, section: rest, new_section: moved}
    return values


def _has(values: Any, section: str, name: str) -> bool:
    return isinstance(values, dict) and isinstance(values.get(section), dict) and name in values[section]
