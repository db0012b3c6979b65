"""RIFormer: vision backbones without token mixers, and the training that keeps their accuracy.

Importing this package registers the models with timm: `timm.create_model("riformer_s12")`.
"""

from importlib.util import find_spec

if _missing := [name for name in ("torch", "torchvision", "timm") if find_spec(name) is None]:
    raise ModuleNotFoundError(
        f"riformer needs {', '.join(_missing)} here: pip install 'riformer[train]' "
        f"(what riformer export wrote runs without: import riformer_runtime)",
        name=_missing[0],
    )

from riformer.model import variants as variants
from riformer.model.fuse import fold, fuse
from riformer.model.hub import from_pretrained
from riformer.model.metaformer import MetaFormer
from riformer.model.start import start_from
from riformer.model.weights import load, save, save_pretrained
from riformer.runtime.optimize import optimize
from riformer_runtime.version import __version__

__all__ = [
    "MetaFormer",
    "__version__",
    "fold",
    "from_pretrained",
    "fuse",
    "load",
    "optimize",
    "save",
    "save_pretrained",
    "start_from",
]
