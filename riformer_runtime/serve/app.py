"""The routes: /predict and what is beside it. Nothing that a request says is opened as a file or an address."""

import asyncio
import io
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from hmac import compare_digest
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from riformer_runtime.engines import Runner, input_of, num_processors
from riformer_runtime.images import TooManyPixelsError, UnknownFormatError, read_image
from riformer_runtime.serve import answers
from riformer_runtime.serve.batching import Batcher, Labelled
from riformer_runtime.serve.limits import Gate, Limits, RefusedError
from riformer_runtime.serve.metrics import Metrics
from riformer_runtime.serve.observed import Observed
from riformer_runtime.serve.uploads import Upload, uploads
from riformer_runtime.version import __version__

PAGE = Path(__file__).with_name("page")
PAGE_FILES = {
    "/": ("index.html", "text/html"),
    "/docs": ("docs.html", "text/html"),
    "/page/style.css": ("style.css", "text/css"),
    "/page/index.js": ("index.js", "text/javascript"),
    "/page/docs.js": ("docs.js", "text/javascript"),
}
MAX_TOP_K = 1000
ABOUT = """Labels images. Open to everybody: the page, this description, /health and /ready. The other routes need the
key, as `Authorization: Bearer KEY`, where the server has one."""


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


class Service:
    """What the routes share.

    Attributes:
        models: by name, the first is the default.
        gate: requests in work.
        metrics: that /metrics shows.
    """

    def __init__(self, models: Sequence[Model], gate: Gate, batch_size: int, max_wait: float):
        self.models = {model.name: model for model in models}
        self.gate = gate
        self.metrics = Metrics()
        self.metrics.in_work.set_function(lambda: gate.in_work)
        self._batchers = {
            model.name: Batcher(model.name, model.runner, batch_size, max_wait, self.metrics) for model in models
        }
        self._readers: Executor

    @asynccontextmanager
    async def running(self, app: FastAPI) -> AsyncIterator[None]:
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

    async def predict(self, request: Request, name: str, top_k: int) -> dict[str, Any]:
        """The answer to a request; see `answers.Answer`.

        Raises:
            RefusedError: the request is refused, or none of its images could be labelled.
        """
        started = time.perf_counter()
        model = self.model(name)
        async with self.gate.body(request) as body:
            parse = partial(uploads, body, request.headers.get("content-type", ""), self.gate.limits.max_files)
            images = await asyncio.get_running_loop().run_in_executor(self._readers, parse)
            found = await asyncio.gather(*(self._labelled(model, image, top_k) for image in images))
        for one in found:
            result = "labelled" if isinstance(one, Labelled) else "refused"
            self.metrics.images.labels(model.name, result).inc()
        if not any(isinstance(one, Labelled) for one in found):
            errors = [one for one in found if isinstance(one, RefusedError)]
            raise RefusedError(errors[0].status, "; ".join(map(str, errors)))
        total_ms = 1e3 * (time.perf_counter() - started)
        return answers.answer(model.name, model.runner, [image.name for image in images], found, total_ms)

    async def _labelled(self, model: Model, image: Upload, top_k: int) -> Labelled | RefusedError:
        read = partial(_read, image, model.runner, self.gate.limits.max_pixels)
        try:
            return await self._batchers[model.name](read, top_k, self._readers)
        except TooManyPixelsError as error:
            return RefusedError(413, str(error))
        except UnknownFormatError as error:
            return RefusedError(415, str(error))
        except ValueError as error:
            return RefusedError(422, str(error))
        except Exception:  # of the engine; the batcher has logged it
            return RefusedError(500, f"{image.name}: the model could not compute this image")


class _NamedFile(io.BytesIO):
    """Bytes that `read_image` calls by the name of the upload."""

    def __init__(self, upload: Upload):
        super().__init__(upload.content)
        self.name = upload.name


def _read(upload: Upload, runner: Runner, max_pixels: int) -> np.ndarray:
    """What the runner takes for an image."""
    return input_of(runner, read_image(_NamedFile(upload), max_pixels))


