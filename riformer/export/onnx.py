"""The target onnx: a graph for ONNX Runtime and whatever else reads ONNX."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from riformer.export.graph import Graph, OnnxFile, Options, opened
from riformer.export.quantise import quantise_onnx
from riformer.export.silence import silent
from riformer_runtime.engines import PayloadRunner

OPSET = 20


def export_onnx(model: nn.Module, example: Tensor, folder: Path, options: Options) -> PayloadRunner:
    """Writes PRECISION.onnx, its input called "images" and its output "logits"; int8 is calibrated on the example.

    Raises:
        RuntimeError: the packages are not installed, or cannot record this network.
    """
    file = folder / f"{options.precision}.onnx"
    if options.precision == "int8":
        with float_onnx(model, example, options) as graph:
            quantise_onnx(graph.path, file, example.numpy(), options.unquantised)
    else:
        graph = write_onnx(model, example, file, options)
    return opened("onnxruntime", model, [file], graph.form, graph.any_size, example, options)


@contextmanager
def float_onnx(model: nn.Module, example: Tensor, options: Options) -> Iterator[OnnxFile]:
    """The graph in float32: the one that is there already, or one in a temporary file."""
    if options.source:
        yield options.source
        return
    with tempfile.TemporaryDirectory() as folder:
        yield write_onnx(
            model,
            example[:2] if options.dynamic else example,
            Path(folder) / "graph.onnx",
            replace(options, precision="fp32"),
        )


def write_onnx(model: nn.Module, example: Tensor, file: Path, options: Options) -> OnnxFile:
    """Writes the graph. A network that takes images of one size alone has that size in its graph.

    Raises:
        RuntimeError: the packages are not installed, or cannot record this network.
    """
    try:
        import onnxscript  # noqa: F401 -- which torch.onnx needs
    except ImportError as error:
        raise RuntimeError("the target onnx is not installed: pip install 'riformer[export]'") from error
    graph = Graph(model, options)
    for vary in varying_dimensions(options):
        try:
            with silent():
                torch.onnx.export(
                    graph,
                    (example[:1] if options.inside == "resize" else example,),
                    file,
                    input_names=["images"],
                    output_names=["logits"],
                    opset_version=OPSET,
                    dynamo=True,
                    verbose=False,
                    external_data=False,
                    dynamic_shapes={"images": vary} if vary else None,
                )
            return OnnxFile(file, graph.form, 2 in vary)
        except Exception as error:  # of networks that it cannot record torch raises nearly anything
            failure = error
    raise RuntimeError(f"{type(model).__name__} cannot be exported to ONNX: {failure}") from failure


def varying_dimensions(options: Options) -> list[dict[int, Any]]:
    """Dimensions that may vary, in the order in which they are tried: those asked for, then without the size."""
    dynamic = torch.export.Dim.DYNAMIC
    if options.inside == "resize":
        return [{2: dynamic, 3: dynamic}]
    number: dict[int, Any] = {0: dynamic} if options.dynamic else {}
    return [{**number, 2: dynamic, 3: dynamic}, number] if options.any_size else [number]
