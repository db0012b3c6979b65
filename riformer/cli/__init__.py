"""`riformer VERB ...`: one short function a verb, each around one library function."""

import logging
import re
from collections.abc import Callable
from contextlib import suppress

from safetensors import SafetensorError

from riformer.cli.console import LogHandler
from riformer.cli.models import convert_verb, fuse_verb, predict_verb, publish
from riformer.cli.options import errors
from riformer.cli.overview import list_verb, report
from riformer.cli.speed import bench_verb, profile_verb
from riformer.cli.training import evaluate, ladder, train

VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "ladder": ladder,
    "eval": evaluate,
    "fuse": fuse_verb,
    "predict": predict_verb,
    "profile": profile_verb,
    "bench": bench_verb,
    "publish": publish,
    "convert": convert_verb,
    "report": report,
    "list": list_verb,
}
RESUMES = dict.fromkeys(("train", "ladder"), "; run the same command again to resume")


def run(verb: str, argv: list[str]) -> int:
    """Runs a verb and returns the exit code. What the user can mend is one message, not a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[LogHandler(errors)])
    logging.getLogger("riformer").setLevel(logging.INFO)
    try:
        return VERBS[verb](argv)
    except (ValueError, RuntimeError, OSError, MemoryError, SafetensorError) as error:
        _print_error(f"riformer {verb}: ", _message(error))
        return 1
    except KeyboardInterrupt:
        _print_error(f"riformer {verb}: ", "interrupted" + RESUMES.get(verb, ""))
        return 130


def _message(error: Exception) -> str:
    """What the error says, without the traceback of a worker process that it may quote."""
    text = str(error) or ("out of memory" if isinstance(error, MemoryError) else type(error).__name__)
    if "Original Traceback" in text:
        text = re.split(r"^[\w.]+: ", text.strip(), flags=re.MULTILINE)[-1]
    return text


def _print_error(verb: str, text: str) -> None:
    """Prints to standard error; a standard error that is closed or full changes no exit code."""
    with suppress(OSError, ValueError, SystemExit):
        errors.print(verb, style="bold red", end="")
        errors.print(text, soft_wrap=True)
