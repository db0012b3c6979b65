"""The images in the body of a request: files of multipart/form-data, or base64 in JSON. None is decoded here.

An image is always the bytes that were sent. No field names a file or an address to read.
"""

import base64
import binascii
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from riformer_runtime.serve.limits import RefusedError

MULTIPART, JSON = "multipart/form-data", "application/json"
MAX_NAME = 255  # characters of a file's name that are sent back
MAX_FIELD = 1000  # bytes


class Upload(NamedTuple):
    """An image as it was sent: the name of its file, which is empty in JSON, and the file's content."""

    name: str
    content: bytes | bytearray


class Options(BaseModel):
    """What a request may say beside its images: fields of the form, or entries of the JSON object."""

    model_config = ConfigDict(extra="forbid")
    model: Annotated[str, Field(description="name of the model; the first by default")] = ""
    top_k: Annotated[int, Field(ge=1, le=1000, description="classes of each image")] = 5


class JsonBody(Options):
    """A request in JSON."""

    images: Annotated[list[str], Field(description="image files, in base64")]


class Asked(NamedTuple):
    """A request for predictions: one image or more, the name of the model or "", and the number of classes."""

    images: list[Upload]
    model: str
    top_k: int


def read_request(body: bytearray, content_type: str, max_files: int) -> Asked:
    """What a body asks for.

    Raises:
        RefusedError: the body is of another type (415), malformed (400), or has more than `max_files` images (413).
    """
    kind, parameters = parse_options_header(content_type)
    if kind == MULTIPART.encode():
        images, options = _from_multipart(body, parameters.get(b"boundary", b""), max_files)
    elif kind == JSON.encode():
        images, options = _from_json(body, max_files)
    else:
        raise RefusedError(415, f"send {MULTIPART} with files, or {JSON} with base64")
    if not images:
        raise RefusedError(400, "the request has no image")
    return Asked(images, options.model, options.top_k)


def _from_json(body: bytearray, max_files: int) -> tuple[list[Upload], Options]:
    content = _valid(lambda: JsonBody.model_validate_json(body, strict=True))
    _check_number(len(content.images), max_files)
    images = []
    for i, text in enumerate(content.images):
        try:
            images.append(Upload("", base64.b64decode(text, validate=True)))
        except (binascii.Error, ValueError) as error:
            message = f"images.{i} is not base64: send the content of the file, no name and no URL"
            raise RefusedError(400, message) from error
    return images, content


def _from_multipart(body: bytearray, boundary: bytes, max_files: int) -> tuple[list[Upload], Options]:
    form = _Form(max_files)
    try:
        MultipartParser(boundary, form.callbacks()).write(body)
    except FormParserError as error:
        raise RefusedError(400, "the form is malformed") from error
    if not form.ended:
        raise RefusedError(400, "the form has no end: it was cut short, or its boundary is another")
    fields = {name: content.decode("utf-8", "replace") for name, content in form.fields.items()}
    options = _valid(lambda: Options.model_validate(fields))
    return [Upload(name, content) for name, content in form.files], options


def _valid(make: Callable[[], Any]) -> Any:
    """What pydantic makes, or its first complaint."""
    try:
        return make()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))[:MAX_NAME]
        raise RefusedError(400, f"{where or 'the request'}: {first['msg']}") from error


class _Form:
    """Collects the parts of a multipart body.

    Attributes:
        files: names and contents of the parts that are files.
        fields: contents of the others, by name.
        ended: whether the closing boundary was there.
    """

    def __init__(self, max_files: int):
        self.files: list[tuple[str, bytearray]] = []
        self.fields: dict[str, bytearray] = {}
        self.ended = False
        self._max_files = max_files
        self._header, self._value, self._disposition = bytearray(), bytearray(), b""
        self._content, self._max_content = bytearray(), 0

    def callbacks(self) -> Any:
        """What the parser calls."""
        return {
            "on_part_begin": self._begin_part,
            "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._begin_content,
            "on_part_data": self._extend_content,
            "on_end": self._end,
        }

    def _begin_part(self) -> None:
        self._disposition = b""

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _begin_content(self) -> None:
        parameters = parse_options_header(self._disposition)[1]
        self._content = bytearray()
        if b"filename" in parameters:
            _check_number(len(self.files) + 1, self._max_files)
            self.files.append((parameters[b"filename"].decode("utf-8", "replace")[:MAX_NAME], self._content))
            self._max_content = 0
            return
        name = parameters.get(b"name", b"").decode("utf-8", "replace")
        if name not in Options.model_fields or name in self.fields:
            known = ", ".join(Options.model_fields)
            raise RefusedError(400, f"no field {name[:MAX_NAME]!r}, or twice; a part is a file, or one of {known}")
        self.fields[name] = self._content
        self._max_content = MAX_FIELD

    def _extend_content(self, data: bytes, start: int, end: int) -> None:
        self._content += data[start:end]
        if self._max_content and len(self._content) > self._max_content:
            raise RefusedError(400, f"a field of the form has more than {self._max_content} bytes")

    def _end(self) -> None:
        self.ended = True


def _check_number(num: int, max_files: int) -> None:
    if num > max_files:
        raise RefusedError(413, f"the request has more than the {max_files} images allowed")
