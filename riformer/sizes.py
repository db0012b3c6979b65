"""The sizes of the networks by name, as plain data: what a model is built with, and what rungs change."""

from typing import Any

VARIANTS: dict[str, dict[str, Any]] = {
    "riformer_s12": dict(depths=(2, 2, 6, 2), dims=(64, 128, 320, 512), layer_scale_init=1e-5),
    "riformer_s24": dict(depths=(4, 4, 12, 4), dims=(64, 128, 320, 512), layer_scale_init=1e-5),
    "riformer_s36": dict(depths=(6, 6, 18, 6), dims=(64, 128, 320, 512), layer_scale_init=1e-6),
    "riformer_m36": dict(depths=(6, 6, 18, 6), dims=(96, 192, 384, 768), layer_scale_init=1e-6),
    "riformer_m48": dict(depths=(8, 8, 24, 8), dims=(96, 192, 384, 768), layer_scale_init=1e-6),
    # Not the paper's: for images of about 16 and 32 pixels. Shallow networks need no small layer scales.
    "riformer_micro": dict(depths=(1, 1), dims=(24, 48), stem_patch=2, stem_stride=2, layer_scale_init=1.0),
    "riformer_mini": dict(depths=(2, 2, 2), dims=(32, 64, 128), stem_patch=4, stem_stride=4, layer_scale_init=1.0),
}

GFNETS: dict[str, dict[str, Any]] = {
    "gfnet_h_ti": dict(depths=(3, 3, 10, 3), dims=(64, 128, 256, 512), layer_scale_init=1e-3),
    "gfnet_h_s": dict(depths=(3, 3, 10, 3), dims=(96, 192, 384, 768), layer_scale_init=1e-5),
    "gfnet_h_b": dict(depths=(3, 3, 27, 3), dims=(96, 192, 384, 768), layer_scale_init=1e-6),
}
