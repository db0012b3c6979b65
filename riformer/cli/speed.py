"""Verbs that measure speed: bench and profile."""

import torch

from riformer.cli.options import console, errors, verb_parser
from riformer.deploy.backends import BACKENDS
from riformer.study.bench import bench
from riformer.tables import print_bench


def bench_verb(argv: list[str]) -> int:
    """Images per second of networks on engines, all in one process and taking turns, each beside its error.

    A network is a model of timm by name, with arguments as in riformer_s12:mixer=pooling, or a run folder, model folder
    or weights file; RIFormers run in deploy form. Every row says how far its logits are from those of the same weights
    in eager float32, how fast it is beside the first row round by round, and how near to the limit: to its own
    convolutions and matrix products alone, and to the rate of one large product (multiply-accumulates of the network,
    over those). Interrupted, the same command goes on where it was, if --out is given.
    """
    parser = verb_parser("bench", bench_verb)
    parser.add_argument("models", type=str, nargs="+", help="timm names, run folders, model folders or weights files")
    backends_help = f"engines, in the order of the rows: {', '.join(BACKENDS)}"
    parser.add_argument("--backends", type=list[str], default=["eager", "ours"], help=backends_help)
    precisions_help = "fp32, bf16x3, bf16, fp16, int8; what an engine lacks is left out"
    parser.add_argument("--precisions", type=list[str], default=["fp32", "bf16"], help=precisions_help)
    parser.add_argument("--batch_sizes", type=list[int], default=[1, 8], help="images at once")
    parser.add_argument("--img_sizes", type=list[int], default=[224], help="height and width, pixels")
    threads_help = "threads of every engine on a CPU"
    parser.add_argument("--threads", type=list[int], default=[torch.get_num_threads()], help=threads_help)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each competitor")
    parser.add_argument("--seconds", type=float, default=0.2, help="how long a turn lasts at least")
    parser.add_argument(
        "--memory", type=bool, default=True, help="measure peak memory, on a CPU in processes of their own"
    )
    parser.add_argument("--out", type=str, help="JSON file for the results; `riformer report` makes a page of it")
    o = parser.parse_args(argv)
    sizes = (o.batch_sizes, o.img_sizes, o.threads)
    with errors.status("") as status:
        measured = (o.out, o.rounds, o.seconds, o.memory, status.update)
        result = bench(o.models, o.backends, o.precisions, *sizes, *measured)
    print_bench(result, console)
    return 0
