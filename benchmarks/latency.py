"""What share of the time do token mixers take? The paper's figure, of a ViT-B, and the same of PoolFormer and RIFormer.

python benchmarks/latency.py
"""

import json

import torch
from options import RESULTS, options

from riformer.atomic import write_text
from riformer.cli.tables import print_profile
from riformer.machine import environment
from riformer.measure.bench import open_network
from riformer.measure.profile import profile
from riformer.pages.profile import draw
from riformer_runtime.cli.console import Console

BATCH_SIZE = 256 if torch.cuda.is_available() else 4
MODELS = ("vit_base_patch16_224", *(f"riformer_s12:mixer={mixer}" for mixer in ("pooling", "affine", "identity")))


def main() -> None:
    parser = options(__doc__, RESULTS / "latency")
    parser.add_argument("--batch_size", type=int, default=BATCH_SIZE, help="images at once")
    given = parser.parse_args()
    device, console = "cuda" if torch.cuda.is_available() else "cpu", Console()
    if device == "cpu":
        torch.set_num_threads(1)
    for name in MODELS if not given.smoke else ("riformer_micro:mixer=pooling",):
        file = given.out / f"{name.replace(':', '_').replace('=', '-')}.json"
        if file.exists():
            continue
        size, rounds = (224, given.rounds) if not given.smoke else (32, 3)
        images = torch.randn(given.batch_size, 3, size, size, device=device)
        measured = profile(open_network(name, deploy=False).to(device), images, rounds)
        title = f"{name}, batch {given.batch_size}, {size} px, fp32"
        print_profile(measured, title, console)
        record = {"model": name, "batch_size": given.batch_size, "img_size": size, "env": environment(1)}
        draw(measured, title, file.with_suffix(".svg"))
        write_text(file, json.dumps(record | measured.to_dict(), indent=1) + "\n")


if __name__ == "__main__":
    main()
