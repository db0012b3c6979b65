"""Writes docs/results/quickstart.json from the runs of `make quickstart`, and prints the table of docs/paper-map.md.

python tools/record_quickstart.py [runs/quickstart]
"""

import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from riformer.train.run import Run

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "quickstart.json"
ROWS = {  # recipe and role in its evaluation -> name of the row
    ("quickstart", "teacher"): "teacher, global filter, labels",
    ("quickstart-labels", "deploy"): "labels alone",
    ("quickstart-labels-long", "deploy"): "labels alone, with the teacher's steps as well",
    ("quickstart", "deploy"): "RIFormer from that teacher",
}


def collect(folder: Path) -> dict[str, Any]:
    """Test accuracy by row and seed, steps, and where and when."""
    record: dict[str, Any] = {"rows": {}}
    for (recipe, role), text in ROWS.items():
        runs = [Run(path) for path in sorted(folder.glob(f"{recipe}-seed[0-9]*"))]
        evaluations = [run.read("evaluation.json") for run in runs]
        trained = runs[0] if role == "deploy" else Run(runs[0].path / "teacher")
        record["rows"][text] = {
            "steps": trained.metrics()[-1]["step"],
            "top1": {
                str(run.recipe().seed): e["models"][role]["top1"] for run, e in zip(runs, evaluations, strict=True)
            },
        }
        record |= {key: evaluations[0][key] for key in ("date", "device", "torch", "timm", "num_images", "split")}
    return record


def table(record: dict[str, Any]) -> str:
    """The record as the Markdown table of docs/paper-map.md."""
    lines = ["| | steps | top-1, seeds 0, 1, 2 | mean |", "|---|---|---|---|"]
    for text, row in record["rows"].items():
        values = list(row["top1"].values())
        each = ", ".join(f"{value:.1f}" for value in values)
        lines.append(f"| {text} | {row['steps']:,} | {each} | {fmean(values):.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    recorded = collect(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart"))
    RESULTS.write_text(json.dumps(recorded, indent=2) + "\n")
    print(table(recorded))
