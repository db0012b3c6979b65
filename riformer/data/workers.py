"""Processes that decode and augment images beside the training process."""

import ctypes
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch.utils.data import DataLoader

PREFETCH = 2  # parts that each worker keeps ready, DataLoader's default
WORKER_SECONDS = 900  # in which a worker must have computed a part
GRACE_SECONDS = 30  # that a worker goes on after SIGTERM, while the training process saves its state


def load(parts: Any, keys: list, num_workers: int) -> Iterator[Any]:
    """`parts[key]` for each key, in order, computed in worker processes if there are any.

    Its own generator keeps torch's global one untouched.

    Raises:
        ValueError: an image cannot be read; the message names it.
        RuntimeError: a worker died, or computed nothing for `WORKER_SECONDS`.
    """
    num_workers = min(num_workers, len(keys))
    loader = DataLoader(
        parts,
        batch_size=None,
        sampler=keys,
        num_workers=num_workers,
        collate_fn=tuple,
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),
        timeout=WORKER_SECONDS if num_workers else 0,
        worker_init_fn=_start_worker,
    )
    iterator = iter(loader)
    try:
        yield from iterator
    except Exception as error:
        if num_workers:
            _explain(error)
        raise
    finally:
        if num_workers:
            iterator._shutdown_workers()  # type: ignore[attr-defined]  # now, and not when the last reference in some traceback goes


def _start_worker(number: int) -> None:
    """Lets the training process finish its step when a signal reaches its whole process group, workers included."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_SECONDS))
    with suppress(OSError, AttributeError):  # Linux alone
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: ends with the process that started it


def _explain(error: Exception) -> None:
    """Says in one message what happened in a worker.

    Raises:
        ValueError, RuntimeError: see `load`.
    """
    text = str(error)
    if "Original Traceback" in text:  # the worker's own error, with its type before it
        last = text.strip().splitlines()[-1]
        raise ValueError(last.partition(": ")[2] or last) from None
    if "timed out" in text:
        raise RuntimeError(f"a worker of --data.num-workers computed nothing for {WORKER_SECONDS} s") from None
    if isinstance(error, ConnectionError | EOFError) or "worker" in text or "ancdata" in text:
        raise RuntimeError(
            "a worker of --data.num-workers died, often because memory or shared memory ran out: lower "
            "--data.num-workers or the batch of a process, or give the container a larger --shm-size"
        ) from None


def check_shared_memory(part_size: int, img_size: int, num_workers: int, folder: str = "/dev/shm") -> None:
    """Compares what workers keep in shared memory with its free space, since a worker that finds none hangs or dies.

    Raises:
        ValueError: it does not fit; the message says what to change.
    """
    if not num_workers or not os.path.isdir(folder):
        return
    needed = num_workers * PREFETCH * part_size * 3 * img_size**2 * 4
    free = shutil.disk_usage(folder).free
    if needed > 0.9 * free:
        raise ValueError(
            f"{num_workers} workers keep {PREFETCH} parts of {part_size} images each in shared memory, "
            f"{needed / 2**20:,.0f} MiB, but {folder} has {free / 2**20:,.0f} MiB free: give the container a larger "
            f"--shm-size, lower --data.num-workers or --optim.batch-size, or raise --optim.accumulation"
        )
