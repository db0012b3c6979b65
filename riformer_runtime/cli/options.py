"""What all verbs share: consoles, parsers, and errors as one message."""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from riformer_runtime.cli.console import Console, LogHandler
from riformer_runtime.cli.parsing import Parser
from riformer_runtime.engines import Runner

console = Console()
errors = Console(stderr=True)

OpenModel = Callable[[str, str, int | None], tuple[Runner, str]]
"""(run or model, engine, number of images) -> a runner in PyTorch, and why no faster one."""


def verb_parser(
    name: str,
    verb: Callable,
    examples: Sequence[tuple[str, str]],
    about: str = "",
    renamed: dict[str, str] | None = None,
) -> Parser:
    """A parser whose help is the verb's docstring, then `about`, then examples."""
    lines = [f"  {command}\n      {text}" for command, text in examples]
    end = "\n\n".join([*([about] if about else []), "examples:\n" + "\n".join(lines)])
    return Parser(f"riformer {name}", verb.__doc__ or "", end, renamed)


MENDABLE: tuple[type[Exception], ...] = (ValueError, RuntimeError, OSError, MemoryError)
"""Errors that a user can mend."""


def run(
    name: str,
    verb: Callable[..., int],
    *arguments: Any,
    mendable: tuple[type[Exception], ...] = MENDABLE,
    message: Callable[[Exception], str] = str,
    hint: str = "",
) -> int:
    """Calls a verb and returns the exit code. What the user can mend is one message, not a traceback.

    Args:
        name: of the verb.
        verb: its function.
        arguments: that it is given.
        mendable: errors that are shown as a message; others are defects.
        message: what an error says.
        hint: what an interrupt says beside that it was one.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[LogHandler(errors)])
    logging.getLogger("riformer").setLevel(logging.INFO)
    logging.getLogger("riformer_runtime").setLevel(logging.INFO)
    try:
        return verb(*arguments)
    except mendable as error:
        out_of_memory = "out of memory" if isinstance(error, MemoryError) else type(error).__name__
        _print_error(f"riformer {name}: ", message(error) or out_of_memory)
        return 1
    except KeyboardInterrupt:
        _print_error(f"riformer {name}: ", f"interrupted{hint}")
        return 130


def _print_error(verb: str, text: str) -> None:
    """Prints to standard error; a standard error that is closed or full changes no exit code."""
    with suppress(OSError, ValueError, SystemExit):
        errors.print(verb, style="bold red", end="")
        errors.print(text, soft_wrap=True)
