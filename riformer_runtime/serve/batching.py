"""Requests that come at the same time, computed at once."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

Compute = Callable[[Sequence[np.ndarray]], np.ndarray]


class Batcher:
    """Collects inputs and computes them in batches, one batch at a time.

    A batch starts when it is full, or when its first input has waited `max_wait` seconds. While one batch is computed
    the next is collected, so that under load no input waits for the clock.

    Args:
        compute: inputs -> outputs, one each; called in a thread of its own.
        batch_size: largest number of inputs at once.
        max_wait: longest time that an input waits for others, seconds.
        observe: is called with the size of each batch.
    """

    def __init__(self, compute: Compute, batch_size: int, max_wait: float, observe: Callable[[int], None]):
        self._compute, self._batch_size, self._max_wait, self._observe = compute, batch_size, max_wait, observe
        self._waiting: asyncio.Queue[tuple[float, np.ndarray, asyncio.Future]] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._worker: asyncio.Task | None = None

    def start(self) -> None:
        """Begins to compute; inside of a running event loop."""
        self._worker = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Ends after what was submitted is computed."""
        await self._waiting.join()
        if self._worker:
            self._worker.cancel()
        self._thread.shutdown()

    async def submit(self, inputs: np.ndarray) -> np.ndarray:
        """The output for one input.

        Raises:
            RuntimeError: what the computation raised.
        """
        future = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((time.monotonic(), inputs, future))
        return await future

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._waiting.get()]
            deadline = batch[0][0] + self._max_wait
            while len(batch) < self._batch_size:
                if self._waiting.empty():
                    try:
                        batch.append(await asyncio.wait_for(self._waiting.get(), max(deadline - time.monotonic(), 0)))
                    except TimeoutError:
                        break
                else:
                    batch.append(self._waiting.get_nowait())
            self._observe(len(batch))
            try:
                outputs = await loop.run_in_executor(self._thread, self._compute, [item for _, item, _ in batch])
                for (_, _, future), output in zip(batch, outputs, strict=True):
                    if not future.done():  # the client may have gone
                        future.set_result(output)
            except Exception as error:  # belongs to these requests; the next batch is computed all the same
                for _, _, future in batch:
                    if not future.done():
                        future.set_exception(error)
            finally:
                for _ in batch:
                    self._waiting.task_done()
