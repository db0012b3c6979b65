"""What is answered, as types: they are the schema in the description of the API."""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, Field

from riformer_runtime.engines import Runner
from riformer_runtime.serve.batching import Labelled
from riformer_runtime.serve.limits import Limits, RefusedError
from riformer_runtime.serve.uploads import JSON, MULTIPART, JsonBody


class Class(BaseModel):
    """A class, and how probable the model takes it to be."""

    name: Annotated[str, Field(alias="class")]
    probability: float


class ImageAnswer(BaseModel):
    """What the model says of an image, or why it could not be read."""

    name: Annotated[str, Field(description="as it was sent")]
    classes: Annotated[list[Class], Field(description="the most probable first; absent with an error")]
    read_ms: Annotated[float, Field(description="to decode and resize the image")]
    wait_ms: Annotated[float, Field(description="until its batch began")]
    compute_ms: Annotated[float, Field(description="of its batch in the network")]
    batch_size: Annotated[int, Field(description="images in its batch")]
    error: Annotated[str, Field(description="why the image could not be labelled")] = ""


class Answer(BaseModel):
    """The answer to /predict."""

    model: str
    engine: str
    precision: str
    total_ms: Annotated[float, Field(description="from the request's header to this answer")]
    images: Annotated[list[ImageAnswer], Field(description="in the order of the request")]


class Error(BaseModel):
    """The answer to a request that is refused."""

    error: str


class ModelAnswer(BaseModel):
    """A model that is served."""

    name: str
    architecture: str
    engine: str
    precision: str
    detail: str
    num_classes: int
    input_size: Annotated[list[int], Field(description="channels, height, width")]
    num_samples: Annotated[int, Field(description="at /samples/NAME/0.png and so on")]


class LimitsAnswer(BaseModel):
    """What a request may cost."""

    max_bytes: int
    max_pixels: int
    max_files: int
    max_requests: int
    max_wait_ms: float


class Models(BaseModel):
    """The answer to /models."""

    models: list[ModelAnswer]
    limits: LimitsAnswer


class Served(Protocol):
    """A model under a name."""

    @property
    def name(self) -> str: ...
    @property
    def runner(self) -> Runner: ...
    @property
    def samples(self) -> tuple[bytes, ...]: ...


_FILES = {"type": "array", "items": {"type": "string", "format": "binary"}, "description": "image files, in any field"}
REQUEST_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            MULTIPART: {"schema": {"type": "object", "properties": {"files": _FILES}}},
            JSON: {"schema": JsonBody.model_json_schema(ref_template="#/components/schemas/{model}")},
        },
    }
}
_REASONS = {
    400: "malformed: the form, the JSON or its base64; or no image",
    401: "the key is missing or wrong",
    403: "sent by a page of another site",
    404: "no such model",
    408: "the body took too long to arrive",
    413: "too many bytes, pixels or images",
    415: "not a type of body, or not a format of images, that is read",
    422: "an image is empty, damaged or cut short; or a parameter is out of its range",
    503: "too many requests are in work, or the server is stopping; try again",
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"model": Answer, "description": "the classes of each image"},
    **{status: {"model": Error, "description": reason} for status, reason in _REASONS.items()},
}


def answer(
    name: str, runner: Runner, images: Sequence[str], found: Sequence[Labelled | RefusedError], total_ms: float
) -> dict[str, Any]:
    """An `Answer` as JSON."""
    rows = [_row(image, one) for image, one in zip(images, found, strict=True)]
    kind = {"model": name, "engine": runner.engine, "precision": runner.precision}
    return {**kind, "total_ms": round(total_ms, 3), "images": rows}


def _row(name: str, found: Labelled | RefusedError) -> dict[str, Any]:
    if isinstance(found, RefusedError):
        return {"name": name, "error": str(found)}
    classes = [{"class": one, "probability": probability} for one, probability in found.classes]
    times = {key: round(getattr(found, key), 3) for key in ("read_ms", "wait_ms", "compute_ms")}
    return {"name": name, "classes": classes, **times, "batch_size": found.batch_size}


def models(served: Iterable[Served], limits: Limits, max_wait: float) -> Models:
    """The answer to /models."""
    rows = []
    for one in served:
        manifest = one.runner.manifest
        rows.append(
            ModelAnswer(
                name=one.name,
                architecture=manifest.architecture,
                engine=one.runner.engine,
                precision=one.runner.precision,
                detail=one.runner.detail,
                num_classes=manifest.num_classes,
                input_size=list(manifest.preprocessing.input_size),
                num_samples=len(one.samples),
            )
        )
    return Models(models=rows, limits=LimitsAnswer(**vars(limits), max_wait_ms=1e3 * max_wait))
