"""A direct two-party channel: one connection, ring elements at their true width.

CrypTen opens every value with gloo's all_reduce, which costs two round trips on two
parties. Here a message is written to one socket and read from it, both directions at
once, so an opening costs one one-way delay. A message holds ring elements packed to
the bits their ring has. Nothing received is unpickled or executed: a message is
checked for its kind, tag and length before a byte of it is used or allocated.
"""

from __future__ import annotations

import hashlib
import socket
import ssl
from collections.abc import Collection, Container, Iterable, Sequence
from typing import TypeVar

import numpy as np

from ..errors import (
    ClosingError,
    IdleError,
    LimitError,
    PeerError,
    PlanMismatchError,
    QuotaError,
    RevokedError,
)
from . import tcp
from .frames import (
    HEADER_BYTES,
    HELLO_BYTES,
    ROLES,
    Header,
    Kind,
    frame,
    framed,
    hello,
    parse,
    parse_hello,
    printable,
    reason,
)
from .packing import pack, packed_bytes, packing, unpack, unpacking
from .stream import Reading, Stream, nothing
from .tls import TLS, common_name

# What a peer may refuse with; raised here as what it was there.
_REFUSALS = {
    kind.__name__: kind
    for kind in (LimitError, IdleError, QuotaError, RevokedError, ClosingError)
}

T = TypeVar("T")

_LAST_WORD_S = 1.0  # for a peer's reason of which the beginning is there


