"""Listening for a peer, and connecting to one."""

from __future__ import annotations

import socket
import time

from ..errors import PeerError
from .channel import Channel
from .tls import TLS, wrap


def parse_address(address: str) -> tuple[str, int]:
    """Split "host:port" (or "[v6 host]:port").

    Raises: PeerError if there is no port between 0 and 65535.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise PeerError(
            f"Address {address!r} is not host:port with a port up to 65535. "
            'Write for example "0.0.0.0:29500".'
        )
    return host.strip("[]"), int(port)


class Listener:
    """A listening socket that hands out channels.

    Args:
        address: "host:port"; port 0 lets the system choose, see `.address`.
        tls: certificates for mutual TLS, or None for plain TCP.
    """

    def __init__(self, address: str, *, tls: TLS | None = None) -> None:
        host, port = parse_address(address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._tls = tls
        self._sock = socket.socket(family, socket.SOCK_STREAM)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._sock.bind((host, port))
            self._sock.listen(8)
        except OSError as error:
            self._sock.close()
            raise PeerError(f"Cannot listen on {address}: {error}.") from None
        name = self._sock.getsockname()
        self.address = f"{host}:{name[1]}"

    def accept(
        self, *, timeout: float | None = 30.0, peer_timeout: float = 30.0, peer: str
    ) -> Channel:
        """Wait up to `timeout` seconds (None: for ever) for the next peer."""
        self._sock.settimeout(timeout)
        try:
            sock, _ = self._sock.accept()
        except OSError:
            raise PeerError(
                f"No {peer} connected to {self.address} within {timeout} s."
            ) from None
        if self._tls is not None:
            sock = wrap(sock, self._tls, server=True, timeout=peer_timeout, peer=peer)
        return Channel(sock, timeout=peer_timeout, peer=peer)

    def close(self) -> None:
        self._sock.close()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def connect_channel(
    address: str, *, timeout: float = 30.0, tls: TLS | None = None, peer: str = "peer"
) -> Channel:
    """Connect to a listening peer, trying again until `timeout` seconds have passed."""
    host, port = parse_address(address)
    deadline = time.monotonic() + timeout
    while True:
        try:
            sock = socket.create_connection(
                (host, port), timeout=max(0.1, deadline - time.monotonic())
            )
            break
        except OSError as error:
            if time.monotonic() + 0.05 > deadline:
                raise PeerError(
                    f"Cannot reach {peer} at {address} within {timeout:g} s: {error}."
                ) from None
            time.sleep(0.05)
    if tls is not None:
        sock = wrap(sock, tls, server=False, timeout=timeout, peer=peer)
    return Channel(sock, timeout=timeout, peer=peer)
