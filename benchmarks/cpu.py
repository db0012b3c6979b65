"""How fast is each way to deploy a RIFormer on this CPU?

S12 and M36 at batches of 1, 8 and 32, 224 px, one and two threads; peak memory at batch 8 and one thread. Each group is
one interleaved comparison, see README.md beside this file. Goes on where it was interrupted.

    python benchmarks/cpu.py
"""

import json
from functools import partial
from itertools import product

from options import of_machine, options, turn_seconds

from riformer.cli.tables import print_bench
from riformer.measure.bench import Competitor, bench
from riformer_runtime.cli.console import Console

MODELS = ("riformer_s12", "riformer_m36")
ENGINES = {
    **{"eager": ("fp32", "bf16"), "compile": ("bf16",), "compile-collapsed": ("bf16",), "onnxruntime": ("fp32",)},
    **{"openvino": ("fp32", "bf16"), "openvino-collapsed": ("fp32", "bf16"), "ours": ("fp32", "bf16x3", "bf16")},
}


def main() -> None:
    given = options(__doc__, of_machine(), rounds=7).parse_args()
    console = Console()
    engines = [name for name in ENGINES if not given.smoke or name in ("eager", "openvino", "ours")]
    models, batch_sizes, img_size = (MODELS, (1, 8, 32), 224) if not given.smoke else (("riformer_micro",), (2,), 32)
    num_threads = (1, 2) if not given.smoke else (1,)
    files = {model: given.out / f"cpu_{model}.json" for model in models}
    for batch_size, threads, (model, file) in product(batch_sizes, num_threads, files.items()):
        entries = [Competitor(model, name, precision) for name in engines for precision in ENGINES[name]]
        status = partial(console.log, model)
        memory = threads == 1 and batch_size == 8
        where = ([batch_size], [img_size], [threads], file)
        bench(entries, *where, given.rounds, turn_seconds(given.smoke), memory, status)
    for file in files.values():
        print_bench(json.loads(file.read_text()), console)


if __name__ == "__main__":
    main()
