"""The target native: the weights of the collapsed form, for this project's own engine."""

from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from riformer.export.graph import Options, opened
from riformer.runtime.collapse import network_weights
from riformer.runtime.native import as_arrays
from riformer_runtime.engines import PayloadRunner
from riformer_runtime.native.weights import write_weights


def export_native(model: nn.Module, example: Tensor, folder: Path, options: Options) -> PayloadRunner:
    """Writes native.npz, in float32 for every precision: the engine narrows the weights when it loads them.

    Raises:
        ValueError: the model is no RIFormer, or preprocessing is to be inside.
    """
    if options.inside:
        raise ValueError(f"the target native has no graph, so no --inside {options.inside}")
    file = folder / "native.npz"
    write_weights(as_arrays(network_weights(model)), file)
    return opened("native", model, [file], "collapsed", True, example, replace(options, dynamic=True))
