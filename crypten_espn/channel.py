"""A direct two-party channel: one TCP connection, ring elements at their true width.

CrypTen opens every value with gloo's all_reduce, which costs two round trips on two
parties. Here a message is written to one socket and read from it, both directions at
once, so an opening costs one one-way delay. A message holds ring elements packed to
the bits their ring has. Nothing received is unpickled or executed: a message is
checked for its kind, tag and length before a byte of it is used.

`Channel` carries the messages and counts them. `use_direct_channel()` runs CrypTen's
own protocols over such a channel.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import socket
import ssl
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .compiled import compiled
from .errors import PeerError, PlanMismatchError

PROTOCOL_VERSION = 1
MAGIC = b"ESPN"
_HEADER = struct.Struct("<4sHHIQ")  # magic, version, kind, tag, payload bytes
_KIND_RING, _KIND_BYTES, _KIND_HELLO, _KIND_ABORT = 1, 2, 3, 4
_HELLO = struct.Struct("<H30s32s")  # protocol version, role, digest of the plan
_CHUNK = 1 << 20
MAX_BYTES_MESSAGE = 1 << 31


# ---------------------------------------------------------------- packing


@compiled
def _pack(values, bits, out):
    mask = (np.uint64(1) << np.uint64(bits)) - np.uint64(1)
    word = np.uint64(0)
    filled = 0
    position = 0
    for i in range(values.shape[0]):
        value = np.uint64(values[i]) & mask
        word |= value << np.uint64(filled)
        filled += bits
        if filled >= 64:
            out[position] = word
            position += 1
            filled -= 64
            # A shift by 64 is undefined, hence the second branch.
            word = value >> np.uint64(bits - filled) if filled > 0 else np.uint64(0)
    if filled > 0:
        out[position] = word


@compiled
def _unpack(words, bits, out):
    mask = (np.uint64(1) << np.uint64(bits)) - np.uint64(1)
    position = 0
    used = 0
    for i in range(out.shape[0]):
        value = words[position] >> np.uint64(used)
        used += bits
        if used >= 64:
            position += 1
            used -= 64
            if used > 0:
                value |= words[position] << np.uint64(bits - used)
        out[i] = value & mask


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` elements of the ring modulo 2**bits take on the wire."""
    return (count * bits + 7) // 8


