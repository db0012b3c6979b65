"""Command lines: options of the types that type hints say, help in groups, and near misses for what is misspelt.

Words of an option are joined by dashes, `--data.on-bad`; underscores are understood. Lists are words: `--seeds 0 1 2`.
"""

import json
import re
from argparse import SUPPRESS, Action, ArgumentParser, HelpFormatter, Namespace, _ArgumentGroup
from difflib import get_close_matches
from inspect import cleandoc
from itertools import takewhile
from textwrap import fill, wrap
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from riformer_runtime.validate import refusal

NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|-inf")
METAVARS = {int: "N", float: "X", str: "TEXT", dict: "JSON"}


class Parser(ArgumentParser):
    """An `ArgumentParser` whose `type` is a type hint, `Literal["a", "b"]`, `list[int]` or `tuple[float, float]`.

    Options in groups that are not `shown` stand only in the text of --help-all. Names with dots, `--data.name`, are
    attributes of attributes in what `parse_args` returns.
    """

    def __init__(self, prog: str, description: str = "", examples: str = "", renamed: dict[str, str] | None = None):
        super().__init__(
            prog, description=cleandoc(description), epilog=examples, formatter_class=_Help,
            allow_abbrev=False, add_help=False, argument_default=SUPPRESS,
        )  # fmt: skip
        self._negative_number_matcher = re.compile(f"^({NEGATIVE.pattern})$")
        self._typed: dict[str, tuple[str, Any]] = {}
        self._defaults_of: dict[str, Any] = {}
        self._long_only: list[Action] = []
        self._renamed = renamed or {}
        self.option("-h", "--help", action="store_true", help="show this text")

    def option(
        self,
        *names: str,
        type: Any = None,
        default: Any = None,
        help: str = "",
        group: _ArgumentGroup | None = None,
        shown: bool = True,
        **more: Any,
    ) -> None:
        """Adds an option or a positional argument; arguments as those of `ArgumentParser.add_argument`."""
        names = tuple(dashed(name) for name in names)
        dest = names[-1].lstrip("-").replace("-", "_")
        self._defaults_of[dest] = False if more.get("action") == "store_true" else default
        if default not in (None, "", ()) and "(default" not in help:
            help += f" (default: {written(default)})"
        if names[-1].startswith("-"):
            more["dest"] = dest
            if type is not None:
                self._typed[dest] = (names[-1], type)
                more = {**_shape(type), **more}
        action = (group or super()).add_argument(*names, help=help.replace("%", "%%"), **more)
        if not shown:
            self._long_only.append(action)

    add_argument = option  # type: ignore[assignment]

    def parse_args(self, argv: list[str]) -> Namespace:  # type: ignore[override]
        """The values by the names of their options; unknown options end the program with near misses."""
        return self.parse_given(argv)[0]

    def parse_given(self, argv: list[str]) -> tuple[Namespace, dict[str, Any]]:
        """The values, and those that were given by the names of their options, such as `data.name`."""
        argv = [dashed(argument) for argument in argv]
        self._answer_help(argv)
        self._refuse_unknown(argv)
        given = vars(super().parse_args(argv))
        for dest, (name, hint) in self._typed.items():
            if dest in given:
                given[dest] = self._value(given[dest], hint, name)
        values = Namespace()
        for dest, value in {**self._defaults_of, **given}.items():
            *sections, name = dest.split(".")
            inside = values
            for section in sections:
                if not hasattr(inside, section):
                    setattr(inside, section, Namespace())
                inside = getattr(inside, section)
            setattr(inside, name, value)
        return values, given

    def _answer_help(self, argv: list[str]) -> None:
        if "--help-all" in argv:
            self._long_only = []
        if {"-h", "--help", "--help-all"} & set(argv):
            self.print_help()
            self.exit()

    def _refuse_unknown(self, argv: list[str]) -> None:
        """Ends the program at the first option that does not exist."""
        for argument in takewhile(lambda argument: argument != "--", argv):
            name = argument.partition("=")[0]
            is_option = name.startswith("-") and name != "-" and not NEGATIVE.fullmatch(argument)
            if is_option and name not in self._option_string_actions:
                near = get_close_matches(name, self._option_string_actions, n=3)
                hint = f"; did you mean {' or '.join(near)}?" if near else ""
                self.error(
                    f"{name} is now {self._renamed[name]}" if name in self._renamed else f"no option {name}{hint}"
                )

    def _value(self, words: str | list[str], hint: Any, name: str) -> Any:
        value = parsed(words, hint)
        if reason := refusal(name, value, hint):
            self.error(reason)
        return value

    def error(self, message: str) -> NoReturn:
        """Prints one message and ends the program with code 2."""
        self.exit(2, f"{self.prog}: {message}\n{self.prog} --help explains the options\n")

    def format_usage(self) -> str:
        """The positional arguments by name; what else there is stands below."""
        formatter = self._get_formatter()
        formatter.add_usage(None, self._get_positional_actions(), [], "usage: ")
        return formatter.format_help().replace(self.prog, f"{self.prog} [options]", 1)

    def format_help(self) -> str:
        formatter = self._get_formatter()
        formatter.add_text(self.description)
        for group in self._action_groups:
            actions = [action for action in group._group_actions if action not in self._long_only]
            if actions:
                formatter.start_section(group.title)
                if not self._long_only:
                    formatter.add_text(group.description)
                formatter.add_arguments(actions)
                formatter.end_section()
        if self._long_only:
            formatter.add_text(f"{len(self._long_only)} more settings: {self.prog} --help-all")
        formatter.add_text(self.epilog)
        return f"{self.format_usage()}\n{formatter.format_help()}"


