"""A sidecar's process: where it listens, and how it begins and ends."""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection

import uvicorn

from ..errors import PeerError, TransportError
from ..wire.connect import (
    host_port,
    is_loopback,
    listen,
    parse_address,
    to_listen_on,
)
from .app import App
from .asking import Keeps, Queue
from .limits import SidecarLimits
from .tensors import Names

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_HEADERS_BYTES = 1 << 14
_IDLE_S = 10


class Sidecar:
    """Listens once it is made, and answers while `run` runs.

    Args:
        connect: makes who answers; again where the server's plan has changed.
        address: "host:port" to listen on; port 0 lets the system choose.
        names: how the protocol calls the model and its tensors.
        expose: what a host beyond this one may call it; without names it listens on
            loopback addresses alone.
        size: inputs of one inference, where no material for another number is there.
        limits: what it puts up with.

    Attributes:
        address: where it listens.

    Raises:
        TransportError: the address cannot be listened on, or is beyond this host and
            has no names.
    """

    def __init__(
        self,
        connect: Callable[[], Keeps],
        address: str,
        *,
        names: Names | None = None,
        expose: Collection[str] = (),
        size: int = 1,
        limits: SidecarLimits | None = None,
    ) -> None:
        limits = SidecarLimits() if limits is None else limits
        names = Names() if names is None else names
        self._socket = _listening(address, bool(expose))
        host, _ = parse_address(address)
        self.address = host_port(host, self._socket.getsockname()[1])
        try:
            self._queue = Queue(connect, size=size, waiting=limits.waiting)
        except BaseException:
            self._socket.close()
            raise
        hosts = *_LOOPBACK, *expose
        app = App(names, self._queue, hosts=hosts, limits=limits)
        # What uvicorn would log may hold what was asked; ours is logged here.
        self._server = uvicorn.Server(
            uvicorn.Config(
                app.asgi,
                http="h11",
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                limit_concurrency=limits.connections,
                h11_max_incomplete_event_size=_HEADERS_BYTES,
                timeout_keep_alive=_IDLE_S,
                timeout_graceful_shutdown=max(1, int(limits.grace_s)),
            )
        )

    def run(self) -> None:
        """Answer until `stop` is called, or the process is told to end."""
        self._server.run(sockets=[self._socket])

    def stop(self) -> None:
        """Make `run` return once what is under way is finished, from any thread."""
        self._server.should_exit = True

    def close(self) -> None:
        """Leave the server."""
        self._socket.close()
        self._queue.close()

    def __enter__(self) -> Sidecar:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _listening(address: str, exposed: bool) -> socket.socket:
    try:
        found = to_listen_on(address)
        if not exposed and not all(is_loopback(str(place[0])) for *_, place in found):
            raise TransportError(
                f"{address} is beyond this host, and applications send their inputs "
                "here in the clear. Listen on 127.0.0.1; or name what others may call "
                "this sidecar with --expose, on a network that nobody else can reach."
            )
        return listen(address, found)
    except PeerError as error:
        raise TransportError(f"{str(error).rstrip('.')}, for --listen.") from None
