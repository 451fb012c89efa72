"""`/metrics` and `/health` of a server or a dealer, over HTTP on a port of their own.

    /health/live     200 while connections are looked for, 503 if that got stuck
    /health/ready    200 while new ones are accepted, 503 once it is stopping
    /health          both as JSON; the status of ready
    /metrics         Prometheus' text format

Nothing here is secret: numbers, and no client's name. Nothing is encrypted either, so
the address is this machine's own unless another one is given.
"""

from __future__ import annotations

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Protocol

from ..errors import TransportError
from ..wire.connect import host_port, parse_address

LOOPBACK = "127.0.0.1"
_TEXT = "text/plain; version=0.0.4; charset=utf-8"
_JSON = "application/json"


class Counts(Protocol):
    """What `/metrics` shows."""

    def text(self) -> bytes:
        """In Prometheus' text format."""


class Watched(Protocol):
    """A host, or the processes that are one."""

    @property
    def role(self) -> str:
        """What it is."""

    @property
    def live(self) -> bool:
        """Whether it works."""

    @property
    def ready(self) -> bool:
        """Whether it accepts connections."""

    @property
    def metrics(self) -> Counts:
        """What it has counted."""


class Admin:
    """Answers until the end of its block.

    Args:
        host: what is looked at.
        address: "host:port", or a port alone for this machine's own address.

    Attributes:
        address: where it listens.

    Raises:
        TransportError: the address cannot be listened on.
    """

    def __init__(self, host: Watched, address: str) -> None:
        name, port = parse_address(
            f"{LOOPBACK}:{address}" if address.isdigit() else address
        )
        try:
            found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
            self._server = _Server(host, found[0][0], (name, port))
        except OSError as error:
            raise TransportError(
                f"Cannot listen on {address} for --admin: {error.strerror or error}."
            ) from None
        self.address = host_port(name, self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Admin:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(
        self, host: Watched, family: socket.AddressFamily, place: tuple[str, int]
    ) -> None:
        self.address_family = family
        self.host = host
        super().__init__(place, _Handler)

    def handle_error(self, *_: object) -> None:
        """Whoever asked has left; that concerns nobody else."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 5.0  # seconds a request may take to arrive
    server_version, sys_version = "crypten-espn", ""

    def do_GET(self) -> None:
        """Answer one of the four paths."""
        host = self.server.host
        health = {"live": host.live, "ready": host.ready}
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self._send(200, _TEXT, host.metrics.text())
        elif path in ("/health", "/health/live", "/health/ready"):
            well = health["live" if path.endswith("live") else "ready"]
            text = json.dumps({"role": host.role, **health}).encode()
            self._send(200 if well else 503, _JSON, text)
        else:
            self._send(404, _JSON, b'{"error": "ask for /health or /metrics"}')

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *_: object) -> None:
        """Whoever watches is not logged."""
