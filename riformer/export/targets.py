"""The targets of `riformer export`, each in a file of its own."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from riformer.export.executorch import export_executorch
from riformer.export.graph import Options
from riformer.export.native import export_native
from riformer.export.onnx import export_onnx
from riformer.export.openvino import export_openvino
from riformer.export.pytorch import export_aoti, export_pt2
from riformer_runtime.engines import PayloadRunner


class Target(NamedTuple):
    """A target.

    Attributes:
        export: (model, example, folder, options) -> runner: writes a payload into the folder, and opens it. The model
            stays as it is. Shape: example [N, C, H, W], float32, what the graph takes.
        precisions: that it has; those of the engine in floating point first.
        forms: of a RIFormer's graph that it can be given; the fastest one is exported.
        riformer_only: whether other networks cannot be exported.
    """

    export: Callable[[nn.Module, Tensor, Path, Options], PayloadRunner]
    precisions: tuple[str, ...]
    forms: tuple[str, ...] = ("deploy", "collapsed")
    riformer_only: bool = False


EXPORTERS: dict[str, Target] = {
    "native": Target(export_native, ("fp32", "bf16x3", "bf16"), ("collapsed",), riformer_only=True),
    "onnx": Target(export_onnx, ("fp32", "fp16", "int8")),
    "openvino": Target(export_openvino, ("fp32", "bf16", "int8")),
    "pt2": Target(export_pt2, ("fp32", "bf16", "fp16")),
    "executorch": Target(export_executorch, ("fp32",)),
    "aoti": Target(export_aoti, ("fp32", "bf16", "fp16")),
}
