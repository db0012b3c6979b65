"""Small models and trainings for tests, and parameters that hide nothing."""

from typing import Any

import timm
import torch

import riformer
from riformer.config import AugmentConfig, DataConfig, ModelConfig, OptimConfig, Recipe
from riformer.measure.bench import randomised as randomised

SIZE: dict[str, Any] = dict(depths=(1, 2, 1, 1), dims=(8, 16, 24, 32), num_classes=5, img_size=64)
IMAGE = (2, 3, 64, 64)


def tiny(**args: Any) -> riformer.MetaFormer:
    """A MetaFormer of five blocks for 64 px, built through timm as users do."""
    return timm.create_model("riformer_s12", **{**SIZE, **args})


def tiny_recipe(epochs: int = 3, seed: int = 0) -> Recipe:
    """A training on labels alone that takes a tenth of a second an epoch, of five steps."""
    return Recipe(
        name="tiny",
        data=DataConfig(name="digits", img_size=8, crop_pct=1.0, num_workers=0),
        augment=AugmentConfig(mixup=0.0, cutmix=0.0),
        model=ModelConfig(depths=(1, 1), dims=(8, 8), stem_patch=2, stem_stride=2),
        optim=OptimConfig(lr=1e-2, epochs=epochs, warmup_epochs=0, batch_size=40),
        seed=seed,
    )


def images(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    """Normally distributed images, two of 64 px when no shape is given."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or IMAGE, generator=generator, dtype=torch.float64).to(dtype)
