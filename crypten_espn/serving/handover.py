"""Handing a peer over to the process of this host that holds its session.

Without TLS the peer's descriptor itself is passed. A TLS connection's keys stay in the
process that greeted it: that one passes an end of a socket pair and goes on between the
two, so its peer notices nothing.
"""

from __future__ import annotations

import base64
import contextlib
import os
import select
import socket
import ssl
from collections.abc import Collection
from pathlib import Path

import msgspec

from ..errors import PeerError
from ..wire.channel import Channel
from ..wire.tls import TLS

_LENGTH = 4
_MOST = 1 << 20  # bytes of a letter
_PIECE = 1 << 18
_TAKEN = b"1"


class Letter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What goes with a peer.

    Args:
        role: what the peer is.
        name: in its certificate; empty without TLS.
        certificate: in DER and base64; empty without TLS.
        said: its first message, which was taken already.
        rest: what arrived behind it.
    """

    role: str
    name: str
    certificate: str
    said: str
    rest: str


class Handed:
    """A peer that another process has greeted; opened like one that connected."""

    def __init__(self, sock: socket.socket, letter: Letter, role: str, tls: TLS | None):
        self._sock, self._letter, self._role, self._tls = sock, letter, role, tls

    @property
    def said(self) -> bytes:
        """Its first message."""
        return base64.b64decode(self._letter.said)

    def open(self, *, peer_roles: Collection[str], timeout: float = 30.0) -> Channel:
        """A channel to it, as after its greeting; the other process has checked it."""
        letter = self._letter
        channel = Channel(
            self._sock,
            role=self._role,
            peer_roles=peer_roles,
            timeout=timeout,
            peer=f"the {letter.role}",
        )
        channel.vouch(
            letter.role,
            letter.name,
            base64.b64decode(letter.certificate) or None,
            self._tls,
            base64.b64decode(letter.rest),
        )
        return channel

    def close(self) -> None:
        """Drop the peer."""
        self._sock.close()


class Relay:
    """A TLS connection of this process whose peer another process answers."""

    def __init__(self, peer: socket.socket, other: socket.socket) -> None:
        self._ends = peer, other
        for sock in self._ends:
            sock.setblocking(False)

    def run(self) -> None:
        """Carry bytes in both directions until both sides have ended."""
        peer, other = self._ends
        ways = [_Way(peer, other), _Way(other, peer)]
        with contextlib.suppress(OSError, ValueError):
            while any(not way.over for way in ways):
                if not any([way.move() for way in ways]):
                    _wait(ways)
        self.close()

    def close(self) -> None:
        """End both connections, from any thread."""
        for sock in self._ends:
            _shut(sock, socket.SHUT_RDWR)
            sock.close()


class _Way:
    """One direction of a relay."""

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self.source, self.sink = source, sink
        self.left = memoryview(b"")
        self.ended = self.over = False
        self.waits: tuple[socket.socket, int] | None = None
        self._buffer = bytearray(_PIECE)

    def move(self) -> bool:
        """Carry what can be carried now; whether anything was."""
        if self.over:
            return False
        doing = self.sink if self.left else self.source
        usual = select.POLLOUT if self.left else select.POLLIN
        try:
            if self.left:
                self.left = self.left[self.sink.send(self.left) :]
            else:
                got = self.source.recv_into(self._buffer)
                self.left = memoryview(self._buffer)[:got]
                self.ended = got == 0
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            if isinstance(error, ssl.SSLWantReadError):
                usual = select.POLLIN
            elif isinstance(error, ssl.SSLWantWriteError):
                usual = select.POLLOUT
            self.waits = doing, usual
            return False
        if self.ended:
            self.over = True
            _shut(self.sink, socket.SHUT_WR)
        return True


def _wait(ways: list[_Way]) -> None:
    wanted: dict[int, int] = {}
    for way in ways:
        if way.waits is not None and not way.over:
            sock, events = way.waits
            wanted[sock.fileno()] = wanted.get(sock.fileno(), 0) | events
    poller = select.poll()
    for handle, events in wanted.items():
        poller.register(handle, events)
    poller.poll(1000)


def _shut(sock: socket.socket, how: int) -> None:
    # Of the socket below TLS, as in `wire.stream`.
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, how)


def hand_over(
    channel: Channel, said: bytes, door: Path, *, timeout: float
) -> Relay | None:
    """Give a greeted peer to another process; the channel is no longer used.

    Args:
        channel: to the peer, which has sent its first message and waits.
        said: this message.
        door: where the other process takes it.
        timeout: seconds until it must have done so.

    Returns: what carries a TLS connection's bytes, to be run; None without TLS.

    Raises:
        ConnectionRefusedError, FileNotFoundError: the process is gone; the channel is
            as it was.
        PeerError: it does not answer.
    """
    with socket.socket(socket.AF_UNIX) as way:
        way.settimeout(timeout)
        way.connect(os.fspath(door))
        role, name, certificate = channel.peer_role, channel.peer_name, channel.shown
        sock, rest = channel.release()
        letter = Letter(
            role,
            name,
            base64.b64encode(certificate or b"").decode(),
            base64.b64encode(said).decode(),
            base64.b64encode(rest).decode(),
        )
        relay, passed = None, sock
        if isinstance(sock, ssl.SSLSocket):
            passed, near = socket.socketpair()
            relay = Relay(sock, near)
        try:
            text = msgspec.json.encode(letter)
            size = len(text).to_bytes(_LENGTH, "big")
            socket.send_fds(way, [size], [passed.fileno()])
            way.sendall(text)
            if way.recv(1) != _TAKEN:
                raise OSError("it took nobody")
        except OSError as error:
            if relay is not None:
                relay.close()
            raise PeerError(
                f"The process that holds this session does not answer ({error}); try "
                "again."
            ) from None
        finally:
            passed.close()  # the other process has its own
    return relay


def take_over(way: socket.socket) -> tuple[socket.socket, Letter]:
    """A peer that another process hands over.

    Raises:
        PeerError: it sends something else.
    """
    handles: list[int] = []
    try:
        size, handles, _, _ = socket.recv_fds(way, _LENGTH, 1)
        count = int.from_bytes(size, "big")
        if len(size) != _LENGTH or count > _MOST or len(handles) != 1:
            raise PeerError("What was handed over is no peer.")
        text = bytearray()
        while len(text) < count and (piece := way.recv(count - len(text))):
            text += piece
        letter = _DECODER.decode(bytes(text))
        way.sendall(_TAKEN)
        sock = socket.socket(fileno=handles.pop())
    except (OSError, msgspec.MsgspecError) as error:
        raise PeerError(f"A peer was not handed over: {error}.") from None
    finally:
        for handle in handles:
            os.close(handle)
    return sock, letter


# Made here once: two threads that decode a type for the first time crash msgspec.
_DECODER = msgspec.json.Decoder(Letter)
