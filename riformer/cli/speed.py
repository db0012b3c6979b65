"""Verbs that measure speed: bench and profile."""

import json
from pathlib import Path
from typing import Literal

import torch

from riformer.atomic import write_text
from riformer.cli.options import console, errors, verb_parser
from riformer.cli.tables import print_bench, print_profile
from riformer.export.engines import ENGINES
from riformer.measure.bench import bench, competitors, open_network
from riformer.measure.profile import profile
from riformer.pages.profile import draw
from riformer.runtime.optimize import DTYPES
from riformer.train.run import environment


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
    backends_help = f"engines, in the order of the rows: {', '.join(ENGINES)}"
    parser.add_argument("--backends", type=list[str], default=["eager", "ours"], help=backends_help)
    precisions_help = "fp32, bf16x3, bf16, fp16, int8; what an engine lacks is left out"
    parser.add_argument("--precisions", type=list[str], default=["fp32", "bf16"], help=precisions_help)
    parser.add_argument("--batch-sizes", type=list[int], default=[1, 8], help="images at once")
    parser.add_argument("--img-sizes", type=list[int], default=[224], help="height and width, pixels")
    threads_help = "threads of every engine on a CPU"
    parser.add_argument("--threads", type=list[int], default=[torch.get_num_threads()], help=threads_help)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each competitor")
    parser.add_argument("--seconds", type=float, default=0.2, help="how long a turn lasts at least")
    parser.add_argument(
        "--memory", type=bool, default=True, help="measure peak memory, on a CPU in processes of their own"
    )
    parser.add_argument("--out", type=str, help="JSON file for the results; `riformer report` makes a page of it")
    o = parser.parse_args(argv)
    entries, absent = competitors(o.models, o.backends, o.precisions)
    with errors.activity() as show:
        sizes = (o.batch_sizes, o.img_sizes, o.threads)
        result = bench(entries, *sizes, o.out, o.rounds, o.seconds, o.memory, show)
    print_bench(result, console)
    if absent:
        console.print(f"not there: {'; '.join(map(str, absent))}", style="dim")
    return 0


def profile_verb(argv: list[str]) -> int:
    """Where a network's time goes: the share of its token mixers, built up step by step and taken apart in place.

    Built up is the paper's analysis: the embedding alone, then with norms, token mixers, MLPs and the head put back.
    Taken apart puts clocks around every part of the untouched network. For ViT and DeiT, PoolFormer, RIFormer (in
    the form in which it comes), GFNet, ConvFormer, CAFormer, ConvNeXt and Swin.
    """
    parser = verb_parser("profile", profile_verb)
    parser.add_argument("model", type=str, help="timm name, as NAME or NAME:mixer=pooling; or a saved model")
    parser.add_argument("--batch-size", type=int, default=8, help="images at once")
    parser.add_argument("--img-size", type=int, default=224, help="height and width, pixels")
    precisions = Literal["fp32", "bf16", "fp16"]
    parser.add_argument("--precision", type=precisions, default="fp32", help="type of weights and maps")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each network")
    parser.add_argument("--out", type=str, help="folder for profile.json and profile.svg")
    o = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = open_network(o.model, deploy=False).to(device, DTYPES[o.precision])
    images = torch.randn(o.batch_size, 3, o.img_size, o.img_size, device=device, dtype=DTYPES[o.precision])
    with errors.activity(f"{o.model}: {o.rounds} rounds"):
        measured = profile(model, images, o.rounds)
    title = f"{o.model}, batch {o.batch_size}, {o.img_size} px, {o.precision}"
    print_profile(measured, title, console)
    if o.out:
        folder = Path(o.out)
        settings = {name: getattr(o, name) for name in ("model", "batch_size", "img_size", "precision", "rounds")}
        draw(measured, title, folder / "profile.svg")
        record = {"settings": settings, "env": environment(1), **measured.to_dict()}
        write_text(folder / "profile.json", json.dumps(record, indent=1) + "\n")
        console.print(f"{folder}: profile.json, profile.svg")
    return 0
