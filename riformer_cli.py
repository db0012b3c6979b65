"""The `riformer` command. Answers --help, --version and unknown verbs at once; for the rest it imports the package.

`import riformer` imports timm and torch, which takes seconds; this module stays outside the package for that reason.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from io import TextIOWrapper
from types import ModuleType
from typing import Any

VERBS = {
    "train": "train a network, and its teacher first where the recipe says so; or resume a run",
    "ladder": "train rungs of a comparison over several seeds",
    "eval": "accuracy before and after the fuse, of a run or of any saved model on any data",
    "fuse": "write the deploy form of a run or model, checked equal",
    "export": "write a run or model for other engines, each checked against the training form",
    "layout": "put what was exported into a model repository of Triton or OpenVINO Model Server",
    "check": "verify what was exported: every file, and every payload on its engine",
    "predict": "label images with what was exported, or with a run or model",
    "serve": "predictions over HTTP, and a page to try them on",
    "profile": "where a network's time goes, and the share of its token mixers",
    "bench": "images per second of networks on engines, side by side",
    "publish": "write a run's model with a card, for timm and the Hugging Face Hub",
    "convert": "read an mmpretrain, PoolFormer or timm checkpoint, write safetensors",
    "report": "one HTML page about one or more runs",
    "list": "models, mixers, recipes, rungs and data sets",
}

WITHOUT_TORCH = ("predict", "check", "serve")
"""Verbs of `riformer_runtime`, which imports no PyTorch."""

OPEN_MODELS = ("predict", "serve")
"""Those among them that take a run or model as well, for which the full installation is imported."""

HELP = """usage: riformer VERB [options]

RIFormer: vision backbones without token mixers, and the training that keeps their accuracy.

verbs:
{verbs}

riformer VERB --help explains a verb's options; riformer --version prints the version.

start here:
  riformer train                                             the whole idea on built-in digits
  riformer train --recipe photos --data.name folder:PATH     the same on your own images
  riformer report runs                                       a page about what came out
"""


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what a terminal or a file cannot encode is escaped
    try:
        code = run(sys.argv[1] if len(sys.argv) > 1 else "--help", sys.argv[2:])
        if sys.stdout:
            sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except OSError as error:  # of standard output
        if not isinstance(error, BrokenPipeError) and sys.stderr:
            print(f"riformer: cannot write standard output: {error.strerror}", file=sys.stderr)  # noqa: T201
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python tries once more at its exit
        code = 1
    if code:
        sys.exit(code)


def run(verb: str, argv: list[str]) -> int:
    """Runs a verb and returns the exit code."""
    if verb in ("-h", "--help", "help"):
        print(HELP.format(verbs="\n".join(f"  {name:9} {text}" for name, text in VERBS.items())), end="")  # noqa: T201
        return 0
    if verb == "--version":
        from importlib.metadata import version  # here, because it takes as long to import as all else in this file

        print(f"riformer {version('riformer')}")  # noqa: T201
        return 0
    if verb not in VERBS:
        near = get_close_matches(verb, VERBS)
        sys.exit(f"riformer: no verb {verb!r}; {f'did you mean {near[0]}?' if near else 'see riformer --help'}")
    with interrupts_end_the_process():
        if verb in WITHOUT_TORCH:
            from riformer_runtime import cli as runtime
        else:
            cli = full_installation(verb)
    if verb in WITHOUT_TORCH:
        return runtime.run(verb, runtime.VERBS[verb], argv, *([open_model] if verb in OPEN_MODELS else []))
    return cli.run(verb, argv)


def full_installation(purpose: str) -> ModuleType:
    """The module `riformer.cli`; ends the process with one line where PyTorch is not installed.

    Args:
        purpose: what it is needed for, a verb or a file; named in that line.
    """
    try:
        from riformer import cli
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "torchvision", "timm"):
            raise
        sys.exit(f"riformer {purpose}: {error}")
    return cli


def open_model(path: str, engine: str, num_images: int | None) -> Any:
    """A run or model as a runner; see `riformer.cli.open_model`."""
    return full_installation(path).open_model(path, engine, num_images)


@contextmanager
def interrupts_end_the_process() -> Iterator[None]:
    """While modules load, Ctrl-C ends the process at once: there is nothing to save, and no traceback to read."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, or somebody else's
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if __name__ == "__main__":
    main()
