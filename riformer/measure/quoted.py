"""Published accuracies and throughputs, quoted and not reproduced here.

Top-1 is on ImageNet-1k at 224 px. Images/s are those of the RIFormer paper, on its authors' GPU, and can be compared
with one another only.
"""

import re
from typing import NamedTuple


class Quoted(NamedTuple):
    """What was published about a network."""

    name: str
    family: str
    top1: float
    images_per_s: float | None
    source: str


RIFORMER = "RIFormer", "RIFormer, arXiv 2304.05659, 600 epochs"
POOLFORMER = "PoolFormer", "PoolFormer, arXiv 2111.11418"
GFNET = "GFNet", "GFNet, arXiv 2107.00645"
DEIT = "DeiT", "DeiT, arXiv 2012.12877, not distilled"
RSB = "ResNet", "ResNet strikes back, arXiv 2110.00476, procedure A2"
CONVNEXT = "ConvNeXt", "ConvNeXt, arXiv 2201.03545"

ROWS: tuple[tuple[str, str, tuple[str, str], float, float | None], ...] = (
    ("resnet50", "RSB-ResNet-50", RSB, 79.8, 2732.85),
    ("deit_small_patch16_224", "DeiT-S", DEIT, 79.8, 3092.02),
    ("deit_base_patch16_224", "DeiT-B", DEIT, 81.8, 1348.76),
    ("convnext_tiny", "ConvNeXt-T", CONVNEXT, 82.1, None),
    ("gfnet_h_ti", "GFNet-H-Ti", GFNET, 80.1, None),
    ("gfnet_h_s", "GFNet-H-S", GFNET, 81.5, None),
    ("gfnet_h_b", "GFNet-H-B", GFNET, 82.9, 939.20),
    ("riformer_s12:mixer=pooling", "PoolFormer-S12", POOLFORMER, 77.2, 4160.18),
    ("riformer_s24:mixer=pooling", "PoolFormer-S24", POOLFORMER, 80.3, 2140.20),
    ("riformer_s36:mixer=pooling", "PoolFormer-S36", POOLFORMER, 81.4, 1440.37),
    ("riformer_m36:mixer=pooling", "PoolFormer-M36", POOLFORMER, 82.1, 1009.45),
    ("riformer_m48:mixer=pooling", "PoolFormer-M48", POOLFORMER, 82.5, 761.93),
    ("riformer_s12", "RIFormer-S12", RIFORMER, 76.90, 4899.80),
    ("riformer_s24", "RIFormer-S24", RIFORMER, 80.28, 2530.48),
    ("riformer_s36", "RIFormer-S36", RIFORMER, 81.29, 1699.94),
    ("riformer_m36", "RIFormer-M36", RIFORMER, 82.57, 1185.33),
    ("riformer_m48", "RIFormer-M48", RIFORMER, 82.75, 897.05),
)

LADDER = {"mixer": 75.01, "identity": 72.31, "hard": 73.51, "soft": 74.05, "imitation": 75.13, "full": 75.36}
"""Top-1 of the RIFormer paper's ladder by rung: RIFormer-S12 on ImageNet-1k at 224 px, fewer than 300 epochs."""

QUOTED = {key: Quoted(name, family, top1, rate, source) for key, name, (family, source), top1, rate in ROWS}
"""By the name under which `riformer bench` takes the network."""

IMAGES_PER_S = {
    re.sub(r"riformer(_\w+):mixer=pooling", r"poolformer\1", key): quoted.images_per_s
    for key, quoted in QUOTED.items()
    if quoted.images_per_s
}
"""Images/s of the networks whose throughput was published, by timm's name."""