def make_app(
    models: Sequence[Model],
    gate: Gate | None = None,
    api_key: str = "",
    batch_size: int = 16,
    max_wait: float = 0.005,
) -> FastAPI:
    """The application, for any ASGI server.

    Args:
        models: one or more, of different names.
        gate: with the limits.
        api_key: that requests must show; "" for none.
        batch_size: most images computed at once.
        max_wait: longest time that an image waits for others to be computed with, seconds.

    Raises:
        ValueError: a model without classes.
    """
    for model in models:
        if model.runner.manifest.num_classes == 0:
            raise ValueError(f"{model.name} has no classifier (num_classes=0), so it predicts no classes")
    gate = gate or Gate(Limits())
    service = Service(models, gate, batch_size, max_wait)
    about = {"title": "riformer", "version": __version__, "description": ABOUT}
    app = FastAPI(**about, docs_url=None, redoc_url=None, lifespan=service.running)
    needs_key = [Depends(_key_check(api_key))]

    @app.post("/predict", dependencies=needs_key, openapi_extra=answers.REQUEST_BODY, responses=answers.RESPONSES)
    async def predict(
        request: Request,
        model: Annotated[str, Query(description="name of the model; the first by default")] = "",
        top_k: Annotated[int, Query(description="classes of each image", ge=1, le=MAX_TOP_K)] = 5,
    ) -> Response:
        """Labels the images of a request, in multipart/form-data or as base64 in JSON.

        An image that cannot be read has an `error` instead of `classes`; the answer is an error of the first image's
        kind where that is so for all.
        """
        if request.headers.get("sec-fetch-site", "same-origin") in ("cross-site", "same-site"):
            raise RefusedError(403, "requests from pages of other sites are not answered")
        return JSONResponse(await service.predict(request, model, top_k))

    @app.get("/models", dependencies=needs_key, response_model=answers.Models)
    async def models_() -> Any:
        """What is served, the default first, and within which limits."""
        return answers.models(service.models.values(), gate.limits, max_wait)

    @app.get("/samples/{model}/{number}.png", dependencies=needs_key, response_class=Response)
    async def sample(model: str, number: int) -> Response:
        """An image to try a model with: one of those that came with it."""
        samples = service.model(model).samples
        if not 0 <= number < len(samples):
            raise RefusedError(404, f"{model} has {len(samples)} samples")
        return Response(samples[number], media_type="image/png")

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """Whether requests are accepted: 503 when the server stops."""
        if gate.stopping:
            raise RefusedError(503, "the server is stopping")
        return {"status": "ready"}

    @app.get("/metrics", dependencies=needs_key, response_class=Response)
    async def metrics() -> Response:
        """Counters and histograms in the format of Prometheus."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    for route, (name, kind) in PAGE_FILES.items():
        page = partial(Response, (PAGE / name).read_bytes(), media_type=kind, headers={"cache-control": "no-cache"})
        app.add_api_route(route, _constant(page), include_in_schema=False)
    _answer_errors_plainly(app)
    routes = [getattr(route, "path", "") for route in app.routes]
    app.add_middleware(Observed, metrics=service.metrics, routes=routes)
    return app


def _constant(make: Any) -> Any:
    async def answer() -> Response:
        return make()

    return answer


def _key_check(api_key: str) -> Any:
    """A dependency that refuses requests without the key. The time that it takes says nothing about the key."""
    expected, bearer = sha256(api_key.encode()).digest(), HTTPBearer(auto_error=False)

    async def check(given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
        shown = sha256((given.credentials if given else "").encode()).digest()
        if api_key and not compare_digest(shown, expected):
            raise RefusedError(401, "this needs the server's key: Authorization: Bearer KEY", www_authenticate="Bearer")

    return check


def _answer_errors_plainly(app: FastAPI) -> None:
    """Every error is one line, {"error": ...}."""

    @app.exception_handler(RefusedError)
    async def refused(request: Request, error: RefusedError) -> Response:
        return JSONResponse({"error": str(error)}, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": error.detail.lower()}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return JSONResponse({"error": f"{first['loc'][-1]}: {first['msg']}"}, 422)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": "the server failed; its log says why"}, 500)
