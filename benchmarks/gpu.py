"""How near to the limit is the runtime on a GPU? Checks the targets for an NVIDIA H100, in calls below ten minutes.

In bf16: RIFormer-S12 and M36 with batches of 256 beside eager PyTorch; single images; the speed from 224 to 512 px;
then S12 beside torch.compile(max-autotune) of its deploy form, its collapsed form and PoolFormer-S12, and with batches
of 8 and 32. Networks that are quick to build come first, because autotuning a compiled network takes minutes. No new
measurement begins after --minutes; the same command continues with the rest. The last table shows which targets are
met.

    python benchmarks/gpu.py
"""

import json
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from options import RESULTS, options, turn_seconds
from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from riformer.cli.tables import print_bench
from riformer.measure.bench import Competitor, bench
from riformer.runtime.latency import Spread
from riformer_runtime.cli.console import Console

SIZES = (224, 320, 384, 512)


class Question(NamedTuple):
    """One comparison, in a file of its own."""

    name: str
    entries: list[Competitor]
    batch_size: int
    img_sizes: tuple[int, ...] = (224,)


def bf16(model: str, backend: str) -> Competitor:
    return Competitor(model, backend, "bf16")


PLAIN, OURS, EAGER = (bf16("riformer_s12", backend) for backend in ("compile", "ours", "eager"))
POOLFORMER, M36 = bf16("riformer_s12:mixer=pooling", "compile"), bf16("riformer_m36", "ours")
QUESTIONS = (
    Question("s12", [EAGER, OURS], 256),
    Question("m36", [bf16("riformer_m36", "eager"), M36], 256),
    Question("s12_one_image", [EAGER, OURS], 1),
    Question("resolution", [OURS], 64, SIZES),
    Question("compiled", [PLAIN, OURS], 256),
    Question("poolformer", [POOLFORMER, OURS], 256),
    Question("collapsed", [bf16("riformer_s12", "compile-collapsed"), OURS], 256),
    Question("s12_8_images", [PLAIN, OURS], 8),
    Question("s12_32_images", [PLAIN, OURS], 32),
)
SMOKE = (
    Question("s12", [bf16("riformer_micro", "eager"), bf16("riformer_micro", "ours")], 2, (32,)),
    Question("resolution", [bf16("riformer_micro", "ours")], 2, (32, 48)),
)


def rates(folder: Path, name: str, entry: Competitor, img_size: int = 224) -> list[float] | None:
    """Images per second by round, or None if that has not been measured."""
    file = folder / f"{name}.json"
    groups = json.loads(file.read_text())["groups"] if file.exists() else []
    rows = [row for group in groups if group["img_size"] == img_size for row in group["rows"]]
    matching = [row["rates"] for row in rows if Competitor(row["model"], row["backend"], row["precision"]) == entry]
    return matching[0] if matching else None


def bars(folder: Path) -> list[tuple[str, float | None, float, bool]]:
    """For each target its name, the measured value, the target value, and whether more is better."""

    def median(name: str, entry: Competitor, beside: Competitor | None = None, img_size: int = 224) -> float | None:
        own, other = (rates(folder, name, e, img_size) if e else None for e in (entry, beside))
        if own is None or (beside and other is None):
            return None
        return Spread.of([a / b for a, b in zip(own, other, strict=True)] if other else own).median

    one = median("s12_one_image", OURS)
    paces = [rate * size**2 for size in SIZES if (rate := median("resolution", OURS, img_size=size))]
    spread = max(paces) / min(paces) - 1 if len(paces) == len(SIZES) else None
    return [
        ("S12, batch 256, images/s", median("s12", OURS), 100_000, True),
        ("S12, batch 256, times the compiled deploy form", median("compiled", OURS, PLAIN), 2.0, True),
        ("S12, batch 256, times compiled PoolFormer-S12", median("poolformer", OURS, POOLFORMER), 2.5, True),
        ("M36, batch 256, images/s", median("m36", M36), 25_000, True),
        ("S12, one image, microseconds", 1e6 / one if one else None, 120, False),
        ("S12, spread of pixels/s from 224 to 512 px, %", None if spread is None else 100 * spread, 15, False),
    ]


def main() -> None:
    parser = options(__doc__, RESULTS / "gpu")
    parser.add_argument("--minutes", type=float, default=5, help="begin no measurement after so many minutes")
    given = parser.parse_args()
    if not (given.smoke or torch.cuda.is_available()):
        parser.error("no GPU here; --smoke tries the script on the CPU")
    console, began, left = Console(), time.monotonic(), []
    for name, entries, batch_size, img_sizes in SMOKE if given.smoke else QUESTIONS:
        file = given.out / f"{name}.json"
        for img_size in img_sizes:
            if time.monotonic() - began > 60 * given.minutes:
                left.append(f"{name} at {img_size} px")
                continue
            status = partial(console.log, name)
            where = ([batch_size], [img_size], [1], file)
            bench(entries, *where, given.rounds, turn_seconds(given.smoke), not given.smoke, status)
        if file.exists():
            print_bench(json.loads(file.read_text()), console)
    numbers = [Column(header, justify="right") for header in ("measured", "target", "")]
    table = Table("", *numbers, box=SIMPLE_HEAD)
    for text, value, bar, more in bars(given.out):
        met = "" if value is None else "met" if (value >= bar if more else value <= bar) else "NOT met"
        table.add_row(text, "–" if value is None else f"{value:,.4g}", f"{'≥' if more else '≤'} {bar:,g}", met)
    console.print(table)
    if left:
        console.print(f"left for the next call: {', '.join(left)}")


if __name__ == "__main__":
    main()
