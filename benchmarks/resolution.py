"""Is the runtime as fast per pixel at 512 px as at 224 px? Images per second times pixels should stay the same.

Sizes are measured one after another. Other load on the machine only slows a turn, so the fastest turns are compared.

python benchmarks/resolution.py
"""

from functools import partial

import torch
from options import of_machine, options, turn_seconds

from riformer.cli.tables import print_bench
from riformer.measure.bench import Competitor, bench
from riformer_runtime.cli.console import Console

BATCH_SIZE = 64 if torch.cuda.is_available() else 4


def main() -> None:
    parser = options(__doc__, of_machine() / "resolution.json")
    parser.add_argument("--batch_size", type=int, default=BATCH_SIZE, help="images at once")
    given = parser.parse_args()
    model, sizes = ("riformer_s12", (224, 320, 384, 512)) if not given.smoke else ("riformer_micro", (32, 48))
    entries = [Competitor(model, "ours", precision) for precision in ("fp32", "bf16")]
    console = Console()
    status = partial(console.log)
    where = ([given.batch_size], sizes, [1], given.out)
    result = bench(entries, *where, given.rounds, turn_seconds(given.smoke), memory=False, status=status)
    print_bench(result, console)
    for i, entry in enumerate(entries):
        pace = [max(g["rows"][i]["rates"]) * g["img_size"] ** 2 for g in result["groups"]]
        paces = ", ".join(f"{g['img_size']} px {p / pace[0]:.3f}" for g, p in zip(result["groups"], pace, strict=True))
        console.print(f"{entry}, pixels per second beside {sizes[0]} px: {paces}")


if __name__ == "__main__":
    main()
