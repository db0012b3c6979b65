"""The engines that a network can run on, each at its best: what `riformer bench` compares."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from riformer.export.graph import Options
from riformer.export.targets import EXPORTERS
from riformer.runtime.collapse import Collapsed
from riformer.runtime.optimize import DTYPES, optimize

Build = Callable[[nn.Module, Tensor, str], Callable[[Tensor], Tensor]]


class Engine(NamedTuple):
    """An engine that `bench` measures.

    Attributes:
        build: (model, example, precision) -> runner, from float32 images [N, C, H, W] of the example's shape and device
            to float32 logits.
        precisions: that it has.
        riformer_only: whether it runs RIFormers alone.
    """

    build: Build
    precisions: tuple[str, ...]
    riformer_only: bool = False


def eager(model: nn.Module, example: Tensor, precision: str) -> Callable[[Tensor], Tensor]:
    """PyTorch as it is. Choice: channels last, which is no slower here and the faster layout on GPUs."""
    return _in_dtype(_cast(model, precision), precision)


def compiled(model: nn.Module, example: Tensor, precision: str) -> Callable[[Tensor], Tensor]:
    """torch.compile: with frozen weights on a CPU, with the autotuned kernels and CUDA graphs on a GPU."""
    options: dict[str, Any] = {"mode": "max-autotune"} if example.is_cuda else {"options": {"freezing": True}}
    return _in_dtype(torch.compile(_cast(model, precision), **options), precision)


def compiled_collapsed(model: nn.Module, example: Tensor, precision: str) -> Callable[[Tensor], Tensor]:
    """torch.compile on the collapsed form in plain PyTorch."""
    return compiled(Collapsed(model, DTYPES[precision]), example, precision)


def ours(model: nn.Module, example: Tensor, precision: str) -> Callable[[Tensor], Tensor]:
    """riformer.optimize."""
    return optimize(model, example, precision)


def exported(target: str, form: Literal["deploy", "collapsed"] = "deploy") -> Build:
    """What `riformer export` writes for a target, for the example's shape alone; int8 is calibrated on the example."""

    def build(model: nn.Module, example: Tensor, precision: Any) -> Callable[[Tensor], Tensor]:
        options = Options(precision, form, dynamic=False, any_size=False, threads=torch.get_num_threads())
        with TemporaryDirectory() as folder:
            runner = EXPORTERS[target].export(model, example, Path(folder), options)
        return lambda images: torch.from_numpy(runner(images.numpy()))

    return build


ENGINES: dict[str, Engine] = {
    "eager": Engine(eager, ("fp32", "bf16", "fp16")),
    "compile": Engine(compiled, ("fp32", "bf16", "fp16")),
    "compile-collapsed": Engine(compiled_collapsed, ("fp32", "bf16", "fp16"), riformer_only=True),
    "onnxruntime": Engine(exported("onnx"), ("fp32", "int8")),
    "openvino": Engine(exported("openvino"), ("fp32", "bf16", "int8")),
    "openvino-collapsed": Engine(exported("openvino", "collapsed"), ("fp32", "bf16", "int8"), riformer_only=True),
    "ours": Engine(ours, ("fp32", "bf16x3", "bf16", "fp16"), riformer_only=True),
}


def _cast(model: nn.Module, precision: str) -> nn.Module:
    """A copy in the precision's type and channels last; a Collapsed has both already."""
    if isinstance(model, Collapsed):
        return model
    return deepcopy(model).to(DTYPES[precision]).to(memory_format=torch.channels_last)


def _in_dtype(model: Callable[[Tensor], Tensor], precision: str) -> Callable[[Tensor], Tensor]:
    def run(images: Tensor) -> Tensor:
        return model(images.to(DTYPES[precision], memory_format=torch.channels_last)).float()

    return run
