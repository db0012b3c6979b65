"""How fast is each way to deploy a RIFormer on this CPU?

S12 at batches of 1, 8 and 32, M36 at 8, 224 px, one and two threads; peak memory at batch 8 and one thread. Each group
is one interleaved comparison, see README.md beside this file. Goes on where it was interrupted.

    python benchmarks/cpu.py
"""

import argparse
import json
from functools import partial
from pathlib import Path

from rich.console import Console

from riformer.study.bench import Competitor, bench
from riformer.tables import print_bench

RESULTS = Path(__file__).parent / "results"
ENGINES = {
    **{"eager": ("fp32", "bf16"), "compile": ("bf16",), "compile-collapsed": ("bf16",), "onnxruntime": ("fp32",)},
    **{"openvino": ("fp32", "bf16"), "openvino-collapsed": ("fp32", "bf16"), "ours": ("fp32", "bf16x3", "bf16")},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each competitor")
    parser.add_argument("--smoke", action="store_true", help="a small network once, to see that everything runs")
    options = parser.parse_args()
    console = Console()
    plan = {"riformer_s12": (1, 8, 32), "riformer_m36": (8,)} if not options.smoke else {"riformer_micro": (2,)}
    for model, batch_sizes in plan.items():
        engines = [name for name in ENGINES if not (options.smoke and name.startswith("compile"))]
        entries = [Competitor(model, name, precision) for name in engines for precision in ENGINES[name]]
        status = partial(console.log, model, highlight=False)
        file = options.out / f"cpu_{model}.json"
        size, rounds = (32, 3) if options.smoke else (224, options.rounds)
        for batch_size in batch_sizes:
            for threads in (1, 2):
                memory = batch_size == 8 and threads == 1
                bench(entries, [batch_size], [size], [threads], file, rounds, memory=memory, status=status)
        print_bench(json.loads(file.read_text()), console)


if __name__ == "__main__":
    main()
