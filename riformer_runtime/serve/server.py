"""Runs the application until it is told to stop, and then until everything accepted is answered."""

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI

GRACE_SECONDS = 60  # for requests that were accepted before the stop


class Server(uvicorn.Server):
    """uvicorn's server, which says that it is no longer ready as soon as it is told to stop."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handles both signals while it serves; uvicorn's own also ends the process by them afterwards."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, number: int, frame: FrameType | None) -> None:
        """Called for SIGTERM and Ctrl-C; a second Ctrl-C ends at once."""
        self.config.app.state.stopping = True
        super().handle_exit(number, frame)


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens on a port; port 0 is any that is free.

    Raises:
        OSError: the address is taken, or is not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen(1024)
    except OSError as error:
        bound.close()
        raise OSError(error.errno, f"cannot listen on {host}, port {port}: {error.strerror}") from error
    return bound


def run(app: FastAPI, bound: socket.socket) -> int:
    """Serves until SIGTERM or Ctrl-C; returns how many requests were accepted and not answered."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=1024,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    server = Server(config)
    server.run([bound])
    return app.state.num_accepted - app.state.num_answered
