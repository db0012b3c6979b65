"""The engines that a network can run on, each at its best: what `riformer bench` compares.

Exporters belong in this folder, one file for each target. The functions below that build graphs for ONNX Runtime and
OpenVINO then move there, and the table `ENGINES` uses them.
"""

import ctypes
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from riformer.runtime.collapse import Collapsed
from riformer.runtime.optimize import DTYPES, optimize

Runner = Callable[[Tensor], Tensor]


class Engine(NamedTuple):
    """An engine that `bench` measures.

    Attributes:
        build: (model, example, precision) -> runner, from float32 images [N, C, H, W] of the example's shape and device
            to float32 logits.
        precisions: that it has.
        riformer_only: whether it runs RIFormers alone.
    """

    build: Callable[[nn.Module, Tensor, str], Runner]
    precisions: tuple[str, ...]
    riformer_only: bool = False


def eager(model: nn.Module, example: Tensor, precision: str) -> Runner:
    """PyTorch as it is. Choice: channels last, which is no slower here and the faster layout on GPUs."""
    return _in_dtype(_cast(model, precision), precision)


def compiled(model: nn.Module, example: Tensor, precision: str) -> Runner:
    """torch.compile: with frozen weights on a CPU, with the autotuned kernels and CUDA graphs on a GPU."""
    options: dict[str, Any] = {"mode": "max-autotune"} if example.is_cuda else {"options": {"freezing": True}}
    return _in_dtype(torch.compile(_cast(model, precision), **options), precision)


def onnxruntime(model: nn.Module, example: Tensor, precision: str) -> Runner:
    """ONNX Runtime; int8 by static quantisation, calibrated on the example."""
    try:
        from onnxruntime import InferenceSession, SessionOptions
    except ImportError as error:
        raise RuntimeError("the engine onnxruntime is not installed: pip install 'riformer[export]'") from error
    options = SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        file = _onnx(model, example, Path(folder), precision == "int8")
        session = InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def openvino(model: nn.Module, example: Tensor, precision: str) -> Runner:
    """OpenVINO, in the precision asked for; int8 reads ONNX Runtime's quantised graph."""
    try:
        import openvino as ov
    except ImportError as error:
        raise RuntimeError("the engine openvino is not installed: pip install 'riformer[export]'") from error
    hints = {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates the tracing by which OpenVINO reads a module
        graph: Any = model
        if precision == "int8":
            graph = _onnx(model, example, Path(folder), quantised=True)
        converted = ov.convert_model(graph, example_input=example if graph is model else None)
        with same_signal_stack():
            request = ov.Core().compile_model(converted, "CPU", hints).create_infer_request()
    return lambda images: torch.from_numpy(request.infer([images.numpy()], share_inputs=True)[0])


@contextmanager
def same_signal_stack() -> Iterator[None]:
    """Gives the thread back its alternate signal stack, for code that compiles a network with OpenVINO.

    OpenVINO's CPU plugin sets one for each compiled network and restores the one before when the network is freed. If
    networks are freed in the order of their creation, the one before is freed memory, and Python's next signal, such as
    Ctrl-C or the end of a data worker, ends the process with a segmentation fault.
    """
    if os.name == "nt":
        yield
        return
    libc, before = ctypes.CDLL(None), ctypes.create_string_buffer(64)  # a stack_t, which has 24 bytes on Linux
    libc.sigaltstack(None, before)
    try:
        yield
    finally:
        libc.sigaltstack(before, None)


def ours(model: nn.Module, example: Tensor, precision: str) -> Runner:
    """riformer.optimize."""
    return optimize(model, example, precision)


def collapsed(build: Callable[[nn.Module, Tensor, str], Runner]) -> Callable[[nn.Module, Tensor, str], Runner]:
    """The engine on the collapsed form in plain PyTorch instead of the deploy form."""

    def build_collapsed(model: nn.Module, example: Tensor, precision: str) -> Runner:
        form = Collapsed(model, DTYPES[precision] if build is compiled else torch.float32)
        return build(form, example, precision)

    return build_collapsed


ENGINES: dict[str, Engine] = {
    "eager": Engine(eager, ("fp32", "bf16", "fp16")),
    "compile": Engine(compiled, ("fp32", "bf16", "fp16")),
    "compile-collapsed": Engine(collapsed(compiled), ("fp32", "bf16", "fp16"), riformer_only=True),
    "onnxruntime": Engine(onnxruntime, ("fp32", "int8")),
    "openvino": Engine(openvino, ("fp32", "bf16", "int8")),
    "openvino-collapsed": Engine(collapsed(openvino), ("fp32", "bf16"), riformer_only=True),
    "ours": Engine(ours, ("fp32", "bf16x3", "bf16", "fp16"), riformer_only=True),
}


def _cast(model: nn.Module, precision: str) -> nn.Module:
    """A copy in the precision's type and channels last; a Collapsed has both already."""
    if isinstance(model, Collapsed):
        return model
    return deepcopy(model).to(DTYPES[precision]).to(memory_format=torch.channels_last)


def _in_dtype(model: Callable[[Tensor], Tensor], precision: str) -> Runner:
    def run(images: Tensor) -> Tensor:
        return model(images.to(DTYPES[precision], memory_format=torch.channels_last)).float()

    return run


def _onnx(model: nn.Module, example: Tensor, folder: Path, quantised: bool) -> Path:
    file = folder / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (example,), file, dynamo=True, verbose=False, external_data=False)
    if not quantised:
        return file
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Calibration(CalibrationDataReader):
        def __init__(self, name: str):
            self.batches = iter([{name: example.numpy()}])

        def get_next(self) -> Any:
            return next(self.batches, None)

    import onnx

    prepared, int8 = folder / "prepared.onnx", folder / "int8.onnx"
    quant_pre_process(file, prepared, skip_symbolic_shape=True)
    name = onnx.load(prepared, load_external_data=False).graph.input[0].name
    products = ["Conv", "Gemm", "MatMul"]  # the rest stays in float32
    quantize_static(
        prepared,
        int8,
        Calibration(name),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        op_types_to_quantize=products,
    )
    return int8
