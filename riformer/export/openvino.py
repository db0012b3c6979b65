"""The target openvino: OpenVINO's own files, for its runtime and for OpenVINO Model Server."""

from pathlib import Path

from torch import Tensor, nn

from riformer.export.graph import Options, opened
from riformer.export.onnx import float_onnx
from riformer.export.quantise import quantise_openvino
from riformer.export.silence import silent
from riformer_runtime.engines import PayloadRunner


def export_openvino(model: nn.Module, example: Tensor, folder: Path, options: Options) -> PayloadRunner:
    """Writes PRECISION.xml and .bin; weights are in float32 for bf16 too, and int8 is calibrated on the example.

    Raises:
        RuntimeError: the packages are not installed, or cannot record this network.
    """
    try:
        import openvino as ov
    except ImportError as error:
        raise RuntimeError("the target openvino is not installed: pip install 'riformer[export]'") from error
    file = folder / f"{options.precision}.xml"
    with float_onnx(model, example, options) as graph:
        if options.precision == "int8":
            quantise_openvino(graph.path, file, example.numpy(), options.unquantised)
        else:
            with silent():
                ov.save_model(ov.convert_model(graph.path), file, compress_to_fp16=False)
    return opened("openvino", model, [file, file.with_suffix(".bin")], graph.form, graph.any_size, example, options)
