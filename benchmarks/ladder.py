"""Does a network without token mixers keep its accuracy, trained the RIFormer way? The paper's ladder, on glyphs.

Rungs by budgets by seeds, as ordinary runs: the smallest budget is 3 epochs, about 1,000 steps. Every seed has its own
teachers, and a rung's difference from another is taken seed by seed. What is finished is kept in results/ladder, a file
a run, and not run again; a run that was interrupted goes on exactly. The data are those of `data/glyphs.py`.

    python benchmarks/ladder.py --root FOLDER-OF-GLYPHS.NPZ --jobs 2
    python benchmarks/ladder.py --table
"""

import argparse
import hashlib
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from common import RESULTS
from rich.console import Console

from riformer.atomic import write_text
from riformer.config import Recipe, to_dict
from riformer.progress import TrainProgress
from riformer.recipes import RUNGS, glyphs, quickstart
from riformer.study.ladder import run_ladder
from riformer.train.run import Run

LADDER = RESULTS / "ladder"
EPOCHS = 3
RUNGS_RUN = ("mixer", "identity", "deleted", "hard", "soft", "affine", "imitation", "full", "labels-long")
PLAN = (  # rungs, budget, seeds: what is measured, in the order of its worth
    (RUNGS_RUN, 1, (0, 1, 2)),
    (("mixer", "deleted", "full", "mixer-last"), 3, (0, 1, 2)),
    (("mixer-last", "overlap", "mixer-first", "fitted", "deeper"), 1, (0, 1, 2)),
    (("mixer", "deleted", "full"), 9, (0,)),
    (("overlap", "soft"), 3, (0, 1, 2)),
    (RUNGS_RUN, 1, (3, 4)),
)
SMOKE = ((("identity", "full"), 1, (0, 1)),)
PAIRS = (  # what the second adds to the first
    *(("identity", "mixer"), ("identity", "deleted"), ("identity", "hard"), ("identity", "soft"), ("soft", "affine")),
    *(("affine", "imitation"), ("imitation", "full"), ("deleted", "full"), ("labels-long", "full"), ("full", "mixer")),
)
T_QUANTILE = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""97.5 % of Student's distribution, by the number of pairs."""


def recipe_of(rung: str, budget: int, root: str, smoke: bool) -> Recipe:
    """A rung at so many times the smallest budget, its teacher trained as long as the student."""
    base = quickstart() if smoke else glyphs()
    epochs = (1 if smoke else EPOCHS) * budget
    base = replace(
        base,
        name=f"{base.name}-{budget}x",
        data=replace(base.data, root=root),
        teacher=replace(base.teacher, epochs=epochs),
        optim=replace(base.optim, epochs=epochs, warmup_epochs=0.1 * epochs),
    )
    return RUNGS[rung](base)


def record(rung: str, budget: int, run: Run) -> dict[str, Any]:
    """What is kept of a finished run: enough for every table, and to tell whether a repetition learned the same."""
    recipe, evaluation, lines = run.recipe(), run.read("evaluation.json") or {}, run.metrics()
    losses = [line["loss"] for line in lines if line["kind"] == "step"]
    recipe = replace(recipe, data=replace(recipe.data, root=""))
    return {
        **{"rung": rung, "budget": budget, "seed": recipe.seed, "steps": len(losses), "split": evaluation["split"]},
        "top1": {name: model["top1"] for name, model in evaluation["models"].items()},
        "val_top1": [line["val_top1"] for line in lines if line["kind"] == "epoch"],
        "seconds": sum(line["seconds"] for line in lines if line["kind"] == "epoch"),
        "losses_sha256": hashlib.sha256(json.dumps(losses).encode()).hexdigest(),
        "params": evaluation["models"]["deploy"]["params"],
        "macs": evaluation["models"]["deploy"]["macs"],
        "env": {key: evaluation[key] for key in ("date", "riformer", "torch", "timm", "device")},
        "recipe": to_dict(recipe),
    }


def table(records: list[dict[str, Any]]) -> str:
    """Accuracy of each rung at each budget, and what one adds to another, paired by seed, with 95 % intervals."""
    found: dict[tuple[str, int], dict[int, float]] = defaultdict(dict)
    for one in records:
        found[one["rung"], one["budget"]][one["seed"]] = one["top1"]["deploy"]
    budgets = sorted({budget for _, budget in found})
    rungs = [rung for rung in RUNGS if any((rung, budget) in found for budget in budgets)]
    steps = {one["budget"]: one["steps"] for one in records if one["rung"] != "labels-long"}
    lines = [["", *(f"{steps[budget]:,} steps" for budget in budgets)], ["---"] * (1 + len(budgets))]
    for rung in rungs:
        scores = [list(found.get((rung, budget), {}).values()) for budget in budgets]
        lines.append([rung, *(_mean(values) for values in scores)])
    lines += [["**the second beside the first**", *[""] * len(budgets)]]
    for first, second in PAIRS:
        cells = []
        for budget in budgets:
            a, b = found.get((first, budget), {}), found.get((second, budget), {})
            cells.append(_interval([b[seed] - a[seed] for seed in sorted(a.keys() & b.keys())]))
        if any(cells):
            lines.append([f"{first} → {second}", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _mean(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.2f} (1 seed)" if values else ""
    return f"{fmean(values):.2f} ± {stdev(values):.2f} ({len(values)} seeds)"


def _interval(differences: list[float]) -> str:
    if len(differences) < 2:
        return f"{differences[0]:+.2f} (1 seed)" if differences else ""
    half = T_QUANTILE[len(differences)] * stdev(differences) / len(differences) ** 0.5
    mean = fmean(differences)
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def read(folder: Path) -> list[dict[str, Any]]:
    """The records in a folder."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="", help="folder with glyphs.npz (default: ~/.cache/riformer)")
    parser.add_argument("--runs", type=Path, default=Path("runs/ladder"), help="folder of the run folders")
    parser.add_argument("--out", type=Path, default=LADDER, help="folder of the records")
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side")
    parser.add_argument("--table", action="store_true", help="print what is recorded, run nothing")
    parser.add_argument(
        "--smoke", action="store_true", help="two rungs and two seeds on digits, to see that it all runs"
    )
    given = parser.parse_args()
    console = Console(width=160)
    for rungs, budget, seeds in () if given.table else SMOKE if given.smoke else PLAN:
        recipes = {rung: recipe_of(rung, budget, given.root, given.smoke) for rung in rungs}
        with TrainProgress(console) as progress:
            finished = run_ladder(list(recipes.values()), seeds, given.runs, progress, given.jobs)
        for (seed, rung), run in zip(((s, r) for s in seeds for r in rungs), finished, strict=True):
            write_text(given.out / f"{rung}-{budget}x-seed{seed}.json", json.dumps(record(rung, budget, run)) + "\n")
    console.print(table(read(given.out)), markup=False, highlight=False)


if __name__ == "__main__":
    main()
