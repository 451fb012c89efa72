"""Messages: parts, simultaneous sends, bytes, greetings, hostile headers."""

from __future__ import annotations

import hashlib
import socket
import struct
import tracemalloc

import numpy as np
import pytest

from crypten_espn.errors import PeerError, PlanMismatchError
from crypten_espn.wire.channel import Channel
from crypten_espn.wire.frames import PROTOCOL_VERSION
from crypten_espn.wire.packing import packed_bytes

from .cases import in_thread

DIGEST = hashlib.sha256(b"a plan").digest()


def test_both_sides_send_large_messages_at_once(pair):
    left, right = pair(timeout=10)
    rng = np.random.default_rng(0)
    a = rng.integers(-(2**62), 2**62, 1_500_000)
    b = rng.integers(-(2**62), 2**62, 1_500_000)
    # Sends that do not read must not wait for each other either.
    other = in_thread(lambda: (right.send(b, bits=64), right.receive(a.size, bits=64)))
    left.send(a, bits=64)
    assert np.array_equal(left.receive(b.size, bits=64), b)
    assert np.array_equal(other.result()[1], a)
    other = in_thread(lambda: right.exchange(b, bits=33))
    assert np.array_equal(left.exchange(a, bits=33), b & (2**33 - 1))
    assert np.array_equal(other.result(), a & (2**33 - 1))
    assert left.messages_sent == right.messages_sent == 2
    assert left.messages_received == 2
    sent = 8 * a.size + packed_bytes(a.size, 33) + 2 * 20
    assert left.bytes_sent == right.bytes_sent == left.bytes_received == sent


def test_parts_of_one_message_have_widths_of_their_own(pair):
    left, right = pair(timeout=10)
    rng = np.random.default_rng(1)
    shapes = [((3,), 5), ((7, 2), 64), ((0,), 9), ((1000,), 32), ((11,), 33), ((), 64)]
    parts = [
        (np.asarray(rng.integers(0, 2 ** min(bits, 31), shape)), bits)
        for shape, bits in shapes
    ]
    left.send_parts(parts, tag=3)
    received = right.receive_parts([(v.size, bits) for v, bits in parts], tag=3)
    for (values, bits), got in zip(parts, received, strict=True):
        assert np.array_equal(got, values.reshape(-1))
        assert got.dtype == (np.int32 if bits <= 32 else np.int64)
        assert got.flags.aligned
    sizes = sum(packed_bytes(values.size, bits) for values, bits in parts)
    assert left.messages_sent == 1 and left.bytes_sent == sizes + 20
    left.send_parts(parts)
    with pytest.raises(PeerError, match="out of step"):
        right.receive_parts([(v.size + 8, bits) for v, bits in parts])


def header(kind, tag, size, *, magic=b"ESPN", version=PROTOCOL_VERSION):
    return struct.pack("<4sHHIQ", magic, version, kind, tag, size)


@pytest.fixture
def raw():
    """A socket that can write anything, and the channel at its other end."""
    mine, other = socket.socketpair()
    channel = Channel(other, role="server", peer_roles=("client",), timeout=5)
    yield mine, channel
    mine.close()
    channel.close()


@pytest.mark.parametrize(
    "data, message",
    [
        (b"GET / HTTP/1.1\r\nHost: here\r\n\r\n", "does not speak this protocol"),
        (header(1, 0, 32, version=9), "version 9"),
        (header(1, 0, 1 << 60), "out of step"),
        (header(1, 7, 32), "tag 7"),
        (header(2, 0, 32), "kind 2"),
        (header(77, 0, 32), "kind 77, which does not exist"),
        (header(4, 0, 1 << 40), "a reason of 1099511627776 bytes"),
    ],
)
def test_foreign_headers_are_refused_before_anything_is_allocated(raw, data, message):
    mine, channel = raw
    mine.sendall(data)
    tracemalloc.start()
    try:
        with pytest.raises(PeerError, match=message):
            channel.receive(4, bits=64)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    with pytest.raises(PeerError):  # nor is what follows read as a message
        channel.receive(4, bits=64)


