"""The targets pt2 and aoti: PyTorch's own formats, for programs that have PyTorch."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from riformer.export.graph import Graph, Options, opened
from riformer.export.onnx import varying_dimensions
from riformer.export.silence import silent
from riformer.model.checkpoint import shorten
from riformer_runtime.artifact import Payload
from riformer_runtime.engines import Compute, Engine, PayloadRunner


def export_pt2(model: nn.Module, example: Tensor, folder: Path, options: Options) -> PayloadRunner:
    """Writes pt2-PRECISION.pt2, a program of torch.export: `torch.export.load(FILE).module()` runs it.

    Raises:
        RuntimeError: PyTorch cannot record this network.
    """
    program, form, any_size = record(model, example, options)
    file = folder / f"pt2-{options.precision}.pt2"
    with silent():
        torch.export.save(program, file)
    return opened("pt2", model, [file], form, any_size, example, options)


def export_aoti(model: nn.Module, example: Tensor, folder: Path, options: Options) -> PayloadRunner:
    """Writes aoti-PRECISION.pt2, compiled for this processor: `torch._inductor.aoti_load_package(FILE)` runs it.

    Raises:
        RuntimeError: PyTorch cannot record or compile this network, or there is no C++ compiler.
    """
    program, form, any_size = record(model, example, options)
    file = folder / f"aoti-{options.precision}.pt2"
    try:
        with silent():
            torch._inductor.aoti_compile_and_package(program, package_path=str(file))
    except Exception as error:  # of the compilers it runs, nearly anything
        raise RuntimeError(f"{type(model).__name__} cannot be compiled ahead of time: {_short(error)}") from error
    return opened("aoti", model, [file], form, any_size, example, options)


@torch.no_grad()
def record(model: nn.Module, example: Tensor, options: Options) -> tuple[ExportedProgram, str, bool]:
    """The network as a program of torch.export, its form, and whether it takes images of any size.

    Raises:
        RuntimeError: PyTorch cannot record this network.
    """
    graph = Graph(model, options)
    example = example[:1] if options.inside == "resize" else example
    for vary in varying_dimensions(options):
        try:
            with silent():
                program = torch.export.export(graph, (example,), dynamic_shapes={"images": vary} if vary else None)
            return program, graph.form, 2 in vary
        except Exception as error:  # of networks that it cannot record torch raises nearly anything
            failure = error
    raise RuntimeError(f"{type(model).__name__} cannot be recorded by torch.export: {_short(failure)}") from failure


def _short(error: Exception) -> str:
    return shorten(" ".join(str(error).split()), 500)


def _open_pt2(file: Path, payload: Payload, threads: int) -> tuple[Compute, str, str]:
    with silent():
        module = torch.export.load(file).module()
    return _on_arrays(module, threads), payload.precision, torch.__version__


def _open_aoti(file: Path, payload: Payload, threads: int) -> tuple[Compute, str, str]:
    with silent():
        module = torch._inductor.aoti_load_package(str(file))
    return _on_arrays(module, threads), payload.precision, torch.__version__


def _on_arrays(module: Any, threads: int) -> Compute:
    """PyTorch has one number of threads for the whole process, which is set where it differs."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)

    @torch.inference_mode()
    def compute(images: np.ndarray) -> np.ndarray:
        return module(torch.from_numpy(images)).numpy()

    return compute


PT2 = Engine(_open_pt2, "", "train", runs_code=True)  # torch.export.load unpickles
AOTI = Engine(_open_aoti, "", "train", runs_code=True)  # a library of machine code
