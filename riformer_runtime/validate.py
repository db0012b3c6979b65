"""Whether values are what type hints allow, in words for a message: types, Literals, tuples and ranges.

A range is part of the hint, as in `Annotated[float, Range(0, 1)]`. Floats must be finite, and may be given as ints.
"""

import json
import math
import sys
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, or without them: above `above`, below `below`."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high and self.above < value < self.below

    def __str__(self) -> str:
        bounds = {"above": self.above, "at least": self.low, "below": self.below, "at most": self.high}
        return " and ".join(f"{words} {bound:,.10g}" for words, bound in bounds.items() if math.isfinite(bound))


Share = Annotated[float, Range(0, 1)]
PositiveShare = Annotated[float, Range(above=0, high=1)]
ShareBelowOne = Annotated[float, Range(0, below=1)]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(0)]
Count = Annotated[int, Range(1)]
CountOrZero = Annotated[int, Range(0)]


def conforms(value: Any, hint: Any) -> bool:
    """Whether a value is one that the hint allows. `Any` allows what JSON can hold."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        kind, *ranges = args
        return conforms(value, kind) and all(value in allowed for allowed in ranges if isinstance(allowed, Range))
    if origin in (Union, UnionType):
        return any(conforms(value, arm) for arm in args)
    if origin is Literal:
        return any(value == allowed and type(value) is type(allowed) for allowed in args)
    if origin in (tuple, list):
        if not isinstance(value, origin):
            return False
        kinds = args[:1] * len(value) if origin is list or args[-1] is Ellipsis else args
        return len(value) == len(kinds) and all(map(conforms, value, kinds))
    if origin is dict:
        return isinstance(value, dict) and all(conforms(k, args[0]) and conforms(v, args[1]) for k, v in value.items())
    if hint is Any:
        return _is_json(value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def describe(hint: Any, plural: bool = False) -> str:
    """What the hint allows: `a number at least 0 and below 1`, or several of it: `numbers at least 0 and below 1`."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        ranges = [str(allowed) for allowed in args[1:] if isinstance(allowed, Range)]
        return " ".join([describe(args[0], plural), *ranges])
    if origin in (Union, UnionType):
        return " or ".join(describe(arm) for arm in args)
    if origin is Literal:
        return " or ".join(repr(allowed) for allowed in args)
    if origin in (tuple, list):
        return ("" if origin is list or args[-1] is Ellipsis else f"{len(args)} ") + describe(args[0], plural=True)
    if origin is dict:
        return "a dict of JSON values"
    names = {str: "string", int: "whole number", float: "number"}
    if hint in names:
        return f"{names[hint]}s" if plural else f"a {names[hint]}"
    return {bool: "true or false", NoneType: "null"}.get(hint, f"a {getattr(hint, '__name__', hint)}")


def refusal(name: str, value: Any, hint: Any) -> str:
    """Why a value is refused, or an empty string if the hint allows it."""
    if conforms(value, hint):
        return ""
    choices = [choice for choice in get_args(hint) if isinstance(choice, str)] if get_origin(hint) is Literal else []
    near = get_close_matches(str(value), choices, n=1)
    advice = f"; did you mean {near[0]!r}?" if near else ""
    if isinstance(value, list) and conforms(tuple(value), hint):
        advice = "; give a tuple"
    return f"{name} is {value!r}, but must be {describe(hint)}{advice}"


def refusals(config: Any, prefix: str = "--") -> list[str]:
    """Why values of a dataclass are refused, and of those inside it. Each is named as on the command line."""
    reasons = []
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        value, option = getattr(config, name), prefix + name.replace("_", "-")
        if is_dataclass(hint) and type(value) is hint:
            reasons += refusals(value, f"{option}.")
        else:
            reasons.append(refusal(option, value, hint))
    return [reason for reason in reasons if reason]


def build(values: Any, cls: type, place: str = "") -> Any:
    """The dataclass with these values, those inside it built from dicts and tuples from lists; the rest is as given.

    Raises:
        ValueError: a name that the class has not; the message has near misses.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{place or cls.__name__} is {values!r}, but must be an object with {_listed(cls)}")
    hints = get_type_hints(cls)
    for name in values:
        if name not in hints:
            near = get_close_matches(str(name), hints, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {_listed(cls)}"
            raise ValueError(f"{place or cls.__name__} has no {name!r}; {hint}")
    built = {}
    for name, value in values.items():
        if is_dataclass(hints[name]):
            built[name] = build(value, hints[name], f"{place}.{name}" if place else name)
        else:
            built[name] = tuple(value) if isinstance(value, list) else value
    return cls(**built)


def _listed(cls: type) -> str:
    return ", ".join(field.name for field in fields(cls))
