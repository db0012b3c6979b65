"""Options and result folders that the scripts beside this file share."""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch

from riformer_runtime.native.library import supported

RESULTS = Path(__file__).parent / "results"


def of_machine() -> Path:
    """The folder for results of machines like this one, named by their best instruction set."""
    return RESULTS / ("gpu" if torch.cuda.is_available() else [*supported(), "cpu"][0])


def options(description: str | None, out: Path, rounds: int = 9) -> ArgumentParser:
    """A parser with --out, --rounds and --smoke."""
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=out, help=f"{'file' if out.suffix else 'folder'} of the results")
    parser.add_argument("--rounds", type=int, default=rounds, help="turns of each competitor")
    parser.add_argument("--smoke", action="store_true", help="a quick trial with a small network")
    return parser


def turn_seconds(smoke: bool) -> float:
    """Least duration of a competitor's turn."""
    return 0.01 if smoke else 0.2
