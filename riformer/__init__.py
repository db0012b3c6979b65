"""RIFormer: vision backbones without token mixers, and the training that keeps their accuracy.

Importing this package registers the models with timm: `timm.create_model("riformer_s12")`.
"""

from riformer.model import variants as variants
from riformer.model.fuse import fold, fuse
from riformer.model.metaformer import MetaFormer
from riformer.model.weights import load, save, start_from

__version__ = "0.1.0"
__all__ = ["MetaFormer", "fold", "fuse", "load", "save", "start_from"]
