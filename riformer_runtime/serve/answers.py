"""What is answered, as types: they are the schema in the description of the API."""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, Field

from riformer_runtime.engines import Runner
from riformer_runtime.serve.batching import Labelled
from riformer_runtime.serve.limits import RefusedError
from riformer_runtime.serve.uploads import JSON, MULTIPART, JsonBody, Options


class ClassProbability(BaseModel):
    """A class, and how probable the model takes it to be."""

    name: str
    probability: float


class Prediction(BaseModel):
    """What the model says of an image, or why it could not be read."""

    file: Annotated[str, Field(description="name of the file as it was sent")]
    classes: Annotated[list[ClassProbability], Field(description="the most probable first; empty with an error")]
    error: Annotated[str, Field(description="why the image could not be labelled")]
    read_ms: Annotated[float, Field(description="to decode and resize the image")]
    wait_ms: Annotated[float, Field(description="until its batch began")]
    compute_ms: Annotated[float, Field(description="of its batch in the network")]
    batch_size: Annotated[int, Field(description="images in its batch")]


class Answer(BaseModel):
    """The answer to /predict."""

    model: str
    engine: str
    precision: str
    latency_ms: Annotated[float, Field(description="from the request's header to this answer")]
    predictions: Annotated[list[Prediction], Field(description="in the order of the images")]


class Error(BaseModel):
    """The answer to a request that is refused."""

    detail: str


class ModelAnswer(BaseModel):
    """A model that is served."""

    name: str
    architecture: str
    engine: str
    precision: str
    detail: Annotated[str, Field(description="of the engine: its instruction set, or its version")]
    num_classes: int
    input_size: Annotated[tuple[int, int, int], Field(description="channels, height, width")]
    num_samples: Annotated[int, Field(description="at /samples/NAME/0.png and so on")]


class Served(Protocol):
    """A model under a name."""

    @property
    def name(self) -> str: ...
    @property
    def runner(self) -> Runner: ...
    @property
    def samples(self) -> tuple[bytes, ...]: ...


_FILES = {"type": "array", "items": {"type": "string", "format": "binary"}, "description": "image files"}
_FIELDS = Options.model_json_schema()["properties"]
REQUEST_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            MULTIPART: {"schema": {"type": "object", "properties": {"files": _FILES, **_FIELDS}}},
            JSON: {"schema": JsonBody.model_json_schema()},
        },
    }
}
_REASONS = {
    400: "no image; or the form, the JSON, its base64 or an option is malformed",
    401: "the key is missing or wrong",
    403: "sent by a page of another site",
    404: "no such model",
    408: "the body took too long to arrive",
    413: "too many bytes, pixels or images",
    415: "not a type of body, or not a format of images, that is read",
    422: "an image is empty, damaged or cut short",
    503: "too many requests are in work, or the server is stopping; try again",
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"model": Answer, "description": "the classes of each image"},
    **{status: {"model": Error, "description": reason} for status, reason in _REASONS.items()},
}


def answer(
    name: str, runner: Runner, files: Sequence[str], found: Sequence[Labelled | RefusedError], latency_ms: float
) -> dict[str, Any]:
    """An `Answer` as JSON."""
    predictions = [_prediction(file, one) for file, one in zip(files, found, strict=True)]
    kind = {"model": name, "engine": runner.engine, "precision": runner.precision}
    return {**kind, "latency_ms": round(latency_ms, 3), "predictions": predictions}


def _prediction(file: str, found: Labelled | RefusedError) -> dict[str, Any]:
    if isinstance(found, RefusedError):
        times = dict.fromkeys(("read_ms", "wait_ms", "compute_ms", "batch_size"), 0)
        return {"file": file, "classes": [], "error": str(found), **times}
    classes = [{"name": name, "probability": probability} for name, probability in found.classes]
    times = {key: round(getattr(found, key), 3) for key in ("read_ms", "wait_ms", "compute_ms")}
    return {"file": file, "classes": classes, "error": "", **times, "batch_size": found.batch_size}


def models(served: Iterable[Served]) -> list[ModelAnswer]:
    """The answer to /models."""
    return [
        ModelAnswer(
            name=one.name,
            architecture=one.runner.manifest.architecture,
            engine=one.runner.engine,
            precision=one.runner.precision,
            detail=one.runner.detail,
            num_classes=one.runner.manifest.num_classes,
            input_size=one.runner.manifest.preprocessing.input_size,
            num_samples=len(one.samples),
        )
        for one in served
    ]
