"""The target openvino: OpenVINO's own files, for its runtime and for OpenVINO Model Server."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from riformer.export.graph import Graph, Options, opened
from riformer.export.onnx import float_onnx
from riformer.export.quantise import quantise_openvino
from riformer.export.silence import silent
from riformer.model.checkpoint import shorten
from riformer_runtime.engines import PayloadRunner


def export_openvino(model: nn.Module, example: Tensor, folder: Path, options: Options) -> PayloadRunner:
    """Writes PRECISION.xml and .bin; weights are in float32 for bf16 too, and int8 is calibrated on the example.

    Choice: OpenVINO reads the module of PyTorch itself, because it cannot read the Fourier transforms of an ONNX graph;
    only int8 starts from ONNX, whose names of layers both engines share.

    Raises:
        RuntimeError: the packages are not installed, or cannot record this network.
    """
    try:
        import openvino as ov
    except ImportError as error:
        raise RuntimeError("the target openvino is not installed: pip install 'riformer[export]'") from error
    file = folder / f"{options.precision}.xml"
    try:
        if options.precision == "int8":
            with float_onnx(model, example, options) as graph:
                quantise_openvino(graph.path, file, example.numpy(), options.unquantised)
                form, any_size = graph.form, graph.any_size
        else:
            form, any_size = _write(ov, model, example, file, options)
    except (RuntimeError, TypeError, ValueError) as error:
        name = type(model).__name__
        raise RuntimeError(f"{name} cannot be exported to OpenVINO: {shorten(str(error), 500)}") from error
    return opened("openvino", model, [file, file.with_suffix(".bin")], form, any_size, example, options)


def _write(ov: Any, model: nn.Module, example: Tensor, file: Path, options: Options) -> tuple[str, bool]:
    """Writes the graph in float32; returns its form and whether it takes images of any size."""
    graph = Graph(model, Options("fp32", options.form, options.inside))
    with silent():
        converted = ov.convert_model(graph, example_input=example)
    num, channels, height, width = example.shape
    any_size = options.any_size or options.inside == "resize"
    sizes = [-1, -1] if any_size else [height, width]
    converted.reshape({0: ov.PartialShape([-1 if options.dynamic else num, channels, *sizes])})
    converted.inputs[0].get_tensor().set_names({"images"})
    converted.outputs[0].get_tensor().set_names({"logits"})
    ov.save_model(converted, file, compress_to_fp16=False)
    return graph.form, any_size
