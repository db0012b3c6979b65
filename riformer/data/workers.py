"""Worker processes that decode and augment images beside the training process."""

import atexit
import multiprocessing
import os
import shutil
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pickle import UnpicklingError
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

PREFETCH = 2  # parts that each worker computes ahead, DataLoader's default
WORKER_SECONDS = 900  # the longest that the next part may take
SHARED_MEMORY = "/dev/shm"  # where torch's workers put their tensors on Linux, with either sharing strategy
ADVICE = (
    "give the container a larger --shm-size, lower --data.num-workers or --optim.batch-size, "
    "or raise --optim.accumulation"
)


def load(parts: Any, keys: list, num_workers: int) -> Iterator[Any]:
    """`parts[key]` for each key, in order, computed in worker processes if there are any.

    Its own generator keeps torch's global one untouched.

    Raises:
        ValueError: an image cannot be read; the message names it.
        RuntimeError: a worker died, failed, or computed nothing for `WORKER_SECONDS`.
    """
    num_workers = min(num_workers, len(keys))
    loader: DataLoader = DataLoader(
        _WorkerParts(parts) if num_workers else parts,
        batch_size=None,
        sampler=keys,
        num_workers=num_workers,
        collate_fn=tuple,
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),
        timeout=WORKER_SECONDS if num_workers else 0,
        worker_init_fn=_start_worker,
    )
    yield from _from_workers(loader) if num_workers else loader


def _from_workers(loader: DataLoader) -> Iterator[Any]:
    iterator: Any = iter(loader)
    for worker in iterator._workers:
        worker.terminate = worker.kill  # torch's last resort, SIGTERM, is ignored by our workers
    # An exception that nobody catches keeps this generator alive until Python exits, and then Python would wait for the
    # workers forever.
    end = iterator._shutdown_workers
    atexit.register(end)
    try:
        while True:
            try:
                part = next(iterator)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError, UnpicklingError) as error:
                raise RuntimeError(_explanation(error)) from error
            if isinstance(part[0], _Failure):
                raise part[0].error()
            yield part
    finally:
        atexit.unregister(end)
        end()


@dataclass(frozen=True)
class _Failure:
    """An error of a worker as text, since not every exception can be sent to another process."""

    message: str
    is_value_error: bool
    traceback: str

    def error(self) -> Exception:
        """The error to raise in the training process; its cause has the worker's traceback."""
        error = (ValueError if self.is_value_error else RuntimeError)(self.message)
        error.__cause__ = RuntimeError(f"in a worker:\n{self.traceback}")
        return error


class _WorkerParts:
    """Parts in shared memory, or a failure.

    If a worker raised, torch would make its traceback the message. If there was no room in shared memory, torch would
    notice in a background thread of the worker, and the training process would wait for the part in vain.
    """

    def __init__(self, parts: Any):
        self.parts = parts

    def __getitem__(self, key: Any) -> tuple:
        try:
            part = self.parts[key]
        except Exception as error:
            text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            return (_Failure(text, isinstance(error, ValueError), traceback.format_exc()),)
        try:
            return tuple(value.share_memory_() if isinstance(value, Tensor) else value for value in part)
        except RuntimeError as error:
            text = f"a worker cannot put its part into shared memory ({error}): {ADVICE}"
            return (_Failure(text, False, traceback.format_exc()),)


def _start_worker(number: int) -> None:
    """Ties a worker to the training process, and to nothing else.

    When a signal reaches the whole process group, the training process finishes its step and saves its state, for which
    it needs its workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Waits for the end of the training process, however it ends, and ends this one.

    torch's workers look at the process that forked them, which under forkserver is not the training process.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def dead_workers_explained() -> Iterator[None]:
    """Says what to do when a worker dies; torch raises a bare error for that at any moment, in the main thread."""
    try:
        yield
    except RuntimeError as error:
        if str(error).startswith("DataLoader worker"):
            raise RuntimeError(_explanation(error)) from error
        raise


def _explanation(error: Exception) -> str:
    """What happened to the workers, from what torch raised, and what to do."""
    text = str(error).strip() or type(error).__name__
    if "timed out" in text:
        return f"no worker of --data.num-workers has computed the next part of a batch in {WORKER_SECONDS} s"
    if "open files" in text or "ancdata" in text:
        return "too many open files for --data.num-workers: raise the limit with `ulimit -n`, or take fewer workers"
    return f"a worker of --data.num-workers died, often because memory or shared memory ran out ({text}): {ADVICE}"


def check_shared_memory(
    part_bytes: int, num_parts: int, num_workers: int, held: int = 2, folder: str = SHARED_MEMORY
) -> None:
    """Compares what workers put into shared memory with its free space, before training starts.

    Args:
        part_bytes: size of one part.
        num_parts: parts that are computed altogether; there are never more at once.
        num_workers: workers of this process. Every process of torchrun on this machine has as many.
        held: parts that the training process holds beside those that workers compute ahead. Where there is a GPU,
            DataLoader copies each part into pinned memory at once, and holds one.
        folder: where shared memory is mounted; on systems without it nothing is checked.

    Raises:
        ValueError: it does not fit; the message says what to change.
    """
    if not num_workers or not os.path.isdir(folder):
        return
    num_parts = min(num_parts, num_workers * PREFETCH + (1 if torch.cuda.is_available() else held))
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    needed, free = num_processes * num_parts * part_bytes, shutil.disk_usage(folder).free
    if needed > 0.9 * free:
        each = f" in each of {num_processes} processes" if num_processes > 1 else ""
        raise ValueError(
            f"--data.num-workers {num_workers} keeps up to {num_parts} parts of a batch in shared memory{each}, "
            f"{needed / 2**20:,.1f} MiB together, but {folder} has {free / 2**20:,.1f} MiB free: {ADVICE}"
        )
