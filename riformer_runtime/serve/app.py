"""The routes: /predict and what is beside it. Nothing that a request says is opened as a file or an address."""

from collections.abc import Awaitable, Callable, Sequence
from hashlib import sha256
from hmac import compare_digest
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from riformer_runtime.serve import answers
from riformer_runtime.serve.limits import Gate, Limits, RefusedError
from riformer_runtime.serve.observed import Observed
from riformer_runtime.serve.service import Model, Service
from riformer_runtime.version import __version__

PAGE = Path(__file__).with_name("page")
PAGE_FILES = {
    "/": ("index.html", "text/html"),
    "/docs": ("docs.html", "text/html"),
    "/page/style.css": ("style.css", "text/css"),
    "/page/index.js": ("index.js", "text/javascript"),
    "/page/docs.js": ("docs.js", "text/javascript"),
}
ABOUT = """Labels images. Open to everybody: the page, this description, /health and /ready. The other routes need the
key, as Authorization: Bearer KEY, where the server has one."""


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
    gate = gate or Gate(Limits())
    service = Service(models, gate, batch_size, max_wait)
    about = {"title": "riformer", "version": __version__, "description": ABOUT}
    app = FastAPI(**about, docs_url=None, redoc_url=None, lifespan=service.running)
    needs_key = [Depends(_key_check(api_key))]

    @app.post("/predict", dependencies=needs_key, openapi_extra=answers.REQUEST_BODY, responses=answers.RESPONSES)
    async def predict(request: Request) -> Response:
        """Labels images: files of a form, or base64 in JSON.

        An image that cannot be read has an error instead of classes, and the others are labelled. Where none can be
        read, the answer is an error, of the first one's kind.
        """
        if _is_foreign(request):
            raise RefusedError(403, "requests from pages of other sites are not answered")
        return JSONResponse(await service.predict(request))

    @app.get("/models", dependencies=needs_key, response_model=list[answers.ModelAnswer])
    async def models_() -> Any:
        """What is served, the default first."""
        return answers.models(service.models.values())

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
        app.add_api_route(route, _file(PAGE / name, kind), include_in_schema=False)
    _answer_errors_plainly(app)
    routes = [getattr(route, "path", "") for route in app.routes]
    app.add_middleware(Observed, metrics=service.metrics, routes=routes)
    return app


def _file(path: Path, media_type: str) -> Callable[[], Awaitable[Response]]:
    """A route that answers with a file's content, read once."""
    content = path.read_bytes()

    async def answer() -> Response:
        return Response(content, media_type=media_type, headers={"cache-control": "no-cache"})

    return answer


def _is_foreign(request: Request) -> bool:
    """Whether a page of another site sends the request, as far as the browser says. Other clients say nothing."""
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    if site is not None:
        return site in ("cross-site", "same-site")
    return origin is not None and urlsplit(origin).netloc != request.headers.get("host")


def _key_check(api_key: str) -> Any:
    """A dependency that refuses requests without the key. The time that it takes says nothing about the key."""
    expected, bearer = sha256(api_key.encode()).digest(), HTTPBearer(auto_error=False)

    async def check(given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
        shown = sha256((given.credentials if given else "").encode()).digest()
        if api_key and not compare_digest(shown, expected):
            raise RefusedError(401, "this needs the server's key: Authorization: Bearer KEY", www_authenticate="Bearer")

    return check


def _answer_errors_plainly(app: FastAPI) -> None:
    """Every error is one line, {"detail": ...}."""

    @app.exception_handler(RefusedError)
    async def refused(request: Request, error: RefusedError) -> Response:
        return JSONResponse({"detail": str(error)}, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return JSONResponse({"detail": error.detail.lower()}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return JSONResponse({"detail": f"{first['loc'][-1]}: {first['msg']}"}, 422)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return JSONResponse({"detail": "the server failed; its log says why"}, 500)
