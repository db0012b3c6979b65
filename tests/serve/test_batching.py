"""Batches: full under load, soon started without, and each answer its own."""

import asyncio
import threading
import time

import numpy as np
import pytest

from riformer_runtime.serve.batching import Batcher


def run(batcher: Batcher, coroutine):
    """The coroutine's result, while the batcher works."""

    async def working():
        batcher.start()
        try:
            return await coroutine()
        finally:
            await batcher.stop()

    return asyncio.run(working())


def test_every_input_gets_its_own_output_in_full_batches():
    sizes = []
    batcher = Batcher(lambda inputs: np.stack(inputs) * 2, 4, 0.05, sizes.append)

    async def many():
        return await asyncio.gather(*(batcher.submit(np.full(3, i)) for i in range(10)))

    np.testing.assert_array_equal(run(batcher, many), [[2 * i] * 3 for i in range(10)])
    assert sizes == [4, 4, 2]


def test_while_one_batch_is_computed_the_next_is_collected():
    begun, sizes, release = threading.Event(), [], threading.Event()

    def compute(inputs):
        begun.set()
        release.wait(10)
        return np.stack(inputs)

    batcher = Batcher(compute, 8, 0.0, sizes.append)

    async def first_and_others():
        first = asyncio.create_task(batcher.submit(np.zeros(1)))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        others = [asyncio.create_task(batcher.submit(np.full(1, i))) for i in range(5)]
        await asyncio.sleep(0.01)
        release.set()
        return await asyncio.gather(first, *others)

    assert len(run(batcher, first_and_others)) == 6
    assert sizes == [1, 5]


def test_a_lone_input_waits_no_longer_than_it_may():
    batcher = Batcher(np.stack, 8, 0.01, lambda size: None)

    async def alone():
        began = time.monotonic()
        await batcher.submit(np.zeros(1))
        return time.monotonic() - began

    assert run(batcher, alone) < 5  # for a full batch it would wait for ever


def test_an_error_belongs_to_its_batch_alone():
    def compute(inputs):
        if any(value[0] < 0 for value in inputs):
            raise RuntimeError("negative")
        return np.stack(inputs)

    batcher = Batcher(compute, 1, 0.0, lambda size: None)

    async def both():
        return await asyncio.gather(*(batcher.submit(np.full(1, i)) for i in (1, -1, 2)), return_exceptions=True)

    one, error, two = run(batcher, both)
    assert (one[0], str(error), two[0]) == (1, "negative", 2)


@pytest.mark.parametrize("cancelled", [0, 1])
def test_a_client_that_has_gone_disturbs_nobody(cancelled):
    batcher = Batcher(lambda inputs: np.stack(inputs), 2, 0.02, lambda size: None)

    async def one_goes():
        tasks = [asyncio.create_task(batcher.submit(np.full(1, i))) for i in range(2)]
        await asyncio.sleep(0.001)
        tasks[cancelled].cancel()
        return await tasks[1 - cancelled]

    assert run(batcher, one_goes)[0] == 1 - cancelled
