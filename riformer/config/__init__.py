"""The configuration of a training: its knobs, which values and combinations they allow, and recipes as JSON."""

from riformer.config.knobs import (
    MOVABLE,
    AugmentConfig,
    DataConfig,
    DistillConfig,
    ModelConfig,
    OptimConfig,
    Recipe,
    ResearchConfig,
    TeacherConfig,
)
from riformer.config.rules import check, reset_unused
from riformer.config.serialise import from_dict, to_dict, upgrade

__all__ = [
    "MOVABLE",
    "AugmentConfig",
    "DataConfig",
    "DistillConfig",
    "ModelConfig",
    "OptimConfig",
    "Recipe",
    "ResearchConfig",
    "TeacherConfig",
    "check",
    "from_dict",
    "reset_unused",
    "to_dict",
    "upgrade",
]
