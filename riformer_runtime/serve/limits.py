"""What a request may cost, and the gate that lets requests in and reads their bodies within it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.requests import ClientDisconnect, Request

BODY_SECONDS = 60
"""Longest time that the body of a request may take to arrive."""

HELD_REQUESTS = 16
"""All bodies in memory at once may have so many times the bytes of the largest one."""


@dataclass(frozen=True)
class Limits:
    """What is refused.

    Attributes:
        max_bytes: of the body of a request.
        max_pixels: of an image, read from its header before it is decoded.
        max_files: images in a request.
        max_requests: requests in work at once; more are answered 503.
    """

    max_bytes: int = 32 * 2**20
    max_pixels: int = 50_000_000
    max_files: int = 16
    max_requests: int = 256


class RefusedError(Exception):
    """A request that is answered with an error.

    Attributes:
        status: of HTTP.
        headers: of the answer.
    """

    def __init__(self, status: int, message: str, **headers: str):
        super().__init__(message)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Gate:
    """Counts the requests in work, and lets no more in than the limits say, and none when the server stops.

    Attributes:
        limits: see `Limits`.
        stopping: whether the server answers what it has accepted, and accepts nothing more.
        in_work: requests that were accepted and not answered yet.
        answered: requests that were accepted and answered.
        refused: requests that were not accepted.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self.stopping = False
        self.in_work = self.answered = self.refused = 0
        self._held_bytes = 0

    @asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[bytearray]:
        """Accepts a request and yields its body; the request is in work until the context ends.

        Raises:
            RefusedError: the server stops or is busy; or the body is too large, too slow or cut off.
        """
        self._check_room(request)
        self.in_work += 1
        body = bytearray()
        try:
            await self._read(request, body)
            yield body
        finally:
            self._held_bytes -= len(body)
            self.in_work -= 1
            self.answered += 1

    def _check_room(self, request: Request) -> None:
        """Refuses a request by what is known before its body is read."""
        length = request.headers.get("content-length", "")
        try:
            if self.stopping:
                raise RefusedError(503, "the server is stopping", connection="close")
            if self.in_work >= self.limits.max_requests:
                raise RefusedError(503, f"{self.in_work} requests are in work; try again", retry_after="1")
            if length.isdecimal() and int(length[:20]) > self.limits.max_bytes:
                raise self._too_large()
        except RefusedError:
            self.refused += 1
            raise

    async def _read(self, request: Request, body: bytearray) -> None:
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    if len(body) + len(chunk) > self.limits.max_bytes:
                        raise self._too_large()
                    if self._held_bytes + len(chunk) > HELD_REQUESTS * self.limits.max_bytes:
                        raise RefusedError(503, "the requests in work fill the memory; try again", retry_after="1")
                    body += chunk
                    self._held_bytes += len(chunk)
        except TimeoutError as error:
            message = f"the request took more than {BODY_SECONDS} s to arrive"
            raise RefusedError(408, message, connection="close") from error
        except ClientDisconnect as error:
            raise RefusedError(400, "the request was cut off") from error

    def _too_large(self) -> RefusedError:
        return RefusedError(413, f"the request has more than the {self.limits.max_bytes / 2**20:g} MiB allowed")
