"""Run an application on a socket until a signal asks it to end: running requests finish, new ones get 503."""

import asyncio
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from orthrus.errors import ConfigError
from orthrus.serve.service import Service

GRACE_SECONDS = 5
"""How long open connections may take after the last completion has ended."""


class Server(uvicorn.Server):
    """A server whose first signal drains the loop and whose second one ends it at once."""

    def __init__(self, app: FastAPI, service: Service) -> None:
        # Errors of requests are answered and logged by the application; an access log would be noise.
        config = uvicorn.Config(
            app, lifespan="off", log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE_SECONDS
        )
        super().__init__(config)
        self._service = service

    def drain(self) -> None:
        """Refuse new requests and end when the last one has."""
        self._service.loop.drain(self._finish)

    def _finish(self) -> None:
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal; end at once at the second."""
        if self._service.loop.draining:
            self.should_exit = self.force_exit = True
        else:
            self.drain()


def listen(host: str, port: int) -> socket.socket:
    """Open the server's socket; port 0 takes a free one. Raises ConfigError for an address that cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except (OSError, OverflowError) as error:
        made.close()
        raise ConfigError(f"the address {host} port {port} cannot be used: {error}; choose another --port") from error
    made.listen(128)
    return made


def address(made: socket.socket) -> str:
    host, port = made.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def run(server: Server, made: socket.socket) -> None:
    """Serve on a socket until a signal comes and the last request has ended."""
    asyncio.run(server.serve(sockets=[made]))
