"""Does the runtime keep its pace from 224 to 512 pixels? Images per second times pixels should stay the same.

python benchmarks/resolution.py
"""

import argparse
from pathlib import Path

import torch
from rich.console import Console

from riformer.study.bench import Competitor, bench
from riformer.tables import print_bench


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results/resolution.json", help="result file"
    )
    parser.add_argument("--batch_size", type=int, default=64 if torch.cuda.is_available() else 4, help="images at once")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each competitor")
    parser.add_argument("--smoke", action="store_true", help="a small network once, to see that everything runs")
    options = parser.parse_args()
    model, sizes = ("riformer_s12", (224, 320, 384, 512)) if not options.smoke else ("riformer_micro", (32, 48))
    entries = [Competitor(model, "ours", precision) for precision in ("fp32", "bf16")]
    console = Console()
    group = ([options.batch_size], sizes, [1], options.out, options.rounds, 0.2, False)
    result = bench(entries, *group, status=lambda text: console.log(text, highlight=False))
    print_bench(result, console)
    for i, entry in enumerate(entries):
        pace = [g["rows"][i]["images_per_s"]["median"] * g["img_size"] ** 2 for g in result["groups"]]
        paces = ", ".join(f"{g['img_size']} px {p / pace[0]:.3f}" for g, p in zip(result["groups"], pace, strict=True))
        console.print(f"{entry}, pixels per second beside {sizes[0]} px: {paces}", highlight=False)


if __name__ == "__main__":
    main()
