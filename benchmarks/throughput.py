"""How fast are the networks of the paper's table on the device at hand, each on the fastest general engine there?

The rows of the paper's throughput table at 224 px in bf16: OpenVINO on a CPU, torch.compile(max-autotune) on a GPU; and
RIFormers also on their own runtime. `riformer report` renders the result beside the published accuracies.

    python benchmarks/throughput.py
    riformer report benchmarks/results/amx/throughput.json
"""

from functools import partial

import torch
from options import of_machine, options, turn_seconds

from riformer.cli.tables import print_bench
from riformer.measure.bench import Competitor, bench
from riformer_runtime.cli.console import Console

BATCH_SIZE = 256 if torch.cuda.is_available() else 8
SIZES = ("s12", "s24", "s36", "m36", "m48")
PEERS = ("resnet50", "deit_small_patch16_224", "deit_base_patch16_224", "convnext_tiny", "gfnet_h_b")


def main() -> None:
    parser = options(__doc__, of_machine() / "throughput.json", rounds=7)
    parser.add_argument("--batch_size", type=int, default=BATCH_SIZE, help="images at once")
    parser.add_argument("--threads", type=int, default=1, help="threads on a CPU")
    given = parser.parse_args()
    engine = "compile" if torch.cuda.is_available() else "openvino"
    sizes, peers, pixels = (SIZES, PEERS, 224) if not given.smoke else (("micro",), ("resnet10t",), 32)
    entries = [Competitor(f"riformer_{size}:mixer=pooling", engine, "bf16") for size in sizes]
    entries += [Competitor(name, engine, "bf16") for name in peers]
    entries += [Competitor(f"riformer_{size}", engine, "bf16") for size in sizes]
    entries += [Competitor(f"riformer_{size}", "ours", "bf16") for size in sizes]
    console = Console()
    status = partial(console.log)
    where = ([given.batch_size], [pixels], [given.threads], given.out)
    print_bench(bench(entries, *where, given.rounds, turn_seconds(given.smoke), memory=False, status=status), console)


if __name__ == "__main__":
    main()