class _Help(HelpFormatter):
    """Paragraphs filled to the terminal's width; lines that begin with spaces, examples, as they are."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return wrap(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = re.split(r"\n\s*\n", text)
        kept = re.compile(r"^\s|:\n\s", re.MULTILINE)
        return "\n\n".join(p if kept.search(p) else fill(p, width) for p in paragraphs)


def dashed(argument: str) -> str:
    """`--data.on_bad=x` as `--data.on-bad=x`."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if argument.startswith("--") else argument


def written(value: Any) -> str:
    """A value as it is given on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return " ".join(written(one) for one in value)
    return json.dumps(value) if isinstance(value, dict) else f"{value}"


def parsed(words: str | list[str], hint: Any) -> Any:
    """The value that the words of an option are under a type hint, or the words where they are none."""
    origin, args = get_origin(hint), get_args(hint)
    text = words if isinstance(words, str) else " ".join(words)
    if origin in (Union, UnionType):
        if NoneType in args and text in ("null", "none", "None"):
            return None
        arms = [arm for arm in args if arm is not NoneType]
        if str in arms:  # one name, or several
            several = (len(words) > 1 and not isinstance(words, str)) or _json(text, list)
            return parsed(words, next(arm for arm in arms if arm is not str)) if several else text
        return parsed(words, arms[0])
    if origin in (list, tuple):
        if text.startswith("[") and text.endswith("]"):
            inside = _json(text, list)
            words = [one.strip(" \"'") for one in text[1:-1].split(",") if one.strip()] if inside is None else inside
        elif isinstance(words, str):
            words = [words]
        return origin(parsed(f"{word}", args[0]) for word in words if f"{word}")
    if origin is dict:
        inside = _json(text, dict)
        return text if inside is None else inside
    if hint is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            return text
    return text


def _json(text: str, kind: type) -> Any:
    """The JSON value of this kind that the text is, or None."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, kind) else None


def _shape(hint: Any) -> dict[str, Any]:
    """How argparse reads an option of this type: number of words, and what stands for them in the help."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        arms = [arm for arm in args if arm is not NoneType]
        several = [arm for arm in arms if get_origin(arm) in (list, tuple)]
        return _shape((several or arms)[0])
    if origin in (list, tuple):
        inside = METAVARS.get(args[0], "TEXT")
        return {"nargs": "+", "metavar": inside}
    if origin is Literal:
        return {"metavar": "{" + ",".join(args) + "}"}
    if hint is bool:
        return {"nargs": "?", "const": "true", "metavar": "{true,false}"}
    return {"metavar": METAVARS.get(origin or hint, "TEXT")}
