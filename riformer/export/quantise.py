"""int8 by the engines' own tools: ONNX Runtime's static quantisation, and NNCF for OpenVINO.

Both start from one ONNX graph in float32 and quantise its convolutions and matrix products with weights: weights by
channel and symmetric, activations by tensor. Everything else stays in float32. Choice: nothing else, because what NNCF
quantises by itself, norms and sums included, is slower here, and wrong in some networks with its bias correction.
"""

import tempfile
from ast import literal_eval
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from riformer.export.silence import silent

PRODUCTS = ("Conv", "Gemm", "MatMul")
BATCH_SIZE = 8


def product_names(file: Path) -> dict[str, str]:
    """The products with weights in an ONNX graph: for the name of each, that of the module of PyTorch it comes from."""
    import onnx

    graph = onnx.load(file).graph
    constants = {tensor.name for tensor in graph.initializer}
    for node in graph.node:  # such as a weight's transpose
        if node.op_type == "Constant" or (node.input and constants.issuperset(node.input)):
            constants.update(node.output)
    products = [node for node in graph.node if node.op_type in PRODUCTS and constants.intersection(node.input)]
    return {node.name: _module_name(node) for node in products}


def _module_name(node: Any) -> str:
    """Such as "stages.0.blocks.1.mlp.fc1"; the node's own name where nothing was recorded."""
    scopes = next((entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"), "[]")
    modules = [name for name in literal_eval(scopes) if name.startswith("network.")]
    return modules[-1].removeprefix("network.") if modules else node.name


def quantise_onnx(source: Path, destination: Path, images: np.ndarray, unquantised: Collection[str] = ()) -> None:
    """Writes the graph with quantised products.

    Args:
        source: an ONNX graph in float32 whose input is called "images".
        destination: another .onnx file.
        images: of the training data, for the ranges of activations. Shape: [N, C, H, W].
        unquantised: names of products that stay in float32.

    Raises:
        RuntimeError: the package is not installed.
    """
    try:
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as error:
        raise RuntimeError("int8 for ONNX Runtime is not installed: pip install 'riformer[export]'") from error

    class Calibration(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = _batches(source, images)

        def get_next(self) -> Any:
            return next(({"images": batch} for batch in self.batches), None)

    with tempfile.TemporaryDirectory() as folder, silent():
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            destination,
            Calibration(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=list(PRODUCTS),
            nodes_to_quantize=[name for name in product_names(source) if name not in unquantised],
        )


def quantise_openvino(source: Path, destination: Path, images: np.ndarray, unquantised: Collection[str] = ()) -> None:
    """Writes OpenVINO's .xml and .bin with quantised products; arguments and errors as for `quantise_onnx`."""
    try:
        import nncf
        import openvino as ov
    except ImportError as error:
        raise RuntimeError("int8 for OpenVINO is not installed: pip install 'riformer[export]'") from error
    with silent():
        graph = ov.convert_model(source)
        operators = graph.get_ops()
        kept = [op.friendly_name for op in operators if op.friendly_name.partition("/")[0] in unquantised]
        others = {op.get_type_name() for op in operators} - {"Convolution", "MatMul", "Constant", "Parameter", "Result"}
        quantised = nncf.quantize(
            graph,
            nncf.Dataset(list(_batches(source, images))),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(images),  # at most
            ignored_scope=nncf.IgnoredScope(names=kept, types=sorted(others), validate=False),
            advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=True),
        )
    ov.save_model(quantised, destination, compress_to_fp16=False)


def _batches(source: Path, images: np.ndarray) -> Iterator[np.ndarray]:
    """The images in batches, of the one size that the graph takes where it has one; the rest is then left out."""
    import onnx

    graph = onnx.load(source, load_external_data=False).graph
    (fixed,) = (tensor.type.tensor_type.shape.dim[0].dim_value for tensor in graph.input)
    size = fixed or BATCH_SIZE
    for i in range(0, len(images) - fixed + 1 if fixed else len(images), size):
        yield np.ascontiguousarray(images[i : i + size])
