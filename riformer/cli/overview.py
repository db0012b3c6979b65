"""Verbs that show: report and list."""

from pathlib import Path
from typing import Any

import timm
import torch
from rich.table import Table

from riformer.cli.options import check_name, console, verb_parser
from riformer.data.dataset import DATASETS
from riformer.measure.cost import count_params
from riformer.model.mixers import MIXERS
from riformer.pages.ladder import write_ladder_report
from riformer.pages.report import write_report
from riformer.pages.speed import write_speed_report
from riformer.recipes import RECIPES, RUNG_GROUPS, RUNGS


def report(argv: list[str]) -> int:
    """Writes one self-contained HTML page: about runs, about a ladder, or about speeds that were measured.

    About runs: results, curves, speed, predictions, settings. With --ladder: rungs and budgets beside the paper's,
    paired differences with intervals, accuracy over steps and latency, features and receptive fields. About result
    files of `riformer bench --out`: speeds beside their errors and limits, and with published networks among them a
    picture of speed and accuracy.
    """
    parser = verb_parser("report", report)
    runs_help = "run folders, or folders that contain run folders; or result files of a bench"
    parser.add_argument("paths", type=str, nargs="+", help=runs_help)
    out_help = "file to write (default: report.html in the first folder, or beside the first file)"
    parser.add_argument("--out", type=str, help=out_help)
    parser.add_argument(
        "--ladder", action="store_true", help="compare the rungs of a ladder (default file: ladder.html)"
    )
    options = parser.parse_args(argv)
    paths = [Path(name) for name in options.paths]
    files = [path for path in paths if path.is_file()]
    if files and len(files) < len(paths):
        raise ValueError(f"{files[0]} is a file and others are folders: runs and measured speeds make two reports")
    if options.ladder:
        written = write_ladder_report(paths, Path(options.out or paths[0] / "ladder.html"))
    elif files:
        written = write_speed_report(files, Path(options.out or files[0].with_suffix(".html")))
    else:
        written = write_report(paths, Path(options.out or paths[0] / "report.html"))
    console.print(f"report: {written}", soft_wrap=True)
    return 0


def list_verb(argv: list[str]) -> int:
    """Lists the models, token mixers, recipes, rungs of a ladder and data sets that can be named."""
    parser = verb_parser("list", list_verb)
    kinds = ("models", "mixers", "recipes", "rungs", "datasets")
    parser.add_argument("kinds", type=str, nargs="*", help=f"what to list: {', '.join(kinds)} (default: all)")
    options = parser.parse_args(argv)
    for kind in options.kinds or kinds:
        check_name(kind, kinds, "list")
        for title, entries in _entries(kind).items():
            table = Table(
                "name", "", title=title, title_justify="left", title_style="bold", show_header=False, box=None
            )
            for name, text in entries.items():
                table.add_row(name, text)
            console.print(table)
    return 0


def _entries(kind: str) -> dict[str, dict[str, str]]:
    """Names of a kind and a line about each, in groups by their titles."""
    if kind == "models":
        with torch.device("meta"):
            sizes = {
                name: count_params(timm.create_model(name)) for name in timm.list_models(["riformer_*", "gfnet_*"])
            }
        return {kind: {name: f"{size / 1e6:.1f} M parameters" for name, size in sizes.items()}}
    if kind == "datasets":
        return {kind: DATASETS}
    tables: dict[str, dict[str, Any]] = {"mixers": MIXERS, "recipes": RECIPES, "rungs": RUNGS}
    lines = {name: (entry.__doc__ or "").splitlines()[0] for name, entry in tables[kind].items()}
    if kind != "rungs":
        return {kind: lines}
    return {f"rungs: {group}": {name: lines[name] for name in names} for group, names in RUNG_GROUPS.items()}
