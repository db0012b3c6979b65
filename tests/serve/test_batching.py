"""Batches: full under load, soon started without, and each answer its own."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from riformer_runtime.artifact import Manifest, Payload
from riformer_runtime.engines import PayloadRunner
from riformer_runtime.preprocess import Preprocessing
from riformer_runtime.serve.batching import Batcher
from riformer_runtime.serve.metrics import Metrics

PREPROCESSING = Preprocessing((1, 2, 2), 1.0, "center", "bilinear", (0.0,), (1.0,))
MANIFEST = Manifest("counter", "training", 100, tuple(map(str, range(100))), PREPROCESSING)


class Counter:
    """A runner whose class is the image's value; it notes the sizes of batches, and waits until it is released."""

    engine, precision, detail, manifest = "numpy", "fp32", "", MANIFEST

    def __init__(self):
        self.sizes: list[int] = []
        self.begun, self.release = threading.Event(), threading.Event()
        self.release.set()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        self.sizes.append(len(images))
        self.begun.set()
        assert self.release.wait(10)
        if (images < 0).any():
            raise RuntimeError("negative")
        return 50 * np.eye(100, dtype=np.float32)[images[:, 0, 0, 0].astype(int)]


def image(value: float) -> np.ndarray:
    return np.full((1, 2, 2), value, np.float32)


def run(batcher: Batcher, work):
    """The result of `work(label)`, where `label(value)` labels an image of that value and gives its class."""

    async def working():
        with ThreadPoolExecutor(4) as readers, ThreadPoolExecutor(1) as computer:

            async def label(value: float) -> str:
                return (await batcher(lambda: image(value), 1, readers)).classes[0][0]

            task = asyncio.create_task(batcher.run(computer))
            try:
                return await work(label)
            finally:
                task.cancel()

    return asyncio.run(working())


def test_every_image_gets_its_own_class_in_full_batches():
    runner = Counter()

    async def many(label):
        return await asyncio.gather(*map(label, range(100)))

    assert run(Batcher("counter", runner, 10, 5.0, Metrics()), many) == list(map(str, range(100)))
    assert runner.sizes == [10] * 10


def test_while_one_batch_is_computed_the_next_is_collected():
    runner = Counter()
    runner.release.clear()

    async def first_and_others(label):
        first = asyncio.create_task(label(0))
        while not runner.begun.is_set():
            await asyncio.sleep(0.001)
        others = [asyncio.create_task(label(i)) for i in range(1, 6)]
        await asyncio.sleep(0.05)
        runner.release.set()
        return await asyncio.gather(first, *others)

    assert run(Batcher("counter", runner, 8, 0.0, Metrics()), first_and_others) == list("012345")
    assert runner.sizes == [1, 5]


def test_images_are_read_no_faster_than_they_are_computed():
    """Two batches and two more; the rest wait as files, which are small."""
    runner, read = Counter(), []
    runner.release.clear()

    async def many(readers, batcher):
        tasks = [asyncio.create_task(batcher(lambda i=i: read.append(i) or image(i), 1, readers)) for i in range(50)]
        while not runner.begun.is_set():
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        before = len(read)
        runner.release.set()
        await asyncio.gather(*tasks)
        return before

    async def working():
        batcher = Batcher("counter", runner, 4, 0.0, Metrics())
        with ThreadPoolExecutor(2) as readers, ThreadPoolExecutor(1) as computer:
            task = asyncio.create_task(batcher.run(computer))
            before = await many(readers, batcher)
            task.cancel()
            return before

    assert asyncio.run(working()) == 10
    assert len(read) == 50


def test_a_full_batch_is_handed_over_while_one_is_computed_and_no_more_than_that():
    runner, handed = Counter(), []
    runner.release.clear()

    class Noting(ThreadPoolExecutor):
        def submit(self, function, *arguments):
            handed.append(len(arguments[0]))
            return super().submit(function, *arguments)

    async def working():
        batcher = Batcher("counter", runner, 2, 0.0, Metrics())
        with ThreadPoolExecutor(2) as readers, Noting(1) as computer:
            task = asyncio.create_task(batcher.run(computer))
            tasks = [asyncio.create_task(batcher(lambda i=i: image(i), 1, readers)) for i in range(20)]
            await asyncio.sleep(0.1)
            before = list(handed)
            runner.release.set()
            answers = await asyncio.gather(*tasks)
            task.cancel()
            return before, answers

    before, answers = asyncio.run(working())
    assert before[1:] == [2]
    assert [answer.classes[0][0] for answer in answers] == list(map(str, range(20)))


def test_a_lone_image_does_not_wait_for_a_full_batch():
    async def alone(label):
        return await asyncio.wait_for(label(7), 30)

    assert run(Batcher("counter", Counter(), 8, 0.01, Metrics()), alone) == "7"


def test_an_image_on_which_the_network_fails_spoils_no_other():
    runner = Counter()

    async def three(label):
        return await asyncio.gather(*map(label, (1, -1, 2)), return_exceptions=True)

    one, error, two = run(Batcher("counter", runner, 3, 5.0, Metrics()), three)
    assert (one, str(error), two) == ("1", "negative", "2")
    assert runner.sizes == [3, 1, 1, 1]


@pytest.mark.parametrize("cancelled", [0, 1])
def test_a_client_that_has_gone_disturbs_nobody(cancelled):
    async def one_goes(label):
        tasks = [asyncio.create_task(label(i)) for i in range(2)]
        await asyncio.sleep(0.001)
        tasks[cancelled].cancel()
        return await tasks[1 - cancelled]

    assert run(Batcher("counter", Counter(), 2, 0.02, Metrics()), one_goes) == str(1 - cancelled)


def test_a_graph_that_resizes_takes_one_image_at_a_time_and_another_computes_them_in_its_own_batches():
    sizes = []

    def compute(images):
        sizes.append(len(images))
        return np.zeros((len(images), 100), np.float32)

    async def many(label):
        return await asyncio.gather(*map(label, range(8)))

    for payload, expected in (
        (Payload("numpy", "fp32", {}, inside="resize"), [1] * 8),
        (Payload("numpy", "fp32", {}, batch=4), [4] * 2),
    ):
        sizes.clear()
        run(Batcher("counter", PayloadRunner(compute, MANIFEST, payload, "fp32", ""), 8, 5.0, Metrics()), many)
        assert sizes == expected
