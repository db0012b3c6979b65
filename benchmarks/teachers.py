"""Which family of teachers is best? Each teaches the same small student, beside one that learns from labels alone.

Data are the built-in digits. Each teacher is trained on labels by the same loop, at 32 px; then the quickstart's
student (RIFormer micro, affines for mixers, 16 px) learns for the same number of steps from labels, from the teacher's
logits (soft labels without ground truth), and from its logits and modules (block, mixer and relation terms through
projections, fading by a cosine). The teacher sees the student's images at its own size. The student never starts from a
teacher's weights, so that only what is taught differs.

Usage: .venv/bin/python benchmarks/teachers.py [--out runs/teachers] [--seeds 0 1 2] [--families vit swin ...]

Interrupted, the same call goes on. It writes benchmarks/results/teachers.json once all is done and prints the table.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from riformer.cli.progress import TrainProgress
from riformer.config import DistillConfig, Recipe, TeacherConfig, reset_unused
from riformer.recipes import FULL, RECIPES, labels, teacher_recipe
from riformer.study.ladder import run_ladder
from riformer.train.run import Run
from riformer_runtime.cli.console import Console

RESULTS = Path(__file__).parent / "results" / "teachers.json"
EPOCHS = 25  # those of the quickstart, 500 steps

# timm's CAFormer and ConvFormer come in no smaller size, and learn for fewer epochs; the others are cut down to the
# student's order of size.
TEACHERS: dict[str, TeacherConfig] = {
    "gfnet-h": TeacherConfig("gfnet_h_ti", args={"depths": [2, 2, 2], "dims": [48, 96, 192]}, epochs=EPOCHS, lr=4e-3),
    "poolformer": TeacherConfig(
        "riformer_mini", args={"mixer": "pooling", "depths": [2, 4, 2], "dims": [48, 96, 192]}, epochs=EPOCHS, lr=4e-3
    ),
    "convformer": TeacherConfig("convformer_s18", epochs=10, lr=1e-3),
    "caformer": TeacherConfig("caformer_s18", epochs=10, lr=1e-3),
    "convnext": TeacherConfig(
        "convnext_atto",
        args={"depths": [1, 1, 2, 1], "dims": [32, 64, 128, 256], "kernel_sizes": 3},
        epochs=EPOCHS,
        lr=4e-3,
    ),
    "swin": TeacherConfig(
        "swin_tiny_patch4_window7_224",
        args={"depths": [2, 2], "embed_dim": 64, "num_heads": [2, 4], "window_size": 4},
        epochs=EPOCHS,
        lr=2e-3,
    ),
    "vit": TeacherConfig(
        "vit_tiny_patch16_224",
        args={"patch_size": 4, "depth": 6, "embed_dim": 96, "num_heads": 3},
        epochs=EPOCHS,
        lr=2e-3,
    ),
}
LOGITS = DistillConfig(label_weight=0.0, soft_weight=1.0)
IMITATION = replace(FULL, start_from_teacher=False)


def student() -> Recipe:
    """The student, which is that of the quickstart."""
    return replace(RECIPES["quickstart"](), name="micro")


def teacher(family: str) -> Recipe:
    """The training of a family's teacher."""
    recipe = student()
    larger = replace(recipe.data, img_size=32)
    return teacher_recipe(replace(recipe, name=family, data=larger, teacher=TEACHERS[family]))


def taught(family: str, seed: int, out: Path) -> list[Recipe]:
    """The student's two trainings by the teacher of this family and seed."""
    folder = str(out / f"{family}-teacher-seed{seed}")
    logits = replace(LOGITS, logit_teacher=folder)
    modules = replace(IMITATION, logit_teacher=folder, module_teacher=folder)
    return [
        reset_unused(replace(student(), name=f"{family}-{name}", distill=distill))
        for name, distill in (("logits", logits), ("imitation", modules))
    ]


def record(out: Path, families: list[str], seeds: list[int]) -> dict[str, Any]:
    """Test accuracy of all, by seed."""

    def read(name: str, seed: int) -> dict[str, Any]:
        return Run(out / f"{name}-seed{seed}").read("evaluation.json")["models"]["deploy"]

    def top1(name: str) -> dict[str, float]:
        return {str(seed): read(name, seed)["top1"] for seed in seeds}

    first = Run(out / f"micro-labels-seed{seeds[0]}").read("evaluation.json")
    rows = {
        family: {
            "model": teacher(family).model.name,
            "params": Run(out / f"{family}-teacher-seed{seeds[0]}").read("evaluation.json")["models"]["deploy"][
                "params"
            ],
            **{role: top1(f"{family}-{role}") for role in ("teacher", "logits", "imitation")},
        }
        for family in families
    }
    about = {key: first[key] for key in ("date", "device", "torch", "timm", "split", "num_images")}
    return {**about, "epochs": EPOCHS, "labels": top1("micro-labels"), "families": rows}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown: means over the seeds, and differences to labels alone paired by seed."""
    alone = results["labels"]
    lines = [
        "| teacher | its model, parameters | its top-1 | from its logits | above labels | and modules | above labels |",
        "|---|---|---:|---:|---:|---:|---:|",
        f"| none, labels alone | | | {_mean(alone)} | | | |",
    ]
    for family, row in results["families"].items():
        cells = [family, f"`{row['model']}`, {row['params'] / 1e6:.2f} M", _mean(row["teacher"])]
        for role in ("logits", "imitation"):
            cells += [_mean(row[role]), _difference(row[role], alone)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(values: dict[str, float]) -> str:
    return f"{fmean(values.values()):.2f}"


def _difference(values: dict[str, float], alone: dict[str, float]) -> str:
    paired = [values[seed] - alone[seed] for seed in values]
    spread = f" ± {stdev(paired):.2f}" if len(paired) > 1 else ""
    return f"{fmean(paired):+.2f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/teachers"), help="folder of the run folders")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="each with a teacher of its own")
    parser.add_argument("--families", nargs="+", default=list(TEACHERS), choices=TEACHERS, help="which teachers")
    parser.add_argument("--jobs", type=int, default=2, help="trainings side by side")
    options = parser.parse_args()
    with TrainProgress(Console()) as progress:
        first = [labels(student()), *map(teacher, options.families)]
        run_ladder([replace(one, seed=s) for s in options.seeds for one in first], options.out, progress, options.jobs)
        named = [(family, seed) for seed in options.seeds for family in options.families]
        recipes = [replace(one, seed=seed) for family, seed in named for one in taught(family, seed, options.out)]
        run_ladder(recipes, options.out, progress, options.jobs)
    results = record(options.out, options.families, options.seeds)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
