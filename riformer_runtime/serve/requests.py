"""The images in a request, read within limits: nothing is decoded before its size is known."""

import asyncio
import binascii
import io
import json
from base64 import b64decode
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastapi import HTTPException, Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

MAX_NAME = 200  # characters of a file's name that are sent back


@dataclass(frozen=True)
class Limits:
    """What one client may ask for.

    Attributes:
        mib: size of a request.
        pixels: of an image, as its header says.
        files: images in a request.
        requests: that are worked on at the same time; more are answered 503.
        seconds: in which a request has to arrive.
    """

    mib: float = 32.0
    pixels: int = 50_000_000
    files: int = 32
    requests: int = 256
    seconds: float = 30.0


class Sent(NamedTuple):
    """An image as it was sent: the name of its file, which may be empty, and the file's content."""

    name: str
    content: io.BytesIO


class Asked(NamedTuple):
    """A request for predictions: the images, the model's name and how many classes; "" and 0 where it does not say."""

    images: list[Sent]
    model: str
    top_k: int


async def read_request(request: Request, limits: Limits) -> Asked:
    """The request's images.

    Raises:
        HTTPException: 400 for what cannot be understood, 408 too slow, 413 too large, 415 another type of content.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("multipart/form-data", "application/json"):
        raise HTTPException(415, "send multipart/form-data with files, or application/json with base64 images")
    body = await _body(request, limits)
    asked = await (_from_form(request, body, limits) if kind == "multipart/form-data" else _from_json(body))
    if not asked.images:
        raise HTTPException(400, "the request has no image")
    if len(asked.images) > limits.files:
        raise HTTPException(413, f"{len(asked.images)} images in a request; {limits.files} are allowed")
    return asked


async def _body(request: Request, limits: Limits) -> bytes:
    allowed = int(limits.mib * 2**20)
    too_large = HTTPException(413, f"the request is larger than the {limits.mib:g} MiB allowed")
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > allowed:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.seconds):
            async for part in request.stream():
                body += part
                if len(body) > allowed:
                    raise too_large
    except TimeoutError as error:
        raise HTTPException(408, f"the request did not arrive within {limits.seconds:g} seconds") from error
    return bytes(body)


async def _from_form(request: Request, body: bytes, limits: Limits) -> Asked:
    async def stream() -> AsyncIterator[bytes]:
        yield body
        yield b""

    allowed = {"max_files": limits.files, "max_fields": 8, "max_part_size": 2**10}
    try:
        form = await MultiPartParser(request.headers, stream(), **allowed).parse()
    except MultiPartException as error:
        code = 413 if "Too many" in error.message or "exceeded" in error.message else 400
        raise HTTPException(code, f"the form cannot be read: {error.message}") from error
    except (KeyError, ValueError) as error:  # a boundary that is missing or not Latin text
        raise HTTPException(400, "the form cannot be read: it has no boundary") from error
    images, fields = [], {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            images.append(Sent((value.filename or "")[:MAX_NAME], io.BytesIO(await value.read())))
        else:
            fields[name] = value
    await form.close()
    if unknown := sorted(set(fields) - {"model", "top_k"}):
        raise HTTPException(
            400, f"no field {unknown[0][:MAX_NAME]!r}; files go in file parts, model and top_k in fields"
        )
    return Asked(images, fields.get("model", ""), _top_k(fields.get("top_k", "0")))


async def _from_json(body: bytes) -> Asked:
    try:
        content: Any = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "the request is not JSON") from error
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise HTTPException(400, 'the request must be an object such as {"images": [BASE64, ...], "top_k": 5}')
    if unknown := sorted(set(content) - {"images", "model", "top_k"}):
        raise HTTPException(400, f"no entry {unknown[0][:MAX_NAME]!r}; known are images, model, top_k")
    if not isinstance(content.get("model", ""), str):
        raise HTTPException(400, "model must be a string")
    images = []
    for i, text in enumerate(content["images"]):
        try:
            images.append(Sent("", io.BytesIO(b64decode(text, validate=True))))
        except (binascii.Error, TypeError, ValueError) as error:
            raise HTTPException(
                400, f"image {i} is not base64: send the content of the file, no name and no URL"
            ) from error
    return Asked(images, content.get("model", ""), _top_k(content.get("top_k", 0)))


def _top_k(value: Any) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 7:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 10**6:
        raise HTTPException(400, "top_k must be a whole number, 1 or more")
    return value
