"""One self-contained HTML page from run folders; its wording and layout are in templates/report.html.

Nothing but run folders is read, and no number is typed: each is computed from the files that the runs wrote.
"""

import base64
import json
import shlex
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from statistics import fmean, stdev

from riformer.distill.objective import TERMS
from riformer.pages.records import (
    Group,
    RunRecord,
    baseline_of,
    collect,
    compare,
    confusion_of,
    device_of,
    find_runs,
    group_runs,
    settings_of,
    spread,
)
from riformer.pages.style import GREY, drawing, one_line, svg, templates, write_page


def write_report(runs: Sequence[Path], destination: Path) -> Path:
    """Writes one HTML file about the runs in the given folders, found at any depth; returns its path.

    Raises:
        ValueError: a folder holds no run, or a file of a run cannot be read.
        RuntimeError: matplotlib or jinja2 is not installed.
    """
    pages = templates()
    from matplotlib.ticker import MaxNLocator

    groups = group_runs(find_runs(runs))
    main, baseline = groups[0], baseline_of(groups)
    with drawing():
        figures = {"curves": _curves(groups), "panels": _terms(main)}
    pages.filters.update(pm=_pm, mean=fmean, collect=collect, spread=spread, provenance=_provenance)
    pages.filters.update(
        quote=lambda path: shlex.quote(str(path)),
        pretty=lambda value: json.dumps(value, indent=2, ensure_ascii=False),
        ticks=lambda values: list(MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(min(values), max(values))),
        png_width=lambda png: int.from_bytes(base64.b64decode(png[:32])[16:20], "big"),  # from its header
    )
    runs_of = dict(groups=groups, main=main, baseline=baseline, runs=[run for group in groups for run in group.runs])
    numbers = dict(compare=compare, confusion=confusion_of(main), settings=settings_of(groups), terms=TERMS, **figures)
    return write_page(pages, "report.html", destination, **runs_of, **numbers)


def _provenance(runs: Sequence[RunRecord], source: str = "evaluation") -> str:
    """Seeds, devices, versions and dates behind a number, in one line."""
    records = [(run.evaluation if source == "evaluation" else {}) or run.env for run in runs]
    facts = {
        "seeds" if len(runs) > 1 else "seed": [run.settings["seed"] for run in runs],
        "": [device_of(r) for r in records],
        **{name: [r.get("versions", r).get(name) for r in records] for name in ("riformer", "torch", "timm")},
        " ": [str(r["date"])[:10] for r in records if "date" in r],
    }
    known = {name: dict.fromkeys(str(v) for v in values if v is not None) for name, values in facts.items()}
    return " · ".join(f"{name} {', '.join(values)}".strip() for name, values in known.items() if values)


def _pm(values: Sequence[float]) -> str:
    """Mean and, from two values on, sample standard deviation."""
    return (f"{fmean(values):.2f}" if values else "–") + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def _curves(groups: list[Group]) -> str:
    """Validation accuracy by epoch: the whole range, and its upper end enlarged."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.9), layout="constrained")
    whole, upper = figure.subplots(1, 2)
    teacher = Group("teacher, on labels", [run.teacher for run in groups[0].runs if run.teacher], GREY)
    tails: list[float] = []
    for group in [*groups, teacher]:
        curves = [c for run in group.runs if (c := [e["val_top1"] for e in run.epochs if "val_top1" in e])]
        mean = [fmean(values) for values in zip(*curves, strict=False)]  # as far as every seed has got
        tails += [value for c in curves for value in c[len(c) // 3 :]]
        for axes in (whole, upper) if mean else ():
            for c in curves:
                axes.plot(range(1, len(c) + 1), c, c=group.color, lw=0.7, alpha=0.45)
            axes.plot(range(1, len(mean) + 1), mean, "o-", markevery=[-1], c=group.color, label=_in_legend(group.label))
    if not tails:
        return ""
    for axes, title in (whole, "validation top-1, %"), (upper, "the same, enlarged"):
        axes.set(xlabel="epoch", title=title)
        axes.locator_params(axis="x", integer=True)
    margin = 0.05 * (max(tails) - min(tails)) or 1
    upper.set_ylim(min(tails) - margin, max(tails) + margin)
    whole.legend(loc="lower right")
    return svg(figure, "curves")


def _terms(group: Group) -> str:
    """A small panel for each number that the training logged by step: each seed faint, and its smoothed line on top."""
    from matplotlib.figure import Figure

    logged = {key for run in group.runs for step in run.steps for key in step}
    names = [name for name in ("loss", *TERMS, "top1", "lr") if name in logged]
    if not names:
        return ""
    figure = Figure(figsize=(11, 1.9 * (rows := -(-len(names) // 4))), layout="constrained")
    for i, name in enumerate(names):
        axes = figure.add_subplot(rows, 4, i + 1)
        smooth: list[float] = []
        for run in group.runs:
            points = [(s["step"], v) for s in run.steps if isinstance(v := s.get(name), int | float) and isfinite(v)]
            width = len(points) // 60 + 1
            bins = [zip(*points[start : start + width], strict=True) for start in range(0, len(points), width)]
            means = [[fmean(column) for column in columns] for columns in bins]
            for line, style in (points[:: len(points) // 600 + 1], dict(lw=0.6, alpha=0.16)), (means, dict(lw=1.3)):
                axes.plot([x for x, _ in line], [y for _, y in line], color=group.color, **style)
            smooth += [y for _, y in means]
        axes.set_title({"top1": "top-1 on training batches, %", "lr": "learning rate"}.get(name, name))
        if min(smooth, default=0) > 0 and max(smooth) > 20 * min(smooth) and name not in ("top1", "lr"):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
    return svg(figure, "terms")


def _in_legend(label: str) -> str:
    """A label of which matplotlib's legend shows every character; it leaves out labels that begin with "_"."""
    text = one_line(label, most=40)
    return f"\u200b{text}" if text.startswith("_") else text