def pack(values: np.ndarray, *, bits: int) -> memoryview:
    """Pack ring elements to `bits` bits each, little-endian, without gaps.

    Args:
        values: int32 or int64, any shape; each stands for itself modulo 2**bits.
        bits: width of the ring, 1 to 64.

    Returns: `packed_bytes(values.size, bits)` bytes. Widths equal to the type's own
        are not copied: the view shares memory with a contiguous `values`.
    """
    flat = np.ascontiguousarray(values).reshape(-1)
    if flat.size == 0:
        return memoryview(b"")
    if bits == flat.dtype.itemsize * 8:
        return flat.data.cast("B")
    if bits == 32:
        return flat.astype(np.int32).data.cast("B")
    words = np.empty((flat.size * bits + 63) // 64, dtype=np.uint64)
    _pack(flat, bits, words)
    return words.data.cast("B")[: packed_bytes(flat.size, bits)]


def unpack(data: memoryview | bytes, count: int, *, bits: int) -> np.ndarray:
    """Undo `pack`: int32 for up to 32 bits, int64 for more.

    Values lie in [0, 2**bits), save that a 32-bit or 64-bit ring fills its type.
    """
    if bits == 64:
        return np.frombuffer(data, dtype=np.int64, count=count)
    if bits == 32:
        return np.frombuffer(data, dtype=np.int32, count=count)
    # One word more than the data needs, so the last element may read past its end.
    words = np.zeros((count * bits + 63) // 64 + 1, dtype=np.uint64)
    words.view(np.uint8)[: len(data)] = np.frombuffer(data, dtype=np.uint8)
    out = np.empty(count, dtype=np.int32 if bits < 32 else np.int64)
    _unpack(words, bits, out)
    return out


# ---------------------------------------------------------------- TLS, addresses


@dataclass(frozen=True)
class TLS:
    """Mutual TLS: both sides show a certificate that `authority` signed.

    Args:
        certificate, key: paths of this side's certificate chain and private key (PEM).
        authority: path of the certificates (PEM) that may sign the other side's.
        server_name: name the server's certificate must carry; None accepts any name,
            since the peer is identified by a certificate the authority signed.
    """

    certificate: str | os.PathLike[str]
    key: str | os.PathLike[str]
    authority: str | os.PathLike[str]
    server_name: str | None = None

    def context(self, *, server: bool) -> ssl.SSLContext:
        protocol = ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        if not server:
            context.check_hostname = self.server_name is not None
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(self.certificate, self.key)
        context.load_verify_locations(self.authority)
        return context


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


# ---------------------------------------------------------------- the channel


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
        self._transfer([self._frame(_KIND_RING, tag, pack(values, bits=bits))], None)

    def receive(self, count: int, *, bits: int, tag: int = 0) -> np.ndarray:
        """Receive exactly `count` elements of the ring modulo 2**bits, flat."""
        data = self._receive_frame(_KIND_RING, tag, packed_bytes(count, bits))
        return unpack(data, count, bits=bits)

    def exchange(self, values: np.ndarray, *, bits: int, tag: int = 0) -> np.ndarray:
        """Send `values` and receive as many elements, both at the same time.

        Returns: the peer's elements in the shape of `values`.

        Cost: 1 round, packed_bytes(values.size, bits) bytes sent per party.
        """
        frame = self._frame(_KIND_RING, tag, pack(values, bits=bits))
        data = self._receive_frame(
            _KIND_RING, tag, packed_bytes(values.size, bits), outgoing=[frame]
        )
        return unpack(data, values.size, bits=bits).reshape(values.shape)

    # -- bytes

    def send_bytes(self, data: bytes, *, tag: int = 0) -> None:
        """Send a byte string as one message."""
        self._transfer([self._frame(_KIND_BYTES, tag, memoryview(data))], None)

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
        frame = self._frame(_KIND_HELLO, 0, memoryview(hello))
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
                self._transfer([self._frame(_KIND_ABORT, 0, memoryview(text))], None)
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

    def _frame(self, kind: int, tag: int, payload: memoryview) -> list[memoryview]:
        header = _HEADER.pack(MAGIC, PROTOCOL_VERSION, kind, tag, len(payload))
        self.messages_sent += 1
        self.bytes_sent += len(header) + len(payload)
        if len(payload) <= 1 << 14:  # one small packet instead of two
            return [memoryview(header + payload.tobytes())]
        return [memoryview(header), payload]

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
            sock = _wrap(sock, self._tls, server=True, timeout=peer_timeout, peer=peer)
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
        sock = _wrap(sock, tls, server=False, timeout=timeout, peer=peer)
    return Channel(sock, timeout=timeout, peer=peer)


def _wrap(
    sock: socket.socket, tls: TLS, *, server: bool, timeout: float, peer: str
) -> ssl.SSLSocket:
    try:
        context = tls.context(server=server)
        sock.settimeout(timeout)
        name = None if server else tls.server_name
        return context.wrap_socket(sock, server_side=server, server_hostname=name)
    except (OSError, ssl.SSLError) as error:
        sock.close()
        raise PeerError(
            f"TLS with {peer} failed: {error}. Both sides need a certificate, its key "
            "and the authority that signed the other side's."
        ) from None


def socket_pair(*, timeout: float = 30.0) -> tuple[Channel, Channel]:
    """Two connected channels inside one process, for tests and in-process dealing."""
    left, right = socket.socketpair()
    return (
        Channel(left, timeout=timeout, peer="rank 1"),
        Channel(right, timeout=timeout, peer="rank 0"),
    )


# ---------------------------------------------------------------- CrypTen over it


def direct_communicator(channel: Channel, base: Any) -> Any:
    """CrypTen's two-party communicator with its collectives over `channel`.

    Everything between the two parties goes through the channel; the group that holds
    the trusted third party keeps gloo. Openings merge: a batched all_reduce is one
    message.

    Args:
        channel: connected to the other party.
        base: CrypTen's initialised DistributedCommunicator.
    """
    import torch
    from crypten.communicator.communicator import _logging
    from crypten.communicator.distributed_communicator import DistributedCommunicator
    from torch.distributed import ReduceOp

    def to_array(tensor: torch.Tensor) -> np.ndarray:
        flat = tensor.detach().contiguous().cpu().reshape(-1)
        return flat.view(torch.uint8).numpy().view(np.uint8)

    def combine(mine: torch.Tensor, theirs: torch.Tensor, op: object) -> torch.Tensor:
        if op == ReduceOp.SUM:
            return mine + theirs
        if op == ReduceOp.BXOR:
            return mine ^ theirs
        if op == ReduceOp.MAX:
            return torch.maximum(mine, theirs)
        if op == ReduceOp.MIN:
            return torch.minimum(mine, theirs)
        if op == ReduceOp.PRODUCT:
            return mine * theirs
        if op == ReduceOp.BAND:
            return mine & theirs
        if op == ReduceOp.BOR:
            return mine | theirs
        raise ValueError(f"Reduction {op} is not supported over a direct channel.")

    class DirectCommunicator(DistributedCommunicator):
        def __init__(self) -> None:
            self.__dict__.update(base.__dict__)
            self.channel = channel

        # -- raw transfers

        def _swap(self, tensors: list) -> list:
            mine = [to_array(tensor) for tensor in tensors]
            data = np.concatenate(mine) if len(mine) != 1 else mine[0]
            frame = channel._frame(_KIND_RING, 0, data.data)
            raw = channel._receive_frame(_KIND_RING, 0, data.size, outgoing=[frame])
            return self._split(raw, tensors)

        def _push(self, tensors: list) -> None:
            data = np.concatenate([to_array(tensor) for tensor in tensors])
            channel._transfer([channel._frame(_KIND_RING, 0, data.data)], None)

        def _pull(self, like: list) -> list:
            size = sum(tensor.numel() * tensor.element_size() for tensor in like)
            return self._split(channel._receive_frame(_KIND_RING, 0, size), like)

        @staticmethod
        def _split(raw: memoryview, like: list) -> list:
            result, start = [], 0
            array = np.frombuffer(raw, dtype=np.uint8)
            for tensor in like:
                size = tensor.numel() * tensor.element_size()
                part = torch.from_numpy(array[start : start + size].copy())
                part = part.view(tensor.dtype).reshape(tensor.shape)
                result.append(part.to(tensor.device))
                start += size
            return result

        # -- CrypTen's interface

        @_logging
        def send(self, tensor, dst):
            self._push([tensor.data])

        @_logging
        def recv(self, tensor, src=None):
            return self._pull([tensor.data])[0]

        @_logging
        def isend(self, tensor, dst):
            self._push([tensor.data])
            return _Done()

        @_logging
        def irecv(self, tensor, src=None):
            tensor.data.copy_(self._pull([tensor.data])[0])
            return _Done()

        @_logging
        def scatter(self, scatter_list, src, size=None, device=None):
            if src == self.get_rank():
                self._push([scatter_list[1 - src].data])
                return scatter_list[src].data
            if size is None:
                size = scatter_list[self.get_rank()].size()
            like = torch.empty(size, dtype=torch.long, device=device)
            return self._pull([like])[0]

        @_logging
        def reduce(self, input, dst, op=ReduceOp.SUM, batched=False):
            inputs = [x.data for x in input] if batched else [input.data]
            if dst != self.get_rank():
                self._push(inputs)
                return None
            theirs = self._pull(inputs)
            result = [combine(a, b, op) for a, b in zip(inputs, theirs, strict=True)]
            return result if batched else result[0]

        @_logging
        def all_reduce(self, input, op=ReduceOp.SUM, batched=False):
            inputs = [x.data for x in input] if batched else [input.data]
            theirs = self._swap(inputs)
            result = [combine(a, b, op) for a, b in zip(inputs, theirs, strict=True)]
            return result if batched else result[0]

        @_logging
        def gather(self, tensor, dst):
            if self.get_rank() != dst:
                self._push([tensor.data])
                return [None]
            result = [tensor.data.clone(), self._pull([tensor.data])[0]]
            return result if dst == 0 else result[::-1]

        @_logging
        def all_gather(self, tensor):
            result = [tensor.data.clone(), self._swap([tensor.data])[0]]
            return result if self.get_rank() == 0 else result[::-1]

        @_logging
        def broadcast(self, input, src, group=None, batched=False):
            if group is not None and group is not self.main_group:
                return base.broadcast(input, src, group=group, batched=batched)
            inputs = [x.data for x in input] if batched else [input.data]
            if self.get_rank() == src:
                self._push(inputs)
            else:
                for target, value in zip(inputs, self._pull(inputs), strict=True):
                    target.copy_(value)
            return input

        @_logging
        def barrier(self):
            self._swap([torch.zeros(1, dtype=torch.uint8)])

    class _Done:
        def wait(self) -> bool:
            return True

        def is_completed(self) -> bool:
            return True

    return DirectCommunicator()


@contextlib.contextmanager
def use_direct_channel(
    *,
    host: str = "127.0.0.1",
    listen: str = "127.0.0.1",
    timeout: float = 30.0,
    tls: TLS | None = None,
) -> Iterator[Channel]:
    """Run CrypTen's own two-party protocols over a direct channel inside the block.

    1. Rank 0 listens on a free port of `listen` and tells rank 1 the port over gloo.
    2. Rank 1 connects to `host` at that port.
    3. CrypTen's communicator is replaced until the block ends.

    Args:
        host: where rank 1 reaches rank 0.
        listen: the address rank 0 binds.
        timeout: seconds without progress before a dead peer is an error.
        tls: mutual TLS certificates, or None.

    Returns: the channel, with its counters.

    Cost: one gloo broadcast of 8 bytes to set up; an opening then takes one one-way
        delay instead of gloo's two round trips.

    Raises: PeerError if CrypTen is not initialised with two processes.
    """
    import torch
    from crypten import communicator as comm
    from crypten.communicator.distributed_communicator import DistributedCommunicator

    base = DistributedCommunicator.instance
    if not DistributedCommunicator.is_initialized() or comm.get() is not base:
        raise PeerError(
            "use_direct_channel() needs CrypTen initialised in two processes; call "
            "crypten.init() in each first."
        )
    if base.get_world_size() != 2:
        raise PeerError(
            f"A direct channel joins 2 parties; this world has {base.get_world_size()}."
        )
    port = torch.zeros(1, dtype=torch.long)
    if base.get_rank() == 0:
        with Listener(f"{listen}:0", tls=tls) as listener:
            port[0] = parse_address(listener.address)[1]
            base.broadcast(port, 0)
            channel = listener.accept(
                timeout=timeout, peer_timeout=timeout, peer="rank 1"
            )
    else:
        base.broadcast(port, 0)
        channel = connect_channel(
            f"{host}:{int(port[0])}", timeout=timeout, tls=tls, peer="rank 0"
        )
    digest = hashlib.sha256(b"crypten over a direct channel").digest()
    try:
        channel.handshake(role=f"rank {base.get_rank()}", digest=digest)
        channel.reset_counters()
        direct = direct_communicator(channel, base)
        DistributedCommunicator.instance = direct
        try:
            yield channel
        finally:
            base.comm_rounds = direct.comm_rounds
            base.comm_bytes = direct.comm_bytes
            base.comm_time = direct.comm_time
            DistributedCommunicator.instance = base
    finally:
        channel.close()
