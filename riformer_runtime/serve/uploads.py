"""The images in the body of a request: files of multipart/form-data, or base64 in JSON. None is decoded here.

An image is always the bytes that were sent. No field names a file or an address to read.
"""

import base64
import binascii
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from riformer_runtime.serve.limits import RefusedError

MULTIPART, JSON = "multipart/form-data", "application/json"
MAX_NAME = 255


class Upload(NamedTuple):
    """An image as it was sent, and the name that it was sent under."""

    name: str
    content: bytes


class JsonImage(BaseModel):
    """An image in JSON."""

    model_config = ConfigDict(extra="forbid")
    data: Annotated[str, Field(description="the image file, in base64")]
    name: Annotated[str, Field(max_length=MAX_NAME, description="repeated in the answer")] = ""


class JsonBody(BaseModel):
    """A request in JSON."""

    model_config = ConfigDict(extra="forbid")
    images: Annotated[list[JsonImage], Field(min_length=1)]


def uploads(body: bytearray, content_type: str, max_files: int) -> list[Upload]:
    """The images in a body, one at least.

    Raises:
        RefusedError: the body is of another type (415), malformed (400), or has more than `max_files` images (413).
    """
    kind, options = parse_options_header(content_type)
    if kind == MULTIPART.encode():
        found = _in_multipart(body, options.get(b"boundary", b""), max_files)
    elif kind == JSON.encode():
        found = _in_json(body, max_files)
    else:
        raise RefusedError(415, f"send images as {MULTIPART}, or as {JSON} with base64")
    if not found:
        raise RefusedError(400, "the request has no image")
    return found


def _in_json(body: bytearray, max_files: int) -> list[Upload]:
    try:
        images = JsonBody.model_validate_json(body).images
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise RefusedError(400, f"{where or 'the request'}: {first['msg']}") from error
    _check_number(len(images), max_files)
    return [Upload(image.name or f"image {i + 1}", _from_base64(image.data, i)) for i, image in enumerate(images)]


def _from_base64(text: str, i: int) -> bytes:
    if text[:5].lower() == "data:":
        raise RefusedError(400, f"images.{i}.data is a data: URL; send the base64 after its comma")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RefusedError(400, f"images.{i}.data is no base64") from error


def _in_multipart(body: bytearray, boundary: bytes, max_files: int) -> list[Upload]:
    """The parts that are files.

    Raises:
        RefusedError: malformed, cut short, or with other fields or too many files.
    """
    form = _Form(max_files)
    try:
        parser = MultipartParser(boundary, form.callbacks())
        parser.write(body)
    except FormParserError as error:
        raise RefusedError(400, "the multipart body is malformed") from error
    if not form.ended:
        raise RefusedError(400, "the multipart body has no end: it was cut short, or its boundary is another")
    return [Upload(name, bytes(content)) for name, content in form.files]


class _Form:
    """Collects the files of a multipart body."""

    def __init__(self, max_files: int):
        self.files: list[tuple[str, bytearray]] = []
        self.ended = False
        self._max_files = max_files
        self._field, self._value, self._disposition = bytearray(), bytearray(), b""

    def callbacks(self) -> dict:
        return {
            "on_part_begin": self._begin_part,
            "on_header_field": lambda data, start, end: self._field.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._begin_content,
            "on_part_data": lambda data, start, end: self.files[-1][1].extend(data[start:end]),
            "on_end": self._end,
        }

    def _begin_part(self) -> None:
        self._disposition = b""

    def _end_header(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._field.clear()
        self._value.clear()

    def _begin_content(self) -> None:
        options = parse_options_header(self._disposition)[1]
        if b"filename" not in options:
            raise RefusedError(400, "a field of the form is no file; model and top_k are parameters of the address")
        _check_number(len(self.files) + 1, self._max_files)
        name = options[b"filename"].decode("utf-8", "replace")[:MAX_NAME]
        self.files.append((name or f"image {len(self.files) + 1}", bytearray()))

    def _end(self) -> None:
        self.ended = True


def _check_number(num: int, max_files: int) -> None:
    if num > max_files:
        raise RefusedError(413, f"the request has more than the {max_files} images allowed")
