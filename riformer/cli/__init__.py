"""`riformer VERB ...`: one short function a verb, each around one library function."""

import logging
from collections.abc import Callable

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


def run(verb: str, argv: list[str]) -> int:
    """Runs a verb and returns the exit code. What the user can mend is one message, not a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[LogHandler(errors)])
    logging.getLogger("riformer").setLevel(logging.INFO)
    try:
        return VERBS[verb](argv)
    except (ValueError, RuntimeError, OSError) as error:
        errors.print(f"riformer {verb}: ", style="bold red", end="")
        errors.print(str(error), soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        errors.print(f"riformer {verb}: interrupted; the same command goes on where it stopped")
        return 130
