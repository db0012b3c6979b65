"""Rungs of a ladder compared: accuracy by rung, budget and seed, and paired differences with 95 % intervals.

A record is what is kept of a finished run. It is small, and all tables are computed from records.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from math import log2, sqrt
from statistics import fmean, stdev
from typing import Any

from riformer.config import Recipe, from_dict, reset_unused, to_dict, upgrade
from riformer.recipes import RUNGS
from riformer.train.run import Run

Record = dict[str, Any]

# Pairs of rungs, of which the second is compared with the first: the steps of the paper, then controls and additions.
STEPS = [
    (before, after)
    for before, afters in (
        ("identity", "mixer hard soft"),
        ("soft", "affine"),
        ("affine", "imitation"),
        ("imitation", "full"),
        ("identity", "full"),
        ("full", "mixer"),
        ("identity", "deleted"),
        ("deleted", "mixer full"),
        ("labels-long", "full"),
        ("hard", "hard-alone"),
        ("soft", "soft-labels soft-t2 soft-t4"),
        ("affine", "start imitation-block imitation-mixer imitation-relation"),
        ("imitation", "imitation-constant imitation-first-phase"),
        ("start", "full"),
        ("full", "fitted mixer-first mixer-last overlap"),
        ("deleted", "deeper overlap mixer-last"),
        ("mixer-last", "mixer"),
        ("mixer", "overlap"),
    )
    for after in afters.split()
]
MAIN_RUNGS = ("mixer", "full", "deleted")
CONVERGED = 0.3
"""Points: where a doubled budget adds less to labels alone, the ladder counts as converged."""

# 97.5 % of Student's distribution with 1, 2, ... degrees of freedom.
T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)


def record(run: Run) -> Record:
    """The record of a finished run; its checksum shows whether a repeated run has equal losses bit for bit.

    Raises:
        ValueError: the run is not finished.
    """
    if not is_finished(run):
        raise ValueError(f"{run.path} is not finished: give its command again")
    recipe, evaluation, lines = run.recipe(), run.read("evaluation.json") or {}, run.metrics()
    losses = [line["loss"] for line in lines if line["kind"] == "step"]
    trained = run.read("env.json") or {}
    ladder, rung = split_name(recipe.name)
    return {
        **{"ladder": ladder, "rung": rung, "seed": recipe.seed, "steps": len(losses), "run": run.path.name},
        **{"split": evaluation["split"], "num_images": evaluation["num_images"]},
        "top1": {name: model["top1"] for name, model in evaluation["models"].items()},
        **{name: evaluation["models"]["deploy"][name] for name in ("params", "macs")},
        "val_top1": [line["val_top1"] for line in lines if line["kind"] == "epoch"],
        "losses_sha256": hashlib.sha256(json.dumps(losses).encode()).hexdigest(),
        "env": {key: trained.get(key) for key in ("date", "riformer", "torch", "timm", "device", "num_threads")},
        "recipe": to_dict(replace(recipe, data=replace(recipe.data, root=""))),
    }


def split_name(name: str) -> tuple[str, str]:
    """The ladder and the rung in a recipe's name: `glyphs-3x-soft` is `glyphs-3x` and `soft`."""
    rung = max((rung for rung in RUNGS if name.endswith(f"-{rung}")), key=len, default="full")
    return name.removesuffix(f"-{rung}"), rung


@dataclass(frozen=True)
class Difference:
    """Points that the second of two rungs is ahead of the first, seed by seed."""

    by_seed: dict[int, float]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return fmean(self.by_seed.values())

    @property
    def half(self) -> float | None:
        """Half the 95 % interval of the mean, by Student's distribution; None with one seed."""
        num = len(self.by_seed)
        if num < 2:
            return None
        quantile = T_QUANTILES[num - 2] if num - 2 < len(T_QUANTILES) else 1.96 + 2.5 / (num - 1)
        return quantile * stdev(self.by_seed.values()) / sqrt(num)

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.half is not None and abs(self.mean) > self.half

    def __str__(self) -> str:
        if self.half is None:
            return f"{self.mean:+.2f} (1 seed)"
        return f"{self.mean:+.2f} [{self.mean - self.half:+.2f}, {self.mean + self.half:+.2f}]"


