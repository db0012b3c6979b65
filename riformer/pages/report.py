"""One self-contained HTML page from run folders; its wording and layout are in report.html beside this file.

Nothing but run folders is read, and no number is typed: each is computed here from the files that the runs left.
"""

import base64
import json
import os
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import isfinite
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from riformer.atomic import write_text
from riformer.config import Recipe, to_dict, upgrade
from riformer.distill.objective import TERMS
from riformer.pages.style import ACCENT, GREY, PALETTE, drawing, environment, svg
from riformer.train.run import Run

MATRIX_CLASSES = 20  # up to which the confusion is shown as a matrix
ELSEWHERE = ("data.root", "data.num_workers")  # settings that may differ between two runs of one recipe


@dataclass(frozen=True)
class RunRecord:
    """What one run folder holds, as far as the run has got; what is missing is empty."""

    path: Path
    recipe: dict[str, Any]
    env: dict[str, Any]
    data: dict[str, Any]
    evaluation: dict[str, Any]
    steps: list[dict[str, Any]]
    epochs: list[dict[str, Any]]
    num_broken_lines: int
    teacher: "RunRecord | None"

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The recipe by dotted names; knobs that it lacks have their default."""
        return _flat(to_dict(Recipe())) | _flat(self.recipe)

    @property
    def device(self) -> str:
        """What the run was evaluated on, or is being trained on."""
        return _device(self.evaluation or self.env)

    @property
    def seconds(self) -> float:
        """Time in epochs, those of the run's own teacher included."""
        return sum(e.get("seconds", 0) for e in self.epochs) + (self.teacher.seconds if self.teacher else 0)