@pytest.mark.parametrize(
    "data, message",
    [
        (header(1, 2**32 - 1, 999), "999 bytes; expected something else"),
        (header(1, 3, 64, magic=b"HTTP"), "does not speak this protocol"),
        (header(1, 3, 64, version=1), "version 1"),
        (header(2, 0, 101), "101 bytes"),
        (header(3, 0, 48), "kind 3"),
        (header(4, 0, 3) + b"why", "stopped: why"),
    ],
)
def test_wait_lets_nobody_act_on_a_header_that_is_not_acceptable(raw, data, message):
    mine, channel = raw
    mine.sendall(data)
    with pytest.raises(PeerError, match=message):
        channel.wait(timeout=None, rings={64}, limit=100)


def test_wait_tells_kind_tag_and_size_and_leaves_the_message(pair):
    left, right = pair(timeout=5)
    right.send(np.arange(8), bits=64, tag=5)
    right.send_bytes(b"x" * 100)
    found = left.wait(timeout=None, rings=range(64, 1000, 64), limit=100)
    assert found.is_ring and found.tag == 5 and found.size == 64
    assert left.wait(timeout=0, rings={64}) == found
    assert np.array_equal(left.receive(8, bits=64, tag=5), np.arange(8))
    found = left.wait(timeout=5, limit=100)
    assert not found.is_ring and found.size == 100
    assert left.receive_bytes(limit=100) == b"x" * 100


def test_the_reason_is_shown_without_what_a_terminal_obeys(raw):
    mine, channel = raw
    text = "red \x1b[31m, a line\nof a log, \u202e\x9b2J\x07".encode()
    mine.sendall(header(4, 0, len(text)) + text)
    with pytest.raises(PeerError) as error:
        channel.receive(4, bits=64)
    shown = str(error.value)
    assert shown.isprintable() and "a line of a log" in shown


def test_a_long_reason_is_cut(pair):
    left, right = pair(timeout=5)
    other = in_thread(lambda: right.abort("because " * 10_000))
    with pytest.raises(PeerError, match="stopped: because") as error:
        left.receive(4, bits=64)
    assert len(str(error.value)) < 1100
    left.close()
    other.result()


def test_handshake_names_both_plans(pair):
    left, right = pair(timeout=5)
    other = in_thread(lambda: right.handshake(digest=DIGEST))
    assert left.handshake(digest=DIGEST) == "client"
    assert other.result() == "server"
    wrong = hashlib.sha256(b"another plan").digest()
    other = in_thread(lambda: right.handshake(digest=wrong))
    with pytest.raises(PlanMismatchError, match=DIGEST.hex()[:16]) as here:
        left.handshake(digest=DIGEST)
    assert wrong.hex()[:16] in str(here.value)
    with pytest.raises(PlanMismatchError, match=wrong.hex()[:16]):
        other.result()


@pytest.mark.parametrize(
    "name, message",
    [
        (b"server", "talks to a client; greeted by a server"),
        (b"dealer", "talks to a client; greeted by a dealer"),
        (b"rank 1", "greets as 'rank 1'"),
        (b"client\0x", "which is none of server, client, dealer"),
        (b"\x1b[31mclient", "which is none of"),
    ],
)
def test_a_greeting_of_another_role_is_refused(raw, name, message):
    mine, channel = raw
    mine.sendall(header(3, 0, 48) + name.ljust(16, b"\0") + DIGEST)
    mine.shutdown(socket.SHUT_WR)
    with pytest.raises(PeerError, match=message) as error:
        channel.handshake(digest=DIGEST)
    assert str(error.value).isprintable()


def test_a_greeting_that_is_not_the_certificates_role_is_refused():
    mine, other = socket.socketpair()
    channel = Channel(
        other, role="dealer", peer_roles=("server", "client"), certificate_role="client"
    )
    with mine, channel:
        mine.sendall(header(3, 0, 48) + b"server".ljust(16, b"\0") + DIGEST)
        mine.shutdown(socket.SHUT_WR)
        with pytest.raises(
            PeerError, match="a server with the certificate of a client"
        ):
            channel.handshake(digest=DIGEST)


def test_bytes_messages_have_a_limit(pair):
    left, right = pair(timeout=2)
    right.send_bytes(b"x" * 100)
    assert left.receive_bytes(limit=100) == b"x" * 100
    right.send_bytes(b"x" * 101)
    with pytest.raises(PeerError, match="at most 100 bytes"):
        left.receive_bytes(limit=100)