class Comparison:
    """Records of one study: rungs, and ladders of different budgets, each with its seeds.

    Raises:
        ValueError: there are no records, their images differ, or two runs of one rung and ladder have the same seed or
            differ in other settings than the seed.
    """

    def __init__(self, records: Iterable[Record]):
        self.records = sorted(records, key=lambda r: (r["ladder"], r["rung"], r["seed"]))
        images = {(r["recipe"]["data"]["name"], r["split"], r["num_images"]) for r in self.records}
        if len(images) != 1:
            problem = (
                f"these are of {sorted(images)}" if images else "none is finished: give the ladder's command again"
            )
            raise ValueError(f"a comparison needs finished runs on the same images, but {problem}")
        self.data, self.split, self.num_images = images.pop()
        recipes: dict[tuple[str, str], Recipe] = {}
        seen: dict[tuple[str, str, int], str] = {}
        for r in self.records:
            name, rung, recipe = r["ladder"], r["rung"], reset_unused(from_dict({**upgrade(r["recipe"]), "seed": 0}))
            if (twin := seen.setdefault((name, rung, r["seed"]), r["run"])) != r["run"]:
                raise ValueError(f"{twin} and {r['run']} are the same rung, ladder and seed; leave one out")
            if recipes.setdefault((name, rung), recipe) != recipe:
                raise ValueError(f"{r['run']} has other settings than the same rung with other seeds")

    @cached_property
    def steps(self) -> dict[str, int]:
        """Steps of each ladder by name, the smallest number first; not those of labels-long, which has more."""
        records = [r for r in self.records if r["rung"] != "labels-long"] or self.records
        steps = {r["ladder"]: r["steps"] for r in records}
        return dict(sorted(steps.items(), key=lambda item: item[1]))

    @cached_property
    def ladders(self) -> list[str]:
        """Names of the ladders, the smallest budget first."""
        return list(self.steps)

    @cached_property
    def rungs(self) -> list[str]:
        """The rungs that were run, in the order of `RUNGS`."""
        ran = {r["rung"] for r in self.records}
        return [rung for rung in RUNGS if rung in ran]

    def top1(self, ladder: str, rung: str) -> dict[int, float]:
        """Accuracy in deploy form by seed, percent."""
        return {r["seed"]: r["top1"]["deploy"] for r in self.records if (r["ladder"], r["rung"]) == (ladder, rung)}

    def difference(self, ladder: str, first: str, second: str) -> Difference | None:
        """What `second` adds to `first`, over the seeds with which both were run; None without any."""
        a, b = self.top1(ladder, first), self.top1(ladder, second)
        seeds = sorted(a.keys() & b.keys())
        return Difference({seed: b[seed] - a[seed] for seed in seeds}) if seeds else None

    def differences(self) -> list[tuple[str, str, list[Difference | None]]]:
        """Every pair of STEPS that was run, with a difference for each ladder."""
        rows = [
            (first, second, [self.difference(name, first, second) for name in self.ladders]) for first, second in STEPS
        ]
        return [row for row in rows if any(row[2])]

    def gain_of_doubling(self, rung: str) -> tuple[str, str, Difference] | None:
        """The two largest budgets of a rung, and the points that each doubling between them added to it, by seed."""
        for small, large in reversed([*pairwise(self.ladders)]):
            before, after = self.top1(small, rung), self.top1(large, rung)
            doublings = log2(self.steps[large] / self.steps[small])
            if doublings and (seeds := sorted(before.keys() & after.keys())):
                return small, large, Difference({seed: (after[seed] - before[seed]) / doublings for seed in seeds})
        return None

    def headline(self) -> list[str]:
        """The results in sentences: full against mixer at each budget, and whether labels alone have converged."""
        sentences = [
            self._verdict(ladder, ahead)
            for ladder in reversed(self.ladders)
            if (ahead := self.difference(ladder, "mixer", "full"))
        ]
        if doubling := self.gain_of_doubling("deleted"):
            small, large, gain = doubling
            limit = f"below the {CONVERGED} that count as converged"
            if gain.mean >= CONVERGED:
                limit = f"above {CONVERGED}, so that this has not converged"
            sentences.append(
                f"Between {self.steps[small]:,} and {self.steps[large]:,} steps each doubling adds {gain} points to "
                f"labels alone without mixers: {limit}."
            )
        return sentences

    def _verdict(self, ladder: str, ahead: Difference) -> str:
        verb = "ahead of" if ahead.mean > 0 else "behind"
        detail = "1 seed" if ahead.half is None else f"{ahead}, {len(ahead.by_seed)} seeds"
        text = (
            f"After {self.steps[ladder]:,} steps on {self.data}, the full recipe is {abs(ahead.mean):.2f} points "
            f"{verb} the network that keeps its mixers ({detail})."
        )
        gains = {rung: self.difference(ladder, "deleted", rung) for rung in self.rungs}
        if (gap := gains.get("mixer")) and (full := gains.get("full")):
            text += f" Mixers are worth {gap} points to labels alone; the full recipe without them {full}"
            others = [(gain.mean, rung) for rung, gain in gains.items() if gain and rung not in MAIN_RUNGS]
            if others and max(others)[0] > full.mean:
                text += f", {max(others)[1]} {gains[max(others)[1]]}"
            text += "."
        return text


def markdown(comparison: Comparison, published: dict[str, float]) -> str:
    """The ladder beside the paper's numbers, and the differences between rungs, as Markdown."""
    budgets = [f"{comparison.steps[name]:,} steps" for name in comparison.ladders]
    lines = [["", "paper", *budgets], ["---"] * (2 + len(budgets))]
    for rung in comparison.rungs:
        quoted = f"{published[rung]:.2f}" if rung in published else ""
        lines.append([rung, quoted, *(mean(comparison.top1(name, rung).values()) for name in comparison.ladders)])
    ladder = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    lines = [["the second beside the first", "paper", *budgets], ["---"] * (2 + len(budgets))]
    for first, second, differences in comparison.differences():
        quoted = f"{published[second] - published[first]:+.2f}" if {first, second} <= published.keys() else ""
        lines.append([f"{first} → {second}", quoted, *(str(d) if d else "" for d in differences)])
    return ladder + "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mean(values: Iterable[float]) -> str:
    """Mean, standard deviation and number of seeds."""
    values = list(values)
    if len(values) < 2:
        return f"{values[0]:.2f} (1 seed)" if values else ""
    return f"{fmean(values):.2f} ± {stdev(values):.2f} ({len(values)} seeds)"


def is_finished(run: Run) -> bool:
    """Whether the run has trained all its epochs and was evaluated."""
    return run.is_trained() and run.read("evaluation.json") is not None
