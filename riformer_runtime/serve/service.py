"""Models at work: from the body of a request to the answer, on threads and batches that all requests share."""

import asyncio
import io
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image
from starlette.requests import Request

from riformer_runtime.engines import Runner, input_of, num_processors
from riformer_runtime.images import TooManyPixelsError, UnknownFormatError, read_image
from riformer_runtime.serve import answers
from riformer_runtime.serve.batching import Batcher, Labelled
from riformer_runtime.serve.costs import CostlyImageError, check_cost
from riformer_runtime.serve.limits import Gate, RefusedError
from riformer_runtime.serve.metrics import Metrics
from riformer_runtime.serve.uploads import Upload, read_request


@dataclass(frozen=True)
class Model:
    """A model that is served.

    Attributes:
        name: in requests.
        runner: that computes.
        samples: images to try it with, as PNG files.
    """

    name: str
    runner: Runner
    samples: tuple[bytes, ...] = ()


def warm_up(models: Sequence[Model]) -> None:
    """Does what takes its time once: Pillow's formats, and the first images of some engines.

    Raises:
        RuntimeError: an engine fails.
    """
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "PNG")
    read_image(file)
    for model in models:
        model.runner(np.zeros((1, *model.runner.manifest.preprocessing.input_size), np.float32))


class Service:
    """What the routes share.

    Attributes:
        models: by name, the first is the default.
        gate: requests in work.
        metrics: of all that is done.

    Args:
        models: one or more, of different names.
        gate: with the limits.
        batch_size: most images computed at once.
        max_wait: longest time that an image waits for others to be computed with, seconds.

    Raises:
        ValueError: a model without classes.
    """

    def __init__(self, models: Sequence[Model], gate: Gate, batch_size: int, max_wait: float):
        for model in models:
            if model.runner.manifest.num_classes == 0:
                raise ValueError(f"{model.name} has no classifier (num_classes=0), so it predicts no classes")
        self.models = {model.name: model for model in models}
        self.gate = gate
        self.metrics = Metrics()
        self.metrics.in_work.set_function(lambda: gate.in_work)
        self._batchers = {
            model.name: Batcher(model.name, model.runner, batch_size, max_wait, self.metrics) for model in models
        }
        self._readers: Executor

    @asynccontextmanager
    async def running(self, app: object) -> AsyncIterator[None]:
        """The threads, and a task for each model."""
        num_readers = max(2, num_processors() // 2)
        with ThreadPoolExecutor(num_readers, "read") as self._readers, ThreadPoolExecutor(1, "compute") as computer:
            tasks = [asyncio.create_task(batcher.run(computer)) for batcher in self._batchers.values()]
            yield
            for task in tasks:
                task.cancel()

    def model(self, name: str) -> Model:
        """The model of that name; the first for "".

        Raises:
            RefusedError: there is none.
        """
        if name and name not in self.models:
            raise RefusedError(404, f"no model {name[:80]!r}; there are {', '.join(self.models)}")
        return self.models[name] if name else next(iter(self.models.values()))

    async def predict(self, request: Request) -> dict[str, Any]:
        """The answer to a request; see `answers.Answer`.

        Raises:
            RefusedError: the request is refused, or none of its images could be labelled.
        """
        started = time.perf_counter()
        async with self.gate.body(request) as body:
            read = partial(read_request, body, request.headers.get("content-type", ""), self.gate.limits.max_files)
            asked = await asyncio.get_running_loop().run_in_executor(self._readers, read)
            model = self.model(asked.model)
            found = await asyncio.gather(*(self._labelled(model, image, asked.top_k) for image in asked.images))
        refused = [one for one in found if isinstance(one, RefusedError)]
        self.metrics.images.labels(model.name, "refused").inc(len(refused))
        self.metrics.images.labels(model.name, "labelled").inc(len(found) - len(refused))
        if len(refused) == len(found):
            raise RefusedError(refused[0].status, "; ".join(map(str, refused)))
        latency_ms = 1e3 * (time.perf_counter() - started)
        return answers.answer(model.name, model.runner, [image.name for image in asked.images], found, latency_ms)

    async def _labelled(self, model: Model, image: Upload, top_k: int) -> Labelled | RefusedError:
        read = partial(_read, image, model.runner, self.gate.limits.max_pixels)
        try:
            return await self._batchers[model.name](read, top_k, self._readers)
        except (TooManyPixelsError, CostlyImageError) as error:
            return RefusedError(413, str(error))
        except UnknownFormatError as error:
            return RefusedError(415, str(error))
        except ValueError as error:
            return RefusedError(422, str(error))
        except Exception:  # of the engine; the batcher has logged it
            return RefusedError(500, f"{image.name or 'image'}: the model could not compute this image")


def _read(upload: Upload, runner: Runner, max_pixels: int) -> np.ndarray:
    """What the runner takes for an image.

    Raises:
        ValueError: it cannot be read, or costs too much; the message names it.
    """
    file = _NamedFile(upload.content)
    file.name = upload.name or "image"
    check_cost(upload.content, file.name)
    return input_of(runner, read_image(file, max_pixels))


class _NamedFile(io.BytesIO):
    """Bytes with a name, by which `read_image` calls them."""

    name = ""
