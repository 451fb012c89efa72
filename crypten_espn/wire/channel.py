"""A direct two-party channel: one TCP connection, ring elements at their true width.

CrypTen opens every value with gloo's all_reduce, which costs two round trips on two
parties. Here a message is written to one socket and read from it, both directions at
once, so an opening costs one one-way delay. A message holds ring elements packed to
the bits their ring has. Nothing received is unpickled or executed: a message is
checked for its kind, tag and length before a byte of it is used.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import struct
import time
from collections.abc import Sequence

import numpy as np

from ..errors import PeerError, PlanMismatchError
from .packing import pack, packed_bytes, unpack

PROTOCOL_VERSION = 1
MAGIC = b"ESPN"
_HEADER = struct.Struct("<4sHHIQ")  # magic, version, kind, tag, payload bytes
HEADER_BYTES = _HEADER.size
_KIND_RING, _KIND_BYTES, _KIND_HELLO, _KIND_ABORT = 1, 2, 3, 4
_HELLO = struct.Struct("<H30s32s")  # protocol version, role, digest of the plan
_CHUNK = 1 << 20
MAX_BYTES_MESSAGE = 1 << 31


class Channel:
    """Messages between exactly two parties over one connected socket.

    Args:
        sock: connected stream socket, plain or TLS; the channel owns it from now on.
        timeout: seconds without any progress after which the peer counts as dead.
        peer: what to call the other side in errors.

    Counters: `messages_sent`, `messages_received` and `bytes_sent`, `bytes_received`
    (payload and the 20-byte frame header; TLS and TCP framing excluded).

    Error: every method raises PeerError when the peer is gone, silent for `timeout`
    seconds, or sends something else than was expected.
    """

    def __init__(
        self, sock: socket.socket, *, timeout: float = 30.0, peer: str = "peer"
    ) -> None:
        self.timeout = timeout
        self.peer = peer
        self.messages_sent = self.messages_received = 0
        self.bytes_sent = self.bytes_received = 0
        self._sock = sock
        self._inbox = bytearray()
        self._header: tuple[bytes, int, int, int, int] | None = None
        self._closed = False
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            # Kernel buffers are left alone: setting them would switch off autotuning,
            # which a long fast link needs.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def pace(self) -> None:
        """Keep TCP's speed through one inference, where the kernel offers BBR.

        For messages that alternate: after a pause, loss-based congestion control starts
        slowly again, which on a long path costs a round trip or more for every message.
        BBR does not; begun afresh for each inference, it does not stop either for its
        look at the round trip, 0.2 s every ten seconds. Not for exchanges, where both
        directions fill at once and pacing delays them.
        """
        with contextlib.suppress(OSError, AttributeError):
            option = socket.TCP_CONGESTION
            for name in (b"bbr", b"reno", b"bbr"):  # the first fails without BBR
                self._sock.setsockopt(socket.IPPROTO_TCP, option, name)

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
        frame = self._frame(_KIND_RING, tag, [pack(values, bits=bits)])
        data = self._receive_frame(
            _KIND_RING, tag, packed_bytes(values.size, bits), outgoing=[frame]
        )
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
        packed = [pack(values, bits=bits) for values, bits in parts]
        self._transfer([self._frame(_KIND_RING, tag, packed)], None)

    def receive_parts(
        self, sizes: Sequence[tuple[int, int]], *, tag: int = 0
    ) -> list[np.ndarray]:
        """Receive what `send_parts` sent: exactly these parts, each of them flat.

        Args:
            sizes: (number of elements, bits of their ring) of each part, in order.
            tag: number the message must carry.

        Returns: an array for each part as `unpack` makes it.

        Raises:
            PeerError: the message has another size or tag; nothing was allocated.
        """
        total = sum(packed_bytes(count, bits) for count, bits in sizes)
        data = self._receive_frame(_KIND_RING, tag, total)
        result, start = [], 0
        for count, bits in sizes:
            end = start + packed_bytes(count, bits)
            result.append(unpack(data[start:end], count, bits=bits))
            start = end
        return result

    # -- bytes

    def send_bytes(self, data: bytes, *, tag: int = 0) -> None:
        """Send a byte string as one message."""
        self._transfer([self._frame(_KIND_BYTES, tag, [memoryview(data)])], None)

    def receive_bytes(self, *, limit: int = 1 << 24, tag: int = 0) -> bytes:
        """Receive one byte string of at most `limit` bytes."""
        return bytes(self._receive_frame(_KIND_BYTES, tag, None, limit=limit))

    # -- control

    def wait(self, *, timeout: float | None) -> tuple[bool, int]:
        """Wait for the next message without taking it.

        Args:
            timeout: seconds to wait while the peer is idle; None waits for ever.

        Returns: whether it holds ring elements (else bytes), and its tag.
        """
        if self._header is None:
            saved = self.timeout
            self.timeout = float("inf") if timeout is None else timeout
            try:
                self._header = self._next_header([])
            finally:
                self.timeout = saved
        return self._header[2] == _KIND_RING, self._header[3]

    def handshake(self, *, role: str, digest: bytes) -> str:
        """Exchange protocol version, role and plan digest; nothing else is sent.

        Args:
            role: what this side is, at most 30 ASCII characters.
            digest: 32 bytes that must be the same on both sides.

        Returns: the peer's role.

        Raises: PlanMismatchError on both sides if the digests differ; PeerError if the
            peer speaks another version or is the same role.
        """
        hello = _HELLO.pack(PROTOCOL_VERSION, role.encode("ascii"), digest)
        frame = self._frame(_KIND_HELLO, 0, [memoryview(hello)])
        data = self._receive_frame(_KIND_HELLO, 0, _HELLO.size, outgoing=[frame])
        version, name, theirs = _HELLO.unpack(bytes(data))
        peer_role = name.rstrip(b"\0").decode("ascii", "replace")
        if version != PROTOCOL_VERSION:
            raise PeerError(
                f"{self.peer} speaks protocol version {version}, this side "
                f"{PROTOCOL_VERSION}. Install the same crypten-espn on both."
            )
        if peer_role == role:
            raise PeerError(f"Both sides act as {role}; one must take the other role.")
        if theirs != digest:
            raise PlanMismatchError(
                f"{role} holds plan {digest.hex()[:16]}, {peer_role} holds plan "
                f"{theirs.hex()[:16]}. Both must use the same network, input shape and "
                "precision; nothing was sent."
            )
        return peer_role

    def abort(self, reason: str) -> None:
        """Tell the peer why this side stops, then close. Never raises."""
        text = reason.encode("utf-8", "replace")[:1000]
        with contextlib.suppress(PeerError, OSError, ValueError):
            saved, self.timeout = self.timeout, min(self.timeout, 2.0)
            try:
                self._transfer([self._frame(_KIND_ABORT, 0, [memoryview(text)])], None)
            finally:
                self.timeout = saved
        self.close()

    def reset_counters(self) -> None:
        """Set all four counters to zero."""
        self.messages_sent = self.messages_received = 0
        self.bytes_sent = self.bytes_received = 0

    def close(self) -> None:
        """Close the socket; a second call does nothing."""
        if not self._closed:
            self._closed = True
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
            self._sock.close()

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- frames

    def _frame(
        self, kind: int, tag: int, parts: Sequence[memoryview]
    ) -> list[memoryview]:
        size = sum(len(part) for part in parts)
        header = _HEADER.pack(MAGIC, PROTOCOL_VERSION, kind, tag, size)
        self.messages_sent += 1
        self.bytes_sent += len(header) + size
        if size <= 1 << 14:  # one small packet instead of several
            return [memoryview(b"".join([header, *parts]))]
        return [memoryview(header), *parts]

    def _receive_frame(
        self,
        kind: int,
        tag: int,
        size: int | None,
        *,
        limit: int = MAX_BYTES_MESSAGE,
        outgoing: list[list[memoryview]] | None = None,
    ) -> memoryview:
        magic, version, got_kind, got_tag, length = self._next_header(outgoing or [])
        if magic != MAGIC:
            raise PeerError(f"{self.peer} does not speak this protocol.")
        if version != PROTOCOL_VERSION:
            raise PeerError(
                f"{self.peer} speaks protocol version {version}, this side "
                f"{PROTOCOL_VERSION}. Install the same crypten-espn on both."
            )
        if got_kind == _KIND_ABORT and length <= 1000:
            reason = bytearray(length)
            self._transfer([], memoryview(reason))
            raise PeerError(f"{self.peer} stopped: {reason.decode('utf-8', 'replace')}")
        expected = f"kind {kind}, tag {tag}, " + (
            f"at most {limit} bytes" if size is None else f"{size} bytes"
        )
        wrong_size = length > limit if size is None else length != size
        if got_kind != kind or got_tag != tag or wrong_size:
            raise PeerError(
                f"{self.peer} sent a message of kind {got_kind}, tag {got_tag}, "
                f"{length} bytes; expected {expected}. The two sides are out of step."
            )
        payload = np.empty(length, dtype=np.uint8)
        self._transfer([], payload.data)
        self.messages_received += 1
        self.bytes_received += _HEADER.size + length
        return payload.data

    def _next_header(
        self, outgoing: list[list[memoryview]]
    ) -> tuple[bytes, int, int, int, int]:
        if self._header is not None:
            header, self._header = self._header, None
            if outgoing:
                self._transfer(outgoing, None)
            return header
        data = bytearray(_HEADER.size)
        self._transfer(outgoing, memoryview(data))
        return _HEADER.unpack(bytes(data))

    def _transfer(
        self, frames: list[list[memoryview]], incoming: memoryview | None
    ) -> None:
        """Write all frames and fill `incoming`, whichever the socket allows first.

        What arrives while only writing is kept for the next read, so two sides that
        both send large messages never wait for each other.
        """
        if self._closed:
            raise PeerError(f"The channel to {self.peer} is closed.")
        queue = [part for frame in frames for part in frame if len(part)]
        filled = 0
        wanted = 0 if incoming is None else len(incoming)
        if incoming is not None and self._inbox and wanted:
            filled = min(wanted, len(self._inbox))
            incoming[:filled] = self._inbox[:filled]
            del self._inbox[:filled]
        progress = time.monotonic()
        while queue or filled < wanted:
            moved = False
            want_write = want_read = False
            if queue:
                try:
                    sent = self._sock.send(queue[0][: 4 * _CHUNK])
                    moved = True
                    if sent == len(queue[0]):
                        queue.pop(0)
                    else:
                        queue[0] = queue[0][sent:]
                except (BlockingIOError, ssl.SSLWantWriteError):
                    want_write = True
                except ssl.SSLWantReadError:
                    want_read = True
                except OSError as error:
                    raise self._lost(error) from None
            if filled < wanted or (queue and not moved):
                try:
                    if incoming is not None and filled < wanted:
                        got = self._sock.recv_into(incoming[filled:])
                        filled += got
                    else:
                        data = self._sock.recv(_CHUNK)
                        got = len(data)
                        self._inbox += data
                    if got == 0:
                        raise self._lost(None)
                    moved = True
                except (BlockingIOError, ssl.SSLWantReadError):
                    want_read = True
                except ssl.SSLWantWriteError:
                    want_write = True
                except ConnectionError as error:
                    if isinstance(error, PeerError):
                        raise
                    raise self._lost(error) from None
                except OSError as error:
                    raise self._lost(error) from None
            if moved:
                progress = time.monotonic()
                continue
            left = progress + self.timeout - time.monotonic()
            if left <= 0:
                raise PeerError(
                    f"{self.peer} was silent for {self.timeout:g} s. Check that it is "
                    "running, or allow more with timeout=."
                )
            events = (select.POLLIN if want_read else 0) | (
                select.POLLOUT if want_write else 0
            )
            poller = select.poll()
            poller.register(self._sock, events)
            poller.poll(min(left, 3600.0) * 1000)

    def _lost(self, error: OSError | None) -> PeerError:
        detail = "it closed the connection" if error is None else str(error)
        return PeerError(f"Lost {self.peer}: {detail}.")


def socket_pair(*, timeout: float = 30.0) -> tuple[Channel, Channel]:
    """Two connected channels inside one process, for tests and in-process dealing."""
    left, right = socket.socketpair()
    return (
        Channel(left, timeout=timeout, peer="rank 1"),
        Channel(right, timeout=timeout, peer="rank 0"),
    )
