"""The `riformer` command. Answers --help, --version and unknown verbs at once; for the rest it imports the package.

`import riformer` imports timm and torch, which takes seconds; this module stays outside the package for that reason.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.metadata import version
from io import TextIOWrapper

VERBS = {
    "train": "train a network, and its teacher first where the recipe says so; or resume a run",
    "ladder": "train rungs of a comparison over several seeds",
    "eval": "accuracy before and after the fuse, of a run or of any saved model on any data",
    "fuse": "write the deploy form of a run or model, checked equal",
    "predict": "label images",
    "profile": "where a network's time goes, and the share of its token mixers",
    "bench": "images per second of networks on engines, side by side",
    "publish": "write a run's model with a card, for timm and the Hugging Face Hub",
    "convert": "read an mmpretrain, PoolFormer or timm checkpoint, write safetensors",
    "report": "one HTML page about one or more runs",
    "list": "models, mixers, recipes, rungs and data sets",
}

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
        print(f"riformer {version('riformer')}")  # noqa: T201
        return 0
    if verb not in VERBS:
        near = get_close_matches(verb, VERBS)
        sys.exit(f"riformer: no verb {verb!r}; {f'did you mean {near[0]}?' if near else 'see riformer --help'}")
    with interrupts_end_the_process():
        from riformer import cli
    return cli.run(verb, argv)


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
