"""Does a network without token mixers keep its accuracy, trained the RIFormer way? The paper's ladder, on glyphs.

Runs rungs at several budgets with several seeds, all ordinary runs of the recipe glyphs-riformer. Every seed has
its own teachers, and differences between rungs are taken seed by seed. A run of the smallest budget has about 2,000
steps and takes minutes on one core. Finished runs are recorded in results/ladder, one file each, and are not repeated;
interrupted ones resume exactly. The data are made by tools/glyphs.py.

    python benchmarks/ladder.py --root FOLDER-OF-GLYPHS.NPZ --jobs 2
    python benchmarks/ladder.py --root FOLDER-OF-GLYPHS.NPZ --gpu      RIFormer-S12 itself, at 64 px, 100 epochs
    python benchmarks/ladder.py --table                                what is recorded
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from options import RESULTS

from riformer.atomic import write_text
from riformer.cli.progress import TrainProgress
from riformer.config import ModelConfig, Recipe
from riformer.measure.quoted import LADDER
from riformer.model.weights import load, save
from riformer.recipes import RUNGS, at_budget, glyphs_riformer
from riformer.sizes import VARIANTS
from riformer.study.comparison import Comparison, Record, markdown, record
from riformer.study.ladder import run_ladder
from riformer_runtime.cli.console import Console


class Part(NamedTuple):
    """Rungs at so many times the smallest budget, with these seeds."""

    rungs: tuple[str, ...]
    budget: int
    seeds: tuple[int, ...]


MAIN = ("mixer", "identity", "deleted", "hard", "soft", "affine", "imitation", "full", "labels-long")
TERMS = ("start", *(f"imitation-{part}" for part in ("block", "mixer", "relation", "constant", "first-phase")))
PLAN = (  # the most important first
    Part(MAIN, 1, (0, 1, 2)),
    Part(("mixer", "deleted", "full", "mixer-last", "overlap"), 3, (0, 1, 2)),
    Part(("mixer-last", "overlap", "mixer-first", "fitted"), 1, (0, 1, 2)),
    Part(("mixer", "deleted", "full", "overlap"), 9, (0,)),
    Part(MAIN, 1, (3, 4)),
    Part(("deeper",), 3, (0, 1, 2)),
    Part((*TERMS, "hard-alone", "soft-labels", "soft-t2", "soft-t4"), 1, (0, 1, 2)),
    Part(("soft",), 3, (0, 1, 2)),
    Part(("mixer", "deleted", "full", "overlap"), 9, (1, 2)),
)
GPU = (Part(("mixer", "deleted", "soft", "affine", "imitation", "full"), 1, (0, 1, 2)),)
SMOKE = (Part(("identity", "full"), 1, (0, 1)),)


def small() -> Recipe:
    """The recipe glyphs-riformer for 3 epochs, the smallest budget."""
    base = replace(glyphs_riformer(), name="glyphs")
    optim = replace(base.optim, epochs=3, warmup_epochs=0.1 * 3)
    return replace(base, teacher=replace(base.teacher, epochs=3), optim=optim)


def s12() -> Recipe:
    """RIFormer-S12 from a PoolFormer-S12 on glyphs of 64 pixels, where a token without mixing sees 63 of 64."""
    base = glyphs_riformer()
    optim = replace(base.optim, lr=2e-3, epochs=100, warmup_epochs=5, batch_size=512, precision="bf16", compile=True)
    return replace(
        base,
        name="glyphs-s12",
        data=replace(base.data, img_size=64, num_workers=8),
        model=ModelConfig(drop_path_rate=0.1),
        teacher=replace(base.teacher, mixer="pooling", epochs=100, lr=2e-3),
        optim=optim,
    )


def smoke(base: Recipe) -> Recipe:
    """One epoch on the built-in digits, 16 px, with the smallest network of as many stages, which is not compiled."""
    stages = len(VARIANTS[base.model.name]["depths"])
    model = replace(base.model, depths=(1,) * stages, dims=(16,) * stages)
    optim = replace(base.optim, epochs=1, warmup_epochs=0, batch_size=250, compile=False)
    data = replace(base.data, name="digits", root="", img_size=16, num_workers=0)
    return replace(base, data=data, model=model, teacher=replace(base.teacher, epochs=1), optim=optim)


def measure(base: Recipe, plan: tuple[Part, ...], runs: Path, out: Path, jobs: int, console: Console) -> None:
    """Runs the recipes that have no record yet, and records them. Finished run folders lend their teachers."""
    for part in plan:
        todo, lenders = [], []
        for seeded in (at_budget(replace(base, seed=seed), part.budget) for seed in part.seeds):
            missing = [recipe for rung in part.rungs if not file(out, recipe := RUNGS[rung](seeded)).exists()]
            lender = RUNGS["mixer"](seeded)
            if missing and lender not in missing and (runs / file(out, lender).stem).is_dir():
                lenders.append(lender)
            todo += missing
        with TrainProgress(console) as progress:
            finished = run_ladder([*lenders, *todo], runs, progress, jobs)
        for run in finished[len(lenders) :]:
            write_text(file(out, run.recipe()), json.dumps(record(run)) + "\n")


def keep_best(runs: Path, out: Path) -> None:
    """Writes the models with the highest validation accuracy beside the records: of all, and without token mixers."""
    records = [r for r in read(out) if (runs / r["run"]).is_dir()]
    plain = [r for r in records if r["recipe"]["model"]["mixer"] in ("affine", "identity", "nothing")]
    for name, among in (("best", records), ("best_riformer", plain)):
        if among:
            best = max(among, key=lambda r: max(r["val_top1"]))
            save(load(runs / best["run"]), out.with_name(f"{out.name}_{name}.safetensors"))


def file(out: Path, recipe: Recipe) -> Path:
    """The path of a run's record; the run folder has the same name."""
    return out / f"{recipe.name}-seed{recipe.seed}.json"


def read(folder: Path) -> list[Record]:
    """The records in a folder."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="", help="folder with glyphs.npz (default: ~/.cache/riformer)")
    parser.add_argument("--runs", type=Path, default=Path("runs/ladder"), help="folder of the run folders")
    parser.add_argument("--out", type=Path, help="folder of the records (default: results/ladder, or ladder_s12)")
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side")
    parser.add_argument("--gpu", action="store_true", help="RIFormer-S12 itself instead of a small network")
    parser.add_argument("--table", action="store_true", help="print what is recorded, run nothing")
    parser.add_argument("--smoke", action="store_true", help="two rungs and two seeds on digits, to see that all runs")
    given = parser.parse_args()
    console = Console(width=160)
    name = "ladder_s12" if given.gpu else "ladder"
    out = given.out or (given.runs / "records" if given.smoke else RESULTS / name)
    if not given.table:
        base, plan = (s12(), GPU) if given.gpu else (small(), PLAN)
        base = replace(base, data=replace(base.data, root=given.root))
        base, plan = (smoke(base), SMOKE) if given.smoke else (base, plan)
        measure(base, plan, given.runs, out, given.jobs, console)
        keep_best(given.runs, out)
    if not (records := read(out)):
        parser.error(f"nothing is recorded in {out}: run it without --table first")
    comparison = Comparison(records)
    console.print(markdown(comparison, LADDER), soft_wrap=True)
    for sentence in comparison.headline():
        console.print(sentence, soft_wrap=True)


if __name__ == "__main__":
    main()
