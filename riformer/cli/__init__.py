"""`riformer VERB ...`: one short function a verb, each around one library function."""

import re
from collections.abc import Callable

from safetensors import SafetensorError

from riformer.cli.export import export_verb, layout_verb
from riformer.cli.models import convert_verb, fuse_verb, publish
from riformer.cli.models import open_model as open_model
from riformer.cli.overview import list_verb, report
from riformer.cli.speed import bench_verb, profile_verb
from riformer.cli.training import evaluate, ladder, train
from riformer_runtime.cli import options

VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "ladder": ladder,
    "eval": evaluate,
    "fuse": fuse_verb,
    "export": export_verb,
    "layout": layout_verb,
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
    mendable = (*options.MENDABLE, SafetensorError)
    return options.run(verb, VERBS[verb], argv, mendable=mendable, message=_message, hint=RESUMES.get(verb, ""))


def _message(error: Exception) -> str:
    """What the error says, without the traceback of a worker process that it may quote."""
    text = str(error)
    return re.split(r"^[\w.]+: ", text.strip(), flags=re.MULTILINE)[-1] if "Original Traceback" in text else text
