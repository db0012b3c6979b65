"""The HTTP interface: predictions, health, metrics and the page, for one or more runners."""

import asyncio
import hmac
import io
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel

from riformer_runtime.engines import Runner, input_of, num_processors
from riformer_runtime.images import read_image
from riformer_runtime.predict import most_probable, probabilities
from riformer_runtime.serve.batching import Batcher
from riformer_runtime.serve.requests import Limits, Sent, read_request
from riformer_runtime.version import __version__

PAGE = Path(__file__).with_name("page")
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
BUCKETS = (1, 2, 4, 8, 16, 32, 64)
BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "files": {"type": "array", "items": {"type": "string", "format": "binary"}},
                        "model": {"type": "string"},
                        "top_k": {"type": "integer"},
                    },
                    "required": ["files"],
                }
            },
            "application/json": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "images": {"type": "array", "items": {"type": "string", "format": "byte"}},
                        "model": {"type": "string"},
                        "top_k": {"type": "integer"},
                    },
                    "required": ["images"],
                }
            },
        },
    }
}


@dataclass(frozen=True)
class Served:
    """A runner, and images to try it with, as PNG files."""

    runner: Runner
    samples: Sequence[bytes] = ()


class ClassProbability(BaseModel):
    """A class and its probability."""

    name: str
    probability: float


class ImagePrediction(BaseModel):
    """The most probable classes of an image, best first; or why it could not be read."""

    file: str
    classes: list[ClassProbability] = []
    error: str = ""


class PredictionAnswer(BaseModel):
    """Predictions in the order of the images, and the time from the request's arrival to the answer, milliseconds."""

    model: str
    engine: str
    precision: str
    latency_ms: float
    predictions: list[ImagePrediction]


class ModelInfo(BaseModel):
    """What is served under a name."""

    name: str
    architecture: str
    engine: str
    precision: str
    num_classes: int
    input_size: tuple[int, int, int]
    num_samples: int


def sample_images(pixels: np.ndarray, number: int = 8) -> list[bytes]:
    """The first images as PNG files. Shape: [N, H, W, C], 8 bits."""
    samples = []
    for values in pixels[:number]:
        buffer = io.BytesIO()
        Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values).save(buffer, "PNG")
        samples.append(buffer.getvalue())
    return samples


