"""What the processes of one run agree on. Everything works alike with a single process and no group."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

PATIENCE = timedelta(hours=3)  # while the main process scans a large folder, the others wait


@contextmanager
def process_group() -> Iterator[tuple[int, int, torch.device]]:
    """Rank, number of processes and device; joins torchrun's group if there is one. Inside, cuDNN is deterministic."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    joins = "WORLD_SIZE" in os.environ and not dist.is_initialized()
    if joins:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    was_deterministic, torch.backends.cudnn.deterministic = torch.backends.cudnn.deterministic, True
    try:
        yield (dist.get_rank(), dist.get_world_size(), device) if dist.is_initialized() else (0, 1, device)
    finally:
        torch.backends.cudnn.deterministic = was_deterministic
        if joins:
            dist.destroy_process_group()


@contextmanager
def main_process_first(rank: int) -> Iterator[None]:
    """The main process runs the body, then the others do."""
    if rank:
        barrier()
    yield
    if not rank:
        barrier()


def gather(value: Any) -> list[Any]:
    """The values of all processes, in order of rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any process."""
    if not dist.is_initialized():
        return flag
    tensor = torch.tensor(float(flag), device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return bool(tensor)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of the processes' tensors."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def average_gradients(module: nn.Module) -> None:
    """Makes each gradient the mean over the processes; for parameters that DistributedDataParallel does not hold."""
    for parameter in module.parameters():
        if parameter.grad is not None:
            mean_over_processes(parameter.grad)


def share_buffers(module: nn.Module) -> None:
    """Gives all processes the first one's buffers, such as batch norm's statistics, so that they have one model."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def is_main_process() -> bool:
    """Whether this is the only process, or the first of torchrun's."""
    return int(os.environ.get("RANK", 0)) == 0
