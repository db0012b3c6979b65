"""Contents of run folders, grouped by recipe, and the numbers that the report computes from several runs."""

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean, median
from typing import Any

from riformer.config import Recipe, to_dict, upgrade
from riformer.model.mixers import MIXERS, Identity
from riformer.pages.style import ACCENT, PALETTE
from riformer.train.run import Run

MATRIX_CLASSES = 20  # up to which the confusion is shown as a matrix
ELSEWHERE = ("data.root", "data.num_workers")  # settings that may differ between two runs of one recipe


@dataclass(frozen=True)
class RunRecord:
    """Contents of one run folder, finished or not; what is missing is empty."""

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
        """The recipe by dotted names; settings that it lacks have their default."""
        return _flat(to_dict(Recipe())) | _flat(self.recipe)

    @property
    def device(self) -> str:
        """What the run was evaluated on, or is being trained on."""
        return device_of(self.evaluation or self.env)

    @property
    def seconds(self) -> float:
        """Time in epochs, those of the run's own teacher included."""
        return sum(e.get("seconds", 0) for e in self.epochs) + (self.teacher.seconds if self.teacher else 0)


@dataclass(frozen=True)
class Group:
    """The runs of one recipe, which differ only in their seeds."""

    label: str
    runs: list[RunRecord]
    color: str = ACCENT

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe by dotted names."""
        return self.runs[0].settings

    @property
    def teachers(self) -> set[str]:
        """The values of `logit_teacher` and `module_teacher`; a recipe without any learns from labels only."""
        return {*_listed(self.settings["distill.logit_teacher"]), self.settings["distill.module_teacher"]} - {"", None}

    @property
    def mixes_tokens(self) -> bool:
        """Whether the network has token mixers that no fuse removes; its two forms are then the same network."""
        mixers = [MIXERS.get(name) for name in _listed(self.settings["model.mixer"])]
        fusible = all(mixer is Identity or hasattr(mixer, "fold_into") for mixer in mixers)
        return not fusible or not str(self.settings["model.name"]).startswith("riformer_")

    @property
    def top1s(self) -> list[float]:
        """Accuracy of each finished run in deploy form, percent."""
        return collect(self.runs, "evaluation", "models", "deploy", "top1")

    def scores(self) -> dict[tuple, float]:
        """Accuracy by what two runs must share to be paired: data set, split, number of images, seed."""
        by_key: dict[tuple, list[float]] = {}
        for run in self.runs:
            same = (run.settings["data.name"], *[run.evaluation.get(k) for k in ("split", "num_images")])
            for top1 in collect([run], "evaluation", "models", "deploy", "top1"):
                by_key.setdefault((*same, run.settings["seed"]), []).append(top1)
        return {key: fmean(values) for key, values in by_key.items()}


def find_runs(paths: Iterable[Path]) -> list[RunRecord]:
    """The runs in these folders, at any depth; a run's own teacher belongs to it.

    Raises:
        ValueError: a folder holds no run, or a file of a run cannot be read.
    """
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
    steps, epochs = ([by_number[k] for k in sorted(by_number)] for by_number in records.values())
    teacher = _read_run(path / "teacher") if (path / "teacher" / "recipe.json").is_file() else None
    parts: dict[str, Any] = {n: Run(path).read(f"{n}.json") or {} for n in ("recipe", "env", "data", "evaluation")}
    parts["recipe"] = upgrade(parts["recipe"])
    return RunRecord(path, steps=steps, epochs=epochs, num_broken_lines=num_broken, teacher=teacher, **parts)


def group_runs(runs: list[RunRecord]) -> list[Group]:
    """Runs by recipe: the first distilled recipe, then the others in the given order."""
    by_recipe: dict[str, list[RunRecord]] = {}
    for run in runs:
        recipe = {k: v for k, v in run.settings.items() if k != "seed" and k not in ELSEWHERE}
        by_recipe.setdefault(json.dumps(recipe, sort_keys=True), []).append(run)
    groups: list[Group] = []
    for members in by_recipe.values():
        settings = members[0].settings
        label = str(settings["name"])
        twin = next((g for g in groups if g.settings["name"] == settings["name"]), None)
        if twin:  # the same name with other settings: name them
            other = [k for k in settings if settings[k] != twin.settings.get(k) and k not in ("seed", *ELSEWHERE)]
            label += f" ({', '.join(f'{k} {settings[k]}' for k in other)})"
        groups.append(Group(label, sorted(members, key=lambda run: run.settings["seed"])))
    main = min(groups, key=lambda g: (not g.teachers, not g.top1s))
    others = [g for g in groups if g is not main]
    return [main] + [replace(g, color=PALETTE[i % len(PALETTE)]) for i, g in enumerate(others)]


def baseline_of(groups: list[Group]) -> Group | None:
    """The recipe that learns from labels only, without token mixers, and has the fewest epochs."""
    plain = [g for g in groups if not g.teachers and g.settings["model.mixer"] in ("affine", "identity")]
    return min(plain, key=lambda g: g.settings["optim.epochs"]) if plain and len(groups) > 1 else None


def compare(left: Group, right: Group) -> dict[str, Any]:
    """Points of accuracy that `left` is ahead of `right`, by seed; by chance all signs agree once in `luck` times."""
    a, b = left.scores(), right.scores()
    pairs = sorted((key[-1], a[key] - b[key]) for key in a.keys() & b.keys()) if left is not right else []
    values = [value for _, value in pairs]
    if not values:
        return dict(n=0)
    signs = dict(won=sum(value > 0 for value in values), agree=min(values) > 0 or max(values) < 0)
    ends = dict(mean=fmean(values), low=min(values), high=max(values))
    return dict(n=len(values), pairs=pairs, luck=2 ** (len(values) - 1), **signs, **ends)


def spread(runs: list[RunRecord], *keys: str) -> dict[str, float] | None:
    """Median of the medians, lowest low and highest high, of the runs that were timed on the first one's device."""
    timed = [(run.device, value) for run in runs for value in collect([run], "evaluation", *keys)]
    same = [value for device, value in timed if device == timed[0][0] and value.get("median")]
    if not same:
        return None
    ends = {key: end(v.get(key, v["median"]) for v in same) for key, end in (("low", min), ("high", max))}
    return dict(ends, median=median(v["median"] for v in same))


def confusion_of(group: Group) -> dict[str, Any]:
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


def settings_of(groups: list[Group]) -> list[tuple[str, Any, list[Any]]]:
    """Name, default and each recipe's value, of settings that differ from the default in any recipe."""
    default = _flat(to_dict(Recipe()))
    rows = [(k, default.get(k), [g.settings.get(k) for g in groups]) for k in groups[0].settings]
    return [row for row in rows if row[0] not in ("name", "seed") and any(value != row[1] for value in row[2])]


def collect(runs: Iterable[RunRecord], part: str, *keys: str) -> list[Any]:
    """The value at `keys` in the given part of each run, of the runs that have one."""
    values = []
    for run in runs:
        value = getattr(run, part)
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        values += [value] if value is not None else []
    return values


def device_of(record: dict[str, Any]) -> str:
    """Device and number of threads of an environment or an evaluation."""
    threads = record.get("num_threads")
    return str(record.get("device", "unknown device")) + (
        f" ({threads} thread{'s' * (threads != 1)})" if threads else ""
    )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, v in values.items():
        plain = list(v) if isinstance(v, tuple) else v  # JSON has lists
        flat |= _flat(v, f"{prefix}{key}.") if isinstance(v, dict) else {prefix + key: plain}
    return flat


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else value or []
