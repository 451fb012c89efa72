"""Listening for peers, and connecting to one."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import select
import socket
import ssl
import threading
import time
from collections.abc import Collection

from ..errors import PeerError, RevokedError, TransportError
from .channel import Channel
from .tls import TLS, Rotating, check_peer, secure

BACKLOG = 128
_PAUSE_S = 0.05  # before trying again

logger = logging.getLogger(__name__)


def parse_address(address: str) -> tuple[str, int]:
    """Split "host:port" (or "[v6 host]:port").

    Raises:
        PeerError: there is no host, or no port between 0 and 65535.
    """
    host, _, port = address.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    digits = port.isascii() and port.isdigit() and len(port) <= 5
    if not bare or (":" in bare) != (bare != host) or not digits or int(port) > 65535:
        raise PeerError(
            f"Address {address!r} is not host:port with a port up to 65535. "
            'Write for example "0.0.0.0:29500", or "[::1]:29500".'
        )
    return bare, int(port)


def host_port(host: str, port: int) -> str:
    """Undo `parse_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Incoming:
    """A peer that connected and of which nothing is known yet: `open` it."""

    def __init__(self, sock: socket.socket, role: str, tls: TLS | None) -> None:
        self._sock, self._role, self._tls = sock, role, tls

    def open(self, *, peer_roles: Collection[str], timeout: float = 30.0) -> Channel:
        """Do the TLS handshake and check the peer's role; in a thread of its own.

        Args:
            peer_roles: what the peer may be.
            timeout: seconds for the whole handshake, and then the channel's.

        Raises:
            PeerError: the peer is not done in time, or shows no certificate of one of
                these roles; it is told so.
        """
        peer = _named(peer_roles)
        end = time.monotonic() + timeout
        sock, tls = self._sock, self._tls
        if tls is not None:
            context = tls.context(server=True)
            sock = secure(sock, context, server=True, end=end, peer=peer)
        return _channel(sock, self._role, tuple(peer_roles), None, timeout, tls)

    def close(self) -> None:
        """Drop the peer."""
        self._sock.close()


class Listener:
    """A listening socket; the peers that connect are opened elsewhere.

    Args:
        address: "host:port"; port 0 lets the system choose, see `.address`.
        role: what this side is: "server", "client" or "dealer".
        tls: certificates for mutual TLS, or None for plain TCP.
        insecure: whether plain TCP may be offered beyond this host.
        shared: a socket that listens on the address, in other processes too.

    Raises:
        TransportError: the certificate is another role's, or plain TCP would be
            offered beyond this host.
        PeerError: the address cannot be listened on.
    """

    def __init__(
        self,
        address: str,
        *,
        role: str,
        tls: TLS | None = None,
        insecure: bool = False,
        shared: socket.socket | None = None,
    ) -> None:
        host, _ = parse_address(address)
        found = to_listen_on(address)
        _check_plaintext(address, found, tls, insecure)
        self._role = role
        self._tls = None if tls is None else Rotating(_of_role(tls, role))
        self._shared = shared is not None
        self._sock = listen(address, found) if shared is None else shared
        self._sock.setblocking(False)
        name = self._sock.getsockname()
        self.address = host_port(host, name[1])
        self._accepting = threading.Lock()
        self._closed = False

    def accept(self, *, timeout: float | None = None) -> Incoming:
        """The next peer that connects; nothing is read from it here.

        What only concerns one connection, or a host that is out of descriptors or of
        memory for a while, is logged and survived.

        Args:
            timeout: seconds; None waits until `close`.

        Raises:
            PeerError: nobody connected in time, or the listener was closed.
        """
        end = None if timeout is None else time.monotonic() + timeout
        with self._accepting:
            while True:
                if self._closed:
                    raise PeerError(f"{self.address} is closed.")
                left = None if end is None else end - time.monotonic()
                try:
                    sock, _ = self._sock.accept()
                    return Incoming(sock, self._role, self.tls)
                except BlockingIOError:
                    if left is not None and left <= 0:
                        raise PeerError(
                            f"Nobody connected to {self.address} within {timeout:g} s."
                        ) from None
                except OSError as error:
                    if error.errno in (errno.EBADF, errno.EINVAL, errno.ENOTSOCK):
                        raise PeerError(f"{self.address} is closed.") from None
                    logger.warning("a connection to %s failed: %s", self.address, error)
                    time.sleep(_PAUSE_S)
                    continue
                poller = select.poll()
                poller.register(self._sock, select.POLLIN)
                poller.poll(None if left is None else left * 1000)

    @property
    def tls(self) -> TLS | None:
        """The certificates that a peer who connects now is shown."""
        return None if self._tls is None else self._tls.current()

    def reload(self) -> None:
        """Read the certificates again, whether their files changed or not."""
        if self._tls is not None:
            self._tls.current(anyway=True)

    def close(self) -> None:
        """Stop listening, from any thread; `accept` ends."""
        self._closed = True
        if not self._shared:  # a shutdown would end it for the others too
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
        with self._accepting:
            self._sock.close()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def connect_channel(
    address: str,
    *,
    role: str,
    peer_role: str,
    timeout: float = 30.0,
    tls: TLS | None = None,
    insecure: bool = False,
    again: bool = True,
) -> Channel:
    """Connect to a listening peer.

    Args:
        address: "host:port". With TLS the peer's certificate must be for this host.
        role: what this side is: "server", "client" or "dealer".
        peer_role: what the other side must be.
        timeout: seconds to be connected, and then the channel's.
        tls: certificates for mutual TLS, or None for plain TCP.
        insecure: whether plain TCP may be used beyond this host.
        again: whether to try again while nothing listens there.

    Raises:
        TransportError: the certificate is another role's, or plain TCP would be used
            beyond this host; nothing was sent.
        PeerError: the address is none, nobody answers, or the peer is not what it
            should be.
    """
    peer = _named((peer_role,))
    host, port = parse_address(address)
    if port == 0:
        raise PeerError(
            f"{address} names no port to connect to; {peer} prints the one it "
            "listens on."
        )
    found = _resolve(host, port, f"The address of {peer}")
    _check_plaintext(address, found, tls, insecure)
    shown = None if tls is None else _of_role(tls, role).held()
    end = time.monotonic() + timeout
    sock = _connect(found, address, peer, end, timeout, again)
    if shown is not None:
        context = shown.context(server=False)
        sock = secure(sock, context, server=False, end=end, peer=peer)
    return _channel(sock, role, (peer_role,), host, timeout, shown)


# A name's addresses, as getaddrinfo gives them.
Found = list[
    tuple[
        socket.AddressFamily, socket.SocketKind, int, str, tuple[str | int | bytes, ...]
    ]
]


def _resolve(host: str, port: int, what: str) -> Found:
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)  # type: ignore[return-value]
    except (OSError, UnicodeError) as error:
        detail = getattr(error, "strerror", None) or error
        raise PeerError(
            f"{what}, {host_port(host, port)}, cannot be resolved: {detail}."
        ) from None


def to_listen_on(address: str) -> Found:
    """What an address to listen on stands for.

    Raises:
        PeerError: it is none, or cannot be resolved.
    """
    return _resolve(*parse_address(address), "The address to listen on")


def listen(address: str, found: Found) -> socket.socket:
    """A listening socket; who may reach it is not looked at here.

    Args:
        address: "host:port", for messages.
        found: what it stands for; the first is listened on.

    Raises:
        PeerError: the address cannot be listened on.
    """
    family, kind, protocol, _, place = found[0]
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(place)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise PeerError(f"Cannot listen on {address}: {error.strerror}.") from None
    return sock


def check_plaintext(address: str, tls: TLS | None, insecure: bool) -> None:
    """Refuse what `Listener` would refuse, before there is one.

    Raises:
        TransportError: plain TCP would be offered beyond this host.
    """
    _check_plaintext(address, to_listen_on(address), tls, insecure)


def is_loopback(address: str) -> bool:
    """Whether only this host reaches an IP address, as getaddrinfo gives it."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def _check_plaintext(
    address: str, found: Found, tls: TLS | None, insecure: bool
) -> None:
    """Plain TCP only inside this host: seeds and masks would be read on the way."""
    if tls is not None or insecure:
        return
    for *_, place in found:
        ip = str(place[0])
        if not is_loopback(ip):
            raise TransportError(
                f"{address} is beyond this host ({ip}), and without TLS everybody on "
                "the way reads the seeds. Give certificates with --tls (tls=); "
                "`crypten-espn keys` makes them. For a network nobody else can reach: "
                "--insecure (insecure=True)."
            )


def _of_role(tls: TLS, role: str) -> TLS:
    if tls.role != role:
        raise TransportError(
            f"This side is the {role}, and {tls.certificate} is the certificate of a "
            f"{tls.role}."
        )
    return tls


def _named(roles: Collection[str]) -> str:
    """A peer in messages, by what it may be."""
    return "the " + " or ".join(roles)


def _connect(
    found: Found, address: str, peer: str, end: float, timeout: float, again: bool
) -> socket.socket:
    while True:
        for family, kind, protocol, _, place in found:
            sock = socket.socket(family, kind, protocol)
            try:
                sock.settimeout(max(0.1, end - time.monotonic()))
                sock.connect(place)
                return sock
            except OSError as error:
                sock.close()
                failure = error
        if not again:
            raise PeerError(f"Cannot reach {peer} at {address}: {failure}.")
        if time.monotonic() + _PAUSE_S > end:
            raise PeerError(
                f"Cannot reach {peer} at {address} within {timeout:g} s: {failure}."
            )
        time.sleep(_PAUSE_S)


def _channel(
    sock: socket.socket,
    role: str,
    peer_roles: tuple[str, ...],
    host: str | None,
    timeout: float,
    tls: TLS | None,
) -> Channel:
    """A channel over a connected socket; under TLS the peer's role is checked."""
    channel = Channel(
        sock, role=role, peer_roles=peer_roles, timeout=timeout, peer=_named(peer_roles)
    )
    channel.tls = tls
    if isinstance(sock, ssl.SSLSocket):
        try:
            channel.certificate_role = channel.peer_role = check_peer(
                sock, roles=peer_roles, host=host, own=role
            )
            channel.check_revoked()
        except RevokedError as error:
            channel.abort(f"RevokedError: {error}")
            raise
        except PeerError as error:
            channel.abort(str(error))
            raise
    return channel