@dataclass(frozen=True)
class Group:
    """The runs of one recipe, which differ in nothing but their seeds."""

    label: str
    runs: list[RunRecord]
    color: str = ACCENT

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe by dotted names."""
        return self.runs[0].settings

    @property
    def teachers(self) -> set[str]:
        """The names under `logit_teacher` and `module_teacher`; a recipe without any learns from labels only."""
        named = self.settings["distill.logit_teacher"]
        several = [named] if isinstance(named, str) else named or []
        return {*several, self.settings["distill.module_teacher"]} - {"", None}

    @property
    def top1s(self) -> list[float]:
        """Accuracy of each finished run in deploy form, percent."""
        return _collect(self.runs, "evaluation", "models", "deploy", "top1")

    def scores(self) -> dict[tuple, float]:
        """Accuracy by what two runs must share to be a pair: data set, split, number of images, seed."""
        found: dict[tuple, list[float]] = {}
        for run in self.runs:
            same = (run.settings["data.name"], *[run.evaluation.get(k) for k in ("split", "num_images")])
            for top1 in _collect([run], "evaluation", "models", "deploy", "top1"):
                found.setdefault((*same, run.settings["seed"]), []).append(top1)
        return {key: fmean(values) for key, values in found.items()}


def write_report(runs: Sequence[Path], destination: Path) -> Path:
    """Writes one HTML file about the runs in the given folders, found at any depth; returns its path.

    Raises:
        ValueError: a folder holds no run, or a file of a run cannot be read.
        RuntimeError: matplotlib or jinja2 is not installed.
    """
    pages = environment()
    from matplotlib.ticker import MaxNLocator

    groups = _groups(_find(runs))
    main, baseline = groups[0], _baseline(groups)
    with drawing():
        figures = {"curves": _curves(groups), "panels": _terms(main)}
    pages.filters.update(pm=_pm, mean=fmean, collect=_collect, spread=_spread, provenance=_provenance)
    pages.filters.update(
        quote=lambda path: shlex.quote(str(path)),
        pretty=lambda value: json.dumps(value, indent=2, ensure_ascii=False),
        ticks=lambda values: list(MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(min(values), max(values))),
        png_width=lambda png: int.from_bytes(base64.b64decode(png[:32])[16:20], "big"),  # stands in its header
    )
    runs_of = dict(groups=groups, main=main, baseline=baseline, runs=[run for group in groups for run in group.runs])
    numbers = dict(compare=_compare, confusion=_confusion(main), settings=_settings(groups), terms=TERMS, **figures)
    page = pages.get_template("report.html").render(**runs_of, **numbers)
    write_text(destination, page.strip().encode("utf-8", "replace").decode())  # some file names are not UTF-8
    return Path(destination)


def _find(paths: Iterable[Path]) -> list[RunRecord]:
    folders: dict[Path, Path] = {}
    for path in paths:
        inside = {}
        for folder, inner, files in os.walk(path):
            inner.sort()
            if "recipe.json" in files:
                inner.clear()  # what lies in a run belongs to it, such as its teacher
                inside[Path(folder).resolve()] = Path(folder)
        if not inside:
            raise ValueError(f"no run in {path}: a run folder is what `riformer train` writes, with its recipe.json")
        folders |= inside
    if not folders:
        raise ValueError("no folder given: a report needs one run folder or more, as `riformer train` writes them")
    return [_read_run(folder) for folder in folders.values()]


def _read_run(path: Path) -> RunRecord:
    records: dict[str, dict[int, Any]] = {"step": {}, "epoch": {}}
    num_broken = 0
    metrics = path / "metrics.jsonl"
    for line in metrics.read_text("utf-8", "replace").splitlines() if metrics.is_file() else ():
        try:
            record = json.loads(line)
            records[record["kind"]][int(record[record["kind"]])] = record  # the last one counts after a resume
        except (ValueError, KeyError, TypeError):
            num_broken += 1
    steps, epochs = ([found[k] for k in sorted(found)] for found in records.values())
    teacher = _read_run(path / "teacher") if (path / "teacher" / "recipe.json").is_file() else None
    parts: dict[str, Any] = {n: Run(path).read(f"{n}.json") or {} for n in ("recipe", "env", "data", "evaluation")}
    parts["recipe"] = upgrade(parts["recipe"])
    return RunRecord(path, steps=steps, epochs=epochs, num_broken_lines=num_broken, teacher=teacher, **parts)


def _groups(runs: list[RunRecord]) -> list[Group]:
    """Runs by recipe: the first distilled one in front, then the others as given."""
    found: dict[str, list[RunRecord]] = {}
    for run in runs:
        what = {k: v for k, v in run.settings.items() if k != "seed" and k not in ELSEWHERE}
        found.setdefault(json.dumps(what, sort_keys=True), []).append(run)
    groups: list[Group] = []
    for members in found.values():
        settings = members[0].settings
        label = str(settings["name"])
        twin = next((g for g in groups if g.settings["name"] == settings["name"]), None)
        if twin:  # the same name with other settings: say which
            other = [k for k in settings if settings[k] != twin.settings.get(k) and k not in ("seed", *ELSEWHERE)]
            label += f" ({', '.join(f'{k} {settings[k]}' for k in other)})"
        groups.append(Group(label, sorted(members, key=lambda run: run.settings["seed"])))
    main = min(groups, key=lambda g: (not g.teachers, not g.top1s))
    others = [g for g in groups if g is not main]
    return [main] + [replace(g, color=PALETTE[i % len(PALETTE)]) for i, g in enumerate(others)]


def _baseline(groups: list[Group]) -> Group | None:
    """The recipe on labels only, without a mixing token mixer, that has the fewest epochs."""
    plain = [g for g in groups if not g.teachers and g.settings["model.mixer"] in ("affine", "identity")]
    return min(plain, key=lambda g: g.settings["optim.epochs"]) if plain and len(groups) > 1 else None


def _compare(left: Group, right: Group) -> dict[str, Any]:
    """Points of accuracy that `left` is ahead of `right`, by seed, and how much chance could have to do with it."""
    a, b = left.scores(), right.scores()
    pairs = sorted((key[-1], a[key] - b[key]) for key in a.keys() & b.keys()) if left is not right else []
    values = [value for _, value in pairs]
    if not values:
        return dict(n=0)
    signs = dict(won=sum(value > 0 for value in values), agree=min(values) > 0 or max(values) < 0)
    ends = dict(mean=fmean(values), low=min(values), high=max(values))
    return dict(n=len(values), pairs=pairs, luck=2 ** (len(values) - 1), **signs, **ends)


def _spread(runs: list[RunRecord], *keys: str) -> dict[str, float] | None:
    """Median of the runs' medians between the lowest low and highest high, of runs timed on the first one's device."""
    timed = [(run.device, value) for run in runs for value in _collect([run], "evaluation", *keys)]
    same = [value for device, value in timed if device == timed[0][0] and value.get("median")]
    if not same:
        return None
    ends = {key: end(v.get(key, v["median"]) for v in same) for key, end in (("low", min), ("high", max))}
    return dict(ends, median=median(v["median"] for v in same))


def _confusion(group: Group) -> dict[str, Any]:
    """Counts summed over the group's runs: all of them where the classes are few, and the most confused pairs.

    Returns:
        The runs, the number of classes, `counts` with true classes in rows, and pairs as (count, true, predicted).
    """
    runs = [run for run in group.runs if run.evaluation.get("confusion")]
    runs = [run for run in runs if run.data.get("classes") == runs[0].data.get("classes")]
    total: Counter[tuple[int, int]] = Counter()
    for run in runs:
        total.update(_cells(run.evaluation["confusion"]))
    num_classes = max([len(runs[0].data.get("classes") or ()), *(1 + max(pair) for pair in total)]) if runs else 0
    indices = range(num_classes if num_classes <= MATRIX_CLASSES else 0)
    errors = [(count, *pair) for pair, count in total.items() if pair[0] != pair[1]]
    return dict(
        runs=runs,
        num_classes=num_classes,
        counts=[[total[i, j] for j in indices] for i in indices],
        pairs=sorted(errors, key=lambda error: (-error[0], error[1:]))[:12],
    )


def _cells(confusion: Any) -> dict[tuple[int, int], int]:
    """Counts by (true, predicted): of a dict of dicts, or of the whole matrix, as older runs have it."""

    def items(row: Any) -> Iterable[tuple[Any, Any]]:
        return row.items() if isinstance(row, dict) else enumerate(row)

    return {(int(i), int(j)): count for i, row in items(confusion) for j, count in items(row) if count}


def _settings(groups: list[Group]) -> list[tuple[str, Any, list[Any]]]:
    """Name, default and each recipe's value, where any recipe departs from the default."""
    default = _flat(to_dict(Recipe()))
    rows = [(k, default.get(k), [g.settings.get(k) for g in groups]) for k in groups[0].settings]
    return [row for row in rows if row[0] not in ("name", "seed") and any(value != row[1] for value in row[2])]


