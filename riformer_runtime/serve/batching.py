"""Dynamic batches: images of concurrent requests are computed together.

An image waits for others at most `max_wait` seconds from the moment that it is read, and then for the batch before its
own. While that one is computed the next fills up, so under load batches are full and nobody waits for the clock.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from riformer_runtime.engines import Runner, inside_of
from riformer_runtime.predict import most_probable, probabilities
from riformer_runtime.serve.metrics import Metrics

Classes = tuple[tuple[str, float], ...]
log = logging.getLogger(__name__)


class Labelled(NamedTuple):
    """The classes of one image, best first, and where its time went, in milliseconds.

    Attributes:
        classes: names and probabilities.
        read_ms: to decode and resize it.
        wait_ms: until its batch began.
        compute_ms: of its batch in the network.
        batch_size: images in its batch.
    """

    classes: Classes
    read_ms: float
    wait_ms: float
    compute_ms: float
    batch_size: int


class _Waiting(NamedTuple):
    image: np.ndarray
    top_k: int
    read_seconds: float
    since: float
    answer: asyncio.Future


class Batcher:
    """One model, whose images are computed in batches, one batch at a time. `run` has to run beside the calls.

    Args:
        name: of the model, for the metrics.
        runner: that computes.
        batch_size: most images computed at once; a graph that resizes takes one at a time.
        max_wait: longest time that an image waits for others, seconds.
        metrics: that are counted.
    """

    def __init__(self, name: str, runner: Runner, batch_size: int, max_wait: float, metrics: Metrics):
        self.runner = runner
        self._name, self._metrics, self._max_wait = name, metrics, max_wait
        self._batch_size = 1 if inside_of(runner) == "resize" else batch_size
        self._waiting: deque[_Waiting] = deque()
        self._changed = asyncio.Event()  # an image came, or a batch is computed
        # Images that are decoded take memory: a batch that is computed, the next one, and a few that are being read.
        self._room = asyncio.Semaphore(2 * self._batch_size + 2)

    async def __call__(self, read: Callable[[], np.ndarray], top_k: int, readers: Executor) -> Labelled:
        """Labels one image.

        Args:
            read: gives what the runner takes for the image, [C, H, W]; called in one of the threads of `readers`.
            top_k: classes to name.
            readers: threads.

        Raises:
            ValueError: of `read`; or the network does not take an image of this size.
            RuntimeError: the network's logits are not finite.
        """
        loop = asyncio.get_running_loop()
        async with self._room:
            started = time.perf_counter()
            image = await loop.run_in_executor(readers, read)
            now = time.perf_counter()
            answer = loop.create_future()
            self._waiting.append(_Waiting(image, top_k, now - started, now, answer))
            self._changed.set()
            return await answer

    async def run(self, computer: Executor) -> None:
        """Computes batches until it is cancelled.

        A batch that is full is handed over while the one before is computed, so that the processors never wait.

        Args:
            computer: a thread; shared by all models, since one network uses all processors.
        """
        before: asyncio.Task | None = None
        current: asyncio.Task | None = None
        while True:
            batch = await self._next_batch(current)
            if before:
                await before
            before, current = current, asyncio.create_task(self._answer(batch, computer))

    async def _next_batch(self, current: asyncio.Task | None) -> list[_Waiting]:
        """Waits for a full batch; or, once `current` is computed, until the first image has waited long enough."""
        while len(self._waiting) < self._batch_size:
            seconds = None
            if self._waiting and (current is None or current.done()):
                seconds = self._waiting[0].since + self._max_wait - time.perf_counter()
                if seconds <= 0:
                    break
            self._changed.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), seconds)
        return [self._waiting.popleft() for _ in range(min(len(self._waiting), self._batch_size))]

    async def _answer(self, batch: Sequence[_Waiting], computer: Executor) -> None:
        loop = asyncio.get_running_loop()
        for waiting, found in zip(batch, await loop.run_in_executor(computer, self._compute, batch), strict=True):
            if waiting.answer.done():  # the request was cancelled
                continue
            if isinstance(found, Exception):
                waiting.answer.set_exception(found)
            else:
                waiting.answer.set_result(found)
        loop.call_soon(self._changed.set)  # when this task is done

    def _compute(self, batch: Sequence[_Waiting]) -> Sequence[Labelled | Exception]:
        """What was found for each image. If the network fails on several, each is tried alone: one spoils no other."""
        started = time.perf_counter()
        try:
            top_k = max(waiting.top_k for waiting in batch)
            images = [waiting.image for waiting in batch]
            classes = most_probable(self.runner, probabilities(self.runner, images), top_k)
        except Exception as error:  # engines raise nearly anything
            if len(batch) > 1:
                return [found for waiting in batch for found in self._compute([waiting])]
            log.error("%s does not compute an image of shape %s: %s", self._name, batch[0].image.shape, error)
            return [error]
        seconds = time.perf_counter() - started
        self._metrics.batch_images.labels(self._name).observe(len(batch))
        self._metrics.compute_seconds.labels(self._name).observe(seconds)
        labelled = []
        for waiting, names in zip(batch, classes, strict=True):
            waited = started - waiting.since
            self._metrics.wait_seconds.labels(self._name).observe(waited)
            read_ms, wait_ms, compute_ms = (1e3 * one for one in (waiting.read_seconds, waited, seconds))
            labelled.append(Labelled(names[: waiting.top_k], read_ms, wait_ms, compute_ms, len(batch)))
        return labelled