class Channel:
    """Messages between exactly two parties over one connected socket.

    Args:
        sock: connected stream socket, plain or TLS; the channel owns it from now on.
        role: what this side is, one of `ROLES`.
        peer_roles: what the other side may be.
        timeout: seconds the peer may be silent while a message is under way; the whole
            message may take `timeout` and a second for every `stream.MINIMUM_RATE`
            bytes.
        peer: what to call the other side in errors.
        certificate_role: the role in the peer's certificate; None without TLS.

    Attributes:
        peer_role: what the peer's certificate or its greeting says; empty before.
        peer_name: the common name in its certificate, or the beginning of its SHA-256;
            empty without TLS.
        tls: the certificates that this side has shown; None without TLS.

    Counters: `messages_sent`, `messages_received` and `bytes_sent`, `bytes_received`
    (payload and the 20-byte frame header; TLS and TCP framing excluded).

    Raises:
        PeerError: by every method, when the peer is gone, silent for `timeout` seconds,
            too slow, sends something else than was expected, or says why it stops.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        role: str,
        peer_roles: Collection[str],
        timeout: float = 30.0,
        peer: str = "the peer",
        certificate_role: str | None = None,
    ) -> None:
        assert role in ROLES and set(peer_roles) <= set(ROLES)
        self.role = role
        self.peer_roles = tuple(peer_roles)
        self.certificate_role = certificate_role
        self.peer_role = certificate_role or ""
        self.tls: TLS | None = None
        self._certificate, self.peer_name = None, ""
        if isinstance(sock, ssl.SSLSocket):
            self._certificate = sock.getpeercert(binary_form=True) or b""
            self.peer_name = common_name(sock) or self.fingerprint[:16]
        self.timeout = timeout
        self.messages_sent = self.messages_received = 0
        self.bytes_sent = self.bytes_received = 0
        tcp.tune(sock)
        self._stream = Stream(sock, peer=peer, last_word=self._last_word)
        self._header: Header | None = None

    @property
    def peer(self) -> str:
        """What the other side is called in errors."""
        return self._stream.peer

    @peer.setter
    def peer(self, name: str) -> None:
        self._stream.peer = name

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the peer's certificate, in hex; empty without TLS."""
        shown = self._certificate
        return "" if shown is None else hashlib.sha256(shown).hexdigest()

    @property
    def shown(self) -> bytes | None:
        """The peer's certificate, in DER; None without TLS."""
        return self._certificate

    def release(self) -> tuple[socket.socket, bytes]:
        """Give the socket to another process of this host, between two messages.

        Returns: the socket, and what had arrived on it; the channel is closed.
        """
        assert self._header is None
        return self._stream.release()

    def vouch(
        self,
        role: str,
        name: str,
        certificate: bytes | None,
        tls: TLS | None,
        arrived: bytes,
    ) -> None:
        """Take over what `release` gave elsewhere, of a peer that was greeted there.

        Args:
            role, name: of the peer.
            certificate: that it has shown, in DER.
            tls: what it was shown.
            arrived: as released.
        """
        self.peer_role, self.peer_name = role, name
        self._certificate, self.tls = certificate, tls
        self.certificate_role = None if certificate is None else role
        self._stream.refill(arrived)

    @property
    def seconds_waited(self) -> float:
        """For the peer, since the channel was made."""
        return self._stream.waited

    def check_revoked(self) -> None:
        """Compare the peer's certificate with the list of revoked ones.

        Raises:
            RevokedError: it is on the list by now.
        """
        if self.tls is not None and self._certificate is not None:
            self.tls.check_revoked(self._certificate, role=self.peer_role)

    def pace(self) -> None:
        """Keep TCP's speed through one inference; see `tcp.pace`."""
        tcp.pace(self._stream.sock)

    # -- ring elements

    def send(self, values: np.ndarray, *, bits: int, tag: int = 0) -> None:
        """Send ring elements, packed to `bits` bits each.

        Args:
            values: int32 or int64, any shape.
            bits: ring width, 1 to 64.
            tag: number the receiver must expect (which inference this belongs to).

        Cost: one message of packed_bytes(values.size, bits) bytes.
        """
        self.send_parts([(values, bits)], tag=tag)

    def receive(self, count: int, *, bits: int, tag: int = 0) -> np.ndarray:
        """Receive exactly `count` elements of the ring modulo 2**bits, flat."""
        return self.receive_parts([(count, bits)], tag=tag)[0]

    def exchange(self, values: np.ndarray, *, bits: int, tag: int = 0) -> np.ndarray:
        """Send `values` and receive as many elements, both at the same time.

        Returns: the peer's elements in the shape of `values`.

        Cost: 1 round, packed_bytes(values.size, bits) bytes sent per party.
        """
        data = self.exchange_packed(pack(values, bits=bits), tag=tag)
        return unpack(data, values.size, bits=bits).reshape(values.shape)

    def send_parts(
        self, parts: Sequence[tuple[np.ndarray, int]], *, tag: int = 0
    ) -> None:
        """Send arrays of ring elements in one message, each at its own width.

        Args:
            parts: (int32 or int64 of any shape, bits of its ring), in order.
            tag: number the receiver must expect (which inference this belongs to).

        Cost: one message; each part starts at a byte and takes
            packed_bytes(values.size, bits).
        """
        size = sum(packed_bytes(values.size, bits) for values, bits in parts)
        message = self._outgoing(Kind.RING, tag, size, packing(parts))
        self._stream.transfer(message, nothing(), timeout=self.timeout)

    def receive_parts(
        self,
        sizes: Sequence[tuple[int, int]],
        *,
        tag: int = 0,
        out: Sequence[np.ndarray] | None = None,
    ) -> list[np.ndarray]:
        """Receive what `send_parts` sent: exactly these parts, each of them flat.

        Args:
            sizes: (number of elements, bits of their ring) of each part, in order.
            tag: number the message must carry.
            out: where each part's elements go; new arrays if None.

        Returns: an array for each part as `unpack` makes it.

        Raises:
            PeerError: the message has another size or tag; nothing was allocated.
        """
        return self._receive(self._reading_parts(tag, sizes, out))

    # -- ring elements that are packed already

    def send_packed(self, data: memoryview, *, tag: int = 0) -> None:
        """Send bytes that are ring elements to both sides."""
        self._send(Kind.RING, data, tag=tag)

    def receive_packed(self, size: int, *, tag: int = 0) -> memoryview:
        """Receive exactly `size` such bytes."""
        return self._receive(self._reading(Kind.RING, tag, size))

    def exchange_packed(self, data: memoryview, *, tag: int = 0) -> memoryview:
        """Send such bytes and receive as many, both at the same time."""
        reading = self._reading(Kind.RING, tag, len(data))
        return self._receive(reading, self._outgoing(Kind.RING, tag, len(data), [data]))

    # -- bytes

    def send_bytes(self, data: bytes, *, tag: int = 0) -> None:
        """Send a byte string as one message."""
        self._send(Kind.BYTES, memoryview(data), tag=tag)

    def receive_bytes(self, *, limit: int = 1 << 24, tag: int = 0) -> bytes:
        """Receive one byte string of at most `limit` bytes."""
        return bytes(self._receive(self._reading(Kind.BYTES, tag, range(limit + 1))))

    # -- control

    def wait(
        self, *, timeout: float | None, rings: Container[int] = (), limit: int = -1
    ) -> Header:
        """Wait for the next message without taking it.

        What is neither acceptable kind nor size raises before the caller acts on it.

        Args:
            timeout: seconds to wait while the peer is idle; None waits for ever (TCP
                keepalive notices a peer whose host vanished). Once a byte arrived, the
                header must be complete within the channel's own timeout.
            rings: how many bytes of ring elements it may announce: a set, or a range.
            limit: how long a byte string it may announce; none by default.

        Returns: its kind, tag and bytes; the caller compares the tag.
        """
        if self._header is None:
            idle = float("inf") if timeout is None else timeout
            self._stream.transfer(
                [], self._reading_header(), timeout=self.timeout, idle=idle
            )
        header = self._header
        assert header is not None
        known = (header.is_ring and header.size in rings) or (
            header.kind == Kind.BYTES and header.size <= limit
        )
        if not known:
            error = self._out_of_step(header, "something else at this point")
            if header.kind == Kind.BYTES and limit >= 0:
                raise LimitError(f"{error} At most {limit} bytes.", "message_bytes")
            raise error
        return header

    def is_quiet(self) -> bool:
        """Whether nothing was sent here and neither side closed; reads nothing."""
        return self._header is None and self._stream.is_quiet()

    def lost(self) -> PeerError | None:
        """Why nothing can be asked any more: what the peer said, or that it left.

        None while the channel is quiet, for a side whose turn it is to ask.
        """
        if self.is_quiet():
            return None
        try:
            self.wait(timeout=_LAST_WORD_S)
        except PeerError as error:
            return error
        raise AssertionError("no message is acceptable here")

    def handshake(self, *, digest: bytes) -> str:
        """Exchange role and a digest; nothing else is sent.

        Args:
            digest: 32 bytes that must be the same on both sides.

        Returns: the peer's role, which is also the one in its certificate.

        Raises:
            PlanMismatchError: the digests differ; on both sides.
            PeerError: the peer speaks another version, or has a role that is not among
                `peer_roles` or not its certificate's; on both sides.
        """
        outgoing = self._outgoing(
            Kind.HELLO, 0, HELLO_BYTES, [hello(self.role, digest)]
        )
        data = self._receive(self._reading(Kind.HELLO, 0, HELLO_BYTES), outgoing)
        role, theirs = parse_hello(data, peer=self.peer)
        if role not in self.peer_roles:
            raise self._refused(
                f"The {self.role} talks to a {' or a '.join(self.peer_roles)}; "
                f"greeted by a {role}."
            )
        if self.certificate_role not in (None, role):
            raise self._refused(
                f"Greeted as a {role} with the certificate of a "
                f"{self.certificate_role}."
            )
        self.peer_role = role
        if theirs != digest:
            raise PlanMismatchError(
                f"The {self.role} holds plan {digest.hex()[:16]}, the {role} holds "
                f"plan {theirs.hex()[:16]}. Both must use the same network, input "
                "shape and precision; nothing was sent."
            )
        return role

    def abort(self, text: str) -> None:
        """Tell the peer why this side stops, then close. Never raises.

        From any thread: where another one is using the channel, that one does it. A
        message that is half written is cut instead, and the peer loses the reason.

        Args:
            text: without secrets; control characters are removed, and it is cut to
                `frames.ABORT_BYTES`.

        Cost: waits up to `stream.LINGER_S` seconds for the peer to close.
        """
        self._stream.finish(frame(Kind.ABORT, 0, [reason(text)]))

    def reset_counters(self) -> None:
        """Set all four counters to zero."""
        self.messages_sent = self.messages_received = 0
        self.bytes_sent = self.bytes_received = 0

    def close(self) -> None:
        """Close the socket, from any thread; a second call does nothing."""
        self._stream.close()

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- messages

    def _outgoing(
        self, kind: Kind, tag: int, size: int, parts: Iterable[memoryview]
    ) -> Iterable[memoryview]:
        self.messages_sent += 1
        self.bytes_sent += HEADER_BYTES + size
        return framed(kind, tag, size, parts)

    def _send(self, kind: Kind, data: memoryview, *, tag: int) -> None:
        message = self._outgoing(kind, tag, len(data), [data])
        self._stream.transfer(message, nothing(), timeout=self.timeout)

    def _receive(self, reading: Reading[T], outgoing: Iterable[memoryview] = ()) -> T:
        return self._stream.transfer(outgoing, reading, timeout=self.timeout)

    def _reading(self, kind: Kind, tag: int, sizes: int | range) -> Reading[memoryview]:
        """Read one message of exactly this size, or of one in a range from 0."""
        size = yield from self._expecting(kind, tag, sizes)
        buffer = np.empty(size, dtype=np.uint8).data
        yield buffer
        self._received(size)
        return buffer

    def _reading_parts(
        self,
        tag: int,
        parts: Sequence[tuple[int, int]],
        out: Sequence[np.ndarray] | None,
    ) -> Reading[list[np.ndarray]]:
        """Read one message of exactly these ring elements."""
        expected = sum(packed_bytes(count, bits) for count, bits in parts)
        size = yield from self._expecting(Kind.RING, tag, expected)
        found = yield from unpacking(parts, out)
        self._received(size)
        return found

    def _received(self, size: int) -> None:
        self.messages_received += 1
        self.bytes_received += HEADER_BYTES + size

    def _expecting(self, kind: Kind, tag: int, sizes: int | range) -> Reading[int]:
        """Read a header, which must announce this; the size of what follows."""
        if self._header is None:
            yield from self._reading_header()
        header = self._header
        assert header is not None
        if isinstance(sizes, int):
            fits, size = header.size == sizes, f"{sizes} bytes"
        else:
            fits, size = header.size in sizes, f"at most {len(sizes) - 1} bytes"
        if header.kind != kind or header.tag != tag or not fits:
            error = self._out_of_step(header, f"kind {kind:d}, tag {tag}, {size}")
            if header.kind == kind and isinstance(sizes, range) and not fits:
                raise LimitError(str(error), "message_bytes")
            raise error
        self._header = None
        return header.size

    def _reading_header(self) -> Reading[None]:
        data = bytearray(HEADER_BYTES)
        yield memoryview(data)
        header = parse(data, peer=self.peer)
        if header.kind == Kind.ABORT:
            text = bytearray(header.size)
            yield memoryview(text)
            raise self._stopped(text)
        self._header = header

    def _last_word(self, inbox: bytearray) -> PeerError | None:
        """The peer's reason, among messages that arrived and were not read."""
        start = 0 if self._header is None else self._header.size
        while len(inbox) >= start + HEADER_BYTES:
            body = start + HEADER_BYTES
            try:
                header = parse(inbox[start:body], peer=self.peer)
            except PeerError as error:
                return error
            start = body + header.size
            if header.kind == Kind.ABORT and len(inbox) >= start:
                return self._stopped(inbox[body:start])
        return None

    def _stopped(self, text: bytearray) -> PeerError:
        said = printable(text.decode(errors="replace"))
        kind = _REFUSALS.get(said.partition(":")[0], PeerError)
        return kind(f"{self.peer} stopped: {said}")

    def _out_of_step(self, header: Header, expected: str) -> PeerError:
        return PeerError(
            f"{self.peer} sent a message of kind {header.kind:d}, tag {header.tag}, "
            f"{header.size} bytes; expected {expected}. The two sides are out of step."
        )

    def _refused(self, text: str) -> PeerError:
        self.abort(text)
        return PeerError(text)


def socket_pair(
    *, timeout: float = 30.0, roles: tuple[str, str] = ("server", "client")
) -> tuple[Channel, Channel]:
    """Two connected channels inside one process, for tests and in-process dealing.

    Args:
        timeout: as for `Channel`.
        roles: of the first channel's side, and of the second's.
    """
    ends = [
        Channel(
            sock, role=own, peer_roles=(other,), timeout=timeout, peer=f"the {other}"
        )
        for sock, own, other in zip(
            socket.socketpair(), roles, roles[::-1], strict=True
        )
    ]
    return ends[0], ends[1]
