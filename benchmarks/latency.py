"""What share of the time do token mixers take? The paper's figure, of a ViT-B, and the same of PoolFormer and RIFormer.

python benchmarks/latency.py
"""

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console

from riformer.atomic import write_text
from riformer.study.bench import open_network
from riformer.study.profile import profile
from riformer.study.profile_figure import draw
from riformer.tables import print_profile
from riformer.train.run import environment

RESULTS = Path(__file__).parent / "results"
BATCH_SIZE = 256 if torch.cuda.is_available() else 4
MODELS = ("vit_base_patch16_224", *(f"riformer_s12:mixer={mixer}" for mixer in ("pooling", "affine", "identity")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "latency", help="folder of the results")
    parser.add_argument("--batch_size", type=int, default=BATCH_SIZE, help="images at once")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each network")
    parser.add_argument("--smoke", action="store_true", help="a small network once, to see that everything runs")
    options = parser.parse_args()
    device, console = "cuda" if torch.cuda.is_available() else "cpu", Console()
    if device == "cpu":
        torch.set_num_threads(1)
    for name in MODELS if not options.smoke else ("riformer_micro:mixer=pooling",):
        file = options.out / f"{name.replace(':', '_').replace('=', '-')}.json"
        if file.exists():
            continue
        size, rounds = (224, options.rounds) if not options.smoke else (32, 3)
        images = torch.randn(options.batch_size, 3, size, size, device=device)
        found = profile(open_network(name, deploy=False).to(device), images, rounds)
        title = f"{name}, batch {options.batch_size}, {size} px, fp32"
        print_profile(found, title, console)
        record = {"model": name, "batch_size": options.batch_size, "img_size": size, "env": environment(1)}
        draw(found, title, file.with_suffix(".svg"))
        write_text(file, json.dumps(record | found.to_dict(), indent=1) + "\n")


if __name__ == "__main__":
    main()