def create_app(
    models: Mapping[str, Served],
    limits: Limits = Limits(),  # noqa: B008 -- frozen
    batch_size: int = 16,
    max_wait_ms: float = 2.0,
    api_key: str = "",
) -> FastAPI:
    """The application; `app.state.stopping = True` makes it no longer ready.

    Args:
        models: by name; the first answers requests that name none.
        limits: of requests.
        batch_size: largest number of images computed at once.
        max_wait_ms: longest time that an image waits for others, milliseconds.
        api_key: that requests must carry as `Authorization: Bearer KEY`; "" for none.
    """
    registry = CollectorRegistry()
    requests = Counter("riformer_requests", "Requests for predictions, by status.", ["status"], registry=registry)
    images = Counter("riformer_images", "Images predicted.", ["model"], registry=registry)
    latency = Histogram("riformer_request_seconds", "From a request's arrival to its answer.", registry=registry)
    sizes = Histogram(
        "riformer_batch_images",
        "Images computed at once.",
        ["model"],
        buckets=[1, 2, 4, 8, 16, 32, 64],
        registry=registry,
    )
    in_flight = Gauge("riformer_requests_in_flight", "Requests that are being worked on.", registry=registry)
    batchers = {
        name: Batcher(partial(probabilities, one.runner), batch_size, max_wait_ms / 1000, sizes.labels(name).observe)
        for name, one in models.items()
    }
    readers = ThreadPoolExecutor(num_processors(), thread_name_prefix="reader")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for name, batcher in batchers.items():
            batcher.start()
            shape = models[name].runner.manifest.preprocessing.input_size
            await batcher.submit(np.zeros(shape, np.float32))  # some engines take their time for the first images
        app.state.started = True
        yield
        for batcher in batchers.values():
            await batcher.stop()
        readers.shutdown()

    app = FastAPI(title="riformer", version=__version__, lifespan=lifespan)
    app.state.started = app.state.stopping = False
    app.state.num_accepted = app.state.num_answered = app.state.num_in_flight = 0

    def authorised(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if api_key and not hmac.compare_digest(given.encode("utf-8", "replace"), api_key.encode()):
            raise HTTPException(401, "send the API key as Authorization: Bearer KEY", {"WWW-Authenticate": "Bearer"})

    @app.middleware("http")
    async def same_origin(request: Request, call_next: Any) -> Response:
        """Answers no page of another site, which a browser would let send requests to this machine."""
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
            return JSONResponse({"detail": "requests from other sites are not answered"}, 403)
        return await call_next(request)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        """What is a defect or the engine's failure; the server's log has the traceback."""
        return JSONResponse({"detail": "the server failed to answer; its log says why"}, 500)

    @app.get("/health", tags=["state"])
    async def health() -> dict[str, str]:
        """The process answers."""
        return {"status": "alive"}

    @app.get("/ready", tags=["state"])
    async def ready() -> dict[str, str]:
        """Whether requests are accepted: 503 before the start is done, and after the stop began."""
        if not app.state.started or app.state.stopping:
            raise HTTPException(503, "stopping" if app.state.stopping else "starting")
        return {"status": "ready"}

    @app.get("/metrics", tags=["state"], dependencies=[Depends(authorised)])
    async def metrics() -> Response:
        """Counts and times as Prometheus reads them."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/models", dependencies=[Depends(authorised)])
    async def served_models() -> list[ModelInfo]:
        """What is served."""
        return [
            ModelInfo(
                name=name,
                architecture=one.runner.manifest.architecture,
                engine=one.runner.engine,
                precision=one.runner.precision,
                num_classes=one.runner.manifest.num_classes,
                input_size=one.runner.manifest.preprocessing.input_size,
                num_samples=len(one.samples),
            )
            for name, one in models.items()
        ]

    @app.get("/samples/{model}/{number}", dependencies=[Depends(authorised)], response_class=Response)
    async def sample(model: str, number: int) -> Response:
        """An image to try a model with, as PNG."""
        if model not in models or not 0 <= number < len(models[model].samples):
            raise HTTPException(404, "no such sample")
        return Response(models[model].samples[number], media_type="image/png")

    def prepared(runner: Runner, image: Sent) -> np.ndarray | str:
        """The network's input, or why the image cannot be read."""
        try:
            return input_of(runner, read_image(image.content, limits.pixels))
        except ValueError as error:
            return str(error).removeprefix("image: ")

    async def predictions(served: Served, batcher: Batcher, sent: list[Sent], top_k: int) -> list[ImagePrediction]:
        loop = asyncio.get_running_loop()
        inputs = await asyncio.gather(
            *(loop.run_in_executor(readers, prepared, served.runner, image) for image in sent)
        )
        reasons = [values for values in inputs if isinstance(values, str)]
        if len(reasons) == len(sent):
            raise HTTPException(413 if "pixels are more than" in reasons[0] else 400, reasons[0])
        rows = iter(await asyncio.gather(*(batcher.submit(values) for values in inputs if not isinstance(values, str))))
        answers = []
        for image, values in zip(sent, inputs, strict=True):
            if isinstance(values, str):
                answers.append(ImagePrediction(file=image.name, error=values))
                continue
            (best,) = most_probable(served.runner, next(rows)[None], top_k)
            classes = [ClassProbability(name=name, probability=share) for name, share in best]
            answers.append(ImagePrediction(file=image.name, classes=classes))
        return answers

    @app.post("/predict", dependencies=[Depends(authorised)], openapi_extra=BODY)
    async def predict(request: Request) -> PredictionAnswer:
        """The most probable classes of one or more images.

        Images are files of a form, or base64 in JSON. Where one of several images cannot be read, it has an error in
        the answer; where none can, the answer is 400, or 413 for too many pixels.
        """
        began, status = time.perf_counter(), 500
        if app.state.num_in_flight >= limits.requests:
            requests.labels(503).inc()
            raise HTTPException(503, "too many requests at the same time", {"Retry-After": "1"})
        app.state.num_in_flight += 1
        app.state.num_accepted += 1
        in_flight.inc()
        try:
            asked = await read_request(request, limits)
            name = asked.model or next(iter(models))
            if name not in models:
                raise HTTPException(404, f"no model of that name; there are {', '.join(models)}")
            served = models[name]
            answers = await predictions(served, batchers[name], asked.images, asked.top_k or 5)
            images.labels(name).inc(sum(not answer.error for answer in answers))
            status = 200
            seconds = time.perf_counter() - began
            latency.observe(seconds)
            return PredictionAnswer(
                model=name,
                engine=served.runner.engine,
                precision=served.runner.precision,
                latency_ms=1000 * seconds,
                predictions=answers,
            )
        except HTTPException as error:
            status = error.status_code
            raise
        finally:
            requests.labels(status).inc()
            in_flight.dec()
            app.state.num_in_flight -= 1
            app.state.num_answered += 1

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)

    @app.get("/page.{kind}", include_in_schema=False)
    async def page_part(kind: Literal["css", "js"]) -> FileResponse:
        return FileResponse(PAGE / f"page.{kind}", headers=PAGE_HEADERS)

    return app
