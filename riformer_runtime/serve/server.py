"""The process that listens: a socket, uvicorn on it, and a stop that answers what was accepted."""

import contextlib
import os
import socket
import time
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from riformer_runtime.serve.limits import Gate

HEADER_SECONDS = 10
"""Longest time that a connection may be open without a whole request header."""

BACKLOG = 2048
"""Connections that may wait to be accepted."""

LAST_SECONDS = 10
"""Longest time that the last answers may take to be sent."""


def listen(host: str, port: int) -> socket.socket:
    """A socket on which connections are queued from now on.

    Args:
        host: name or address.
        port: 0 for any that is free.

    Raises:
        OSError: nothing can listen there; the message says where, and why.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # The protocol is named so that asyncio sends small packets at once; else each answer may wait 40 ms for an
        # acknowledgement of its header.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            if os.name == "posix":  # elsewhere it lets two servers listen on one port
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
        return listener
    except OSError as error:
        raise OSError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from error


def serve(app: FastAPI, gate: Gate, listener: socket.socket) -> None:
    """Answers requests until SIGTERM or Ctrl-C, and then those that were accepted. A second signal ends it at once."""
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=LAST_SECONDS,
    )
    Server(config, gate).run([listener])


class Server(uvicorn.Server):
    """uvicorn's server with a gate: on a signal the gate closes, and the server ends when no request is in work.

    uvicorn itself closes a connection that is silent after an answer, and waits for ever for a first request, or for
    the rest of a header. Here such a connection is closed too.
    """

    def __init__(self, config: uvicorn.Config, gate: Gate):
        super().__init__(config)
        self._gate = gate
        self._silent: dict[Any, tuple[Any, float]] = {}

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.should_exit = self.force_exit = self._gate.stopping
        self._gate.stopping = True

    async def on_tick(self, counter: int) -> bool:
        """Is called ten times a second."""
        if counter % 10 == 0:
            self._close_silent_connections()
        self.should_exit |= self._gate.stopping and not self._gate.in_work
        return await super().on_tick(counter)

    def _close_silent_connections(self) -> None:
        """Closes connections that have had no request for too long. One that had another request since starts anew."""
        now, silent = time.monotonic(), {}
        for connection in self.server_state.connections:
            request = connection.cycle
            if request is None or request.response_complete:
                last, since = self._silent.get(connection, (request, now))
                silent[connection] = (request, since if last is request else now)
        for connection, (_, since) in silent.items():
            if now - since > HEADER_SECONDS:
                with contextlib.suppress(RuntimeError):
                    connection.transport.close()
        self._silent = silent
