"""Verbs that show: report and list."""

from pathlib import Path
from typing import Any

import timm
import torch
from rich.table import Table

from riformer.cli.options import console, known, verb_parser
from riformer.model.mixers import MIXERS
from riformer.recipes import RECIPES, RUNGS
from riformer.study.cost import count_params
from riformer.study.report import write_report
from riformer.train.data import DATASETS


def report(argv: list[str]) -> int:
    """Writes one self-contained HTML page about the runs: results, curves, speed, predictions, settings."""
    parser = verb_parser("report", report)
    parser.add_argument("runs", type=str, nargs="+", help="run folders, or folders that contain run folders")
    parser.add_argument("--out", type=str, help="file to write (default: report.html in the first folder)")
    options = parser.parse_args(argv)
    runs = [Path(name) for name in options.runs]
    written = write_report(runs, Path(options.out or runs[0] / "report.html"))
    console.print(f"report: {written}", highlight=False, soft_wrap=True)
    return 0


def list_verb(argv: list[str]) -> int:
    """Lists the models, token mixers, recipes, rungs of a ladder and data sets that can be named."""
    parser = verb_parser("list", list_verb)
    kinds = ("models", "mixers", "recipes", "rungs", "datasets")
    parser.add_argument("kinds", type=str, nargs="*", help=f"what to list: {', '.join(kinds)} (default: all)")
    options = parser.parse_args(argv)
    for kind in options.kinds or kinds:
        known(kind, kinds, "list")
        table = Table("name", "", title=kind, title_justify="left", title_style="bold", show_header=False, box=None)
        for name, text in _entries(kind):
            table.add_row(name, text)
        console.print(table)
    return 0


def _entries(kind: str) -> list[tuple[str, str]]:
    """Names of a kind, and a line about each."""
    if kind == "models":
        with torch.device("meta"):
            sizes = {
                name: count_params(timm.create_model(name)) for name in timm.list_models(["riformer_*", "gfnet_*"])
            }
        return [(name, f"{size / 1e6:.1f} M parameters") for name, size in sizes.items()]
    if kind == "datasets":
        return list(DATASETS.items())
    tables: dict[str, Any] = {"mixers": MIXERS, "recipes": RECIPES, "rungs": RUNGS}
    return [(name, (entry.__doc__ or "").splitlines()[0]) for name, entry in tables[kind].items()]
