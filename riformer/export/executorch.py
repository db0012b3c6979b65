"""The target executorch: programs for phones and small devices, by ExecuTorch and XNNPACK."""

import threading
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from riformer.export.graph import Graph, Options, opened
from riformer.export.silence import silent
from riformer.model.checkpoint import shorten
from riformer_runtime.artifact import Payload
from riformer_runtime.engines import Compute, Engine, PayloadRunner


@torch.no_grad()
def export_executorch(model: nn.Module, example: Tensor, folder: Path, options: Options) -> PayloadRunner:
    """Writes executorch-fp32.pte, which takes one image at a time, of the example's size.

    Raises:
        ValueError: a resize is to be inside, which takes images of any size.
        RuntimeError: the package is not installed, or cannot take this network.
    """
    if options.inside == "resize":
        raise ValueError("the target executorch takes images of one size, so no --inside resize")
    try:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
    except ImportError as error:
        raise RuntimeError("the target executorch is not installed: pip install 'riformer[executorch]'") from error
    options = Options(options.precision, options.form, options.inside, dynamic=False, any_size=False)
    graph = Graph(model, options).to(memory_format=torch.contiguous_format)
    file = folder / "executorch-fp32.pte"
    try:
        with silent():
            program = torch.export.export(graph, (example[:1],))
            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    except Exception as error:  # of networks that it cannot take it raises nearly anything
        reason = shorten(" ".join(str(error).split()), 500)
        raise RuntimeError(f"{type(model).__name__} cannot be exported to ExecuTorch: {reason}") from error
    file.write_bytes(lowered.buffer)
    return opened("executorch", model, [file], graph.form, False, example[:1], options)


def _open(file: Path, payload: Payload, threads: int) -> tuple[Compute, str, str]:
    """ExecuTorch chooses its threads itself; one call at a time."""
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(str(file)).load_method("forward")
    if method is None:
        raise ValueError(f"{file} holds no program")
    lock = threading.Lock()

    def compute(images: np.ndarray) -> np.ndarray:
        with lock:  # the outputs lie in the program's own memory
            return method.execute([torch.from_numpy(images)])[0].numpy().copy()

    return compute, "fp32", ""


ENGINE = Engine(_open, "executorch", "executorch")