def _provenance(runs: Sequence[RunRecord], source: str = "evaluation") -> str:
    """Seeds, devices, versions and dates behind a number, in one line."""
    records = [(run.evaluation if source == "evaluation" else {}) or run.env for run in runs]
    found = {
        "seeds" if len(runs) > 1 else "seed": [run.settings["seed"] for run in runs],
        "": [_device(r) for r in records],
        **{name: [r.get("versions", r).get(name) for r in records] for name in ("riformer", "torch", "timm")},
        " ": [str(r["date"])[:10] for r in records if "date" in r],
    }
    known = {name: dict.fromkeys(str(v) for v in values if v is not None) for name, values in found.items()}
    return " · ".join(f"{name} {', '.join(values)}".strip() for name, values in known.items() if values)


def _collect(runs: Iterable[RunRecord], part: str, *keys: str) -> list[Any]:
    """The value at `keys` in the given part of each run, for the runs that have one."""
    found = []
    for run in runs:
        value = getattr(run, part)
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        found += [value] if value is not None else []
    return found


def _device(record: dict[str, Any]) -> str:
    threads = record.get("num_threads")
    return str(record.get("device", "unknown device")) + (
        f" ({threads} thread{'s' * (threads != 1)})" if threads else ""
    )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, v in values.items():
        plain = list(v) if isinstance(v, tuple) else v  # as JSON has it
        flat |= _flat(v, f"{prefix}{key}.") if isinstance(v, dict) else {prefix + key: plain}
    return flat


def _pm(values: Sequence[float]) -> str:
    """Mean and, from two values on, sample standard deviation."""
    return (f"{fmean(values):.2f}" if values else "–") + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def _curves(groups: list[Group]) -> str:
    """Validation accuracy by epoch: all of it, and its upper end enlarged."""
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
            axes.plot(range(1, len(mean) + 1), mean, "o-", markevery=[-1], c=group.color, label=_short(group.label))
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
    """A small panel for each number that the training logged by step: every seed faint, and smoothed on top."""
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


def _short(text: str, most: int = 40) -> str:
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    return text if len(text) <= most else text[: most - 1] + "…"
