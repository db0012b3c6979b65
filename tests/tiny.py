"""Small models for tests, and parameters that hide nothing."""

from typing import Any

import timm
import torch
from torch import nn

import riformer

SIZE: dict[str, Any] = dict(depths=(1, 2, 1, 1), dims=(8, 16, 24, 32), num_classes=5, img_size=64)
IMAGE = (2, 3, 64, 64)


def tiny(**args: Any) -> riformer.MetaFormer:
    """A MetaFormer of five blocks for 64 px, built through timm as users do."""
    return timm.create_model("riformer_s12", **{**SIZE, **args})


def randomised(model: nn.Module, seed: int = 0) -> Any:
    """The model with every norm, affine, layer scale and bias far from its start, which would hide wrong algebra."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_scale" in name:
                parameter.copy_(0.5 + 0.2 * normal(parameter))
            elif parameter.ndim > 1:
                parameter.copy_(normal(parameter) / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_((1.0 if name.endswith("weight") else 0.0) + 0.5 * normal(parameter))
    return model


def images(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    """Normally distributed images, two of 64 px when no shape is given."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or IMAGE, generator=generator, dtype=torch.float64).to(dtype)
