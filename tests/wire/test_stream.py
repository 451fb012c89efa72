"""What happens to a connection that ends: reasons arrive, cut messages do not."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading

import numpy as np
import pytest

from crypten_espn.errors import PeerError
from crypten_espn.wire.channel import Channel, socket_pair
from crypten_espn.wire.connect import Listener, connect_channel
from crypten_espn.wire.frames import PROTOCOL_VERSION
from crypten_espn.wire.stream import INBOX_BYTES, MINIMUM_RATE, Deadline

from .cases import certificates, in_thread

LARGE = np.zeros(1 << 22, dtype=np.int64)  # more than a kernel keeps for a reader


@pytest.fixture(params=["plain", "tls"])
def connected(request, tmp_path):
    """Make the server's and the client's end of a connection over loopback."""
    made = contextlib.ExitStack()
    tls = certificates(tmp_path) if request.param == "tls" else {}

    def make(timeout):
        with Listener("127.0.0.1:0", role="server", tls=tls.get("server")) as listener:
            other = in_thread(
                lambda: connect_channel(
                    listener.address,
                    role="client",
                    peer_role="server",
                    tls=tls.get("client"),
                    timeout=timeout,
                )
            )
            incoming = listener.accept(timeout=20)
            server = incoming.open(peer_roles=("client",), timeout=timeout)
        client = other.result()
        made.enter_context(server)
        made.enter_context(client)
        return server, client

    with made:
        yield make


def test_a_refusal_reaches_a_peer_that_is_sending(connected):
    server, client = connected(timeout=20)

    def send():
        with client:
            while True:
                client.send(LARGE, bits=64)

    other = in_thread(send)
    server.wait(timeout=None, rings={LARGE.nbytes})
    server.abort("MaterialError: Inference 0 was prepared before")
    with pytest.raises(PeerError, match="stopped: MaterialError: Inference 0 was"):
        other.result()


def test_a_refusal_that_waits_is_read_by_who_goes_on_sending(connected):
    server, client = connected(timeout=20)
    client.send(LARGE[:100], bits=64)
    other = in_thread(lambda: server.abort("no such session"))
    with pytest.raises(PeerError, match="stopped: no such session"):
        while True:
            client.send(LARGE, bits=64)
    client.close()
    other.result()


def test_a_refusal_is_read_though_its_sender_did_not_linger(connected, monkeypatch):
    server, client = connected(timeout=20)
    client.send(LARGE[:100], bits=64)
    server.wait(timeout=None, rings={800})
    monkeypatch.setattr("crypten_espn.wire.stream.LINGER_BYTES", 0)
    server.abort("no such session")  # closed with unread data: a reset
    with pytest.raises(PeerError, match="stopped: no such session"):
        while True:
            client.send(LARGE, bits=64)


def test_a_refusal_is_read_after_a_reset():
    listener = socket.create_server(("127.0.0.1", 0))
    mine = socket.create_connection(listener.getsockname())
    other, _ = listener.accept()
    with (
        listener,
        Channel(mine, role="client", peer_roles=("server",), timeout=20) as client,
    ):
        client.send_bytes(b"never read")
        text = b"no such session"
        header = struct.pack("<4sHHIQ", b"ESPN", PROTOCOL_VERSION, 4, 0, len(text))
        other.sendall(header + text)
        # Nothing lingers: with unread data this is a reset.
        other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        other.close()
        with pytest.raises(PeerError, match="stopped: no such session"):
            client.send_bytes(b"more")


def test_a_refusal_behind_other_messages_is_found(pair):
    left, right = pair(timeout=20)
    right.send_bytes(b"early")
    right.send(LARGE[:3], bits=64)
    other = in_thread(lambda: right.abort("the disk is full"))
    with pytest.raises(PeerError, match="stopped: the disk is full"):
        while True:
            left.send(LARGE, bits=64)
    left.close()
    other.result()


def test_when_the_dealer_dies_the_dealer_is_blamed():
    to_dealer, dealer = socket_pair(timeout=20, roles=("server", "dealer"))
    to_client, client = socket_pair(timeout=20)

    def send():
        with client:
            while True:
                client.send(LARGE, bits=64)

    other = in_thread(send)
    dealer.close()
    with to_dealer, pytest.raises(PeerError, match="Lost the dealer") as error:
        to_dealer.receive(4, bits=64)
    to_client.abort(str(error.value))
    with pytest.raises(PeerError, match="the server stopped: Lost the dealer"):
        other.result()


def test_after_half_a_message_no_reason_is_read_as_its_rest(connected):
    server, client = connected(timeout=0.3)
    with pytest.raises(PeerError, match="silent"):
        client.send(LARGE, bits=64)
    with pytest.raises(PeerError, match="cut; nothing follows"):
        client.send(LARGE, bits=64)
    other = in_thread(lambda: client.abort("x" * 1000))
    server.timeout = 20
    with pytest.raises(PeerError, match="in the middle of a message"):
        server.receive(LARGE.size, bits=64)
    with pytest.raises(PeerError, match="cut; nothing follows"):
        server.receive(LARGE.size, bits=64)
    server.close()
    other.result()


class Narrow(socket.socket):
    """A socket that takes so many bytes, then none until `room` is set again."""

    room = 1 << 40

    def send(self, data, *flags):
        if not self.room:
            raise BlockingIOError
        sent = super().send(data[: self.room], *flags)
        self.room -= sent
        return sent


def test_a_reason_never_completes_a_message_that_lacks_a_few_bytes():
    mine, other = socket.socketpair()
    narrow = Narrow(fileno=mine.detach())
    with (
        Channel(narrow, role="server", peer_roles=(), timeout=0.2) as sender,
        Channel(other, role="client", peer_roles=(), timeout=20) as receiver,
    ):
        narrow.room = 20 + 40_000 - 100
        with pytest.raises(PeerError, match="silent"):
            sender.send(LARGE[:5000], bits=64)
        narrow.room = 1 << 40
        aborting = in_thread(lambda: sender.abort("x" * 1000))
        with pytest.raises(PeerError, match="in the middle of a message"):
            receiver.receive(5000, bits=64)
        receiver.close()
        aborting.result()


def test_a_side_that_stops_reads_on_until_the_peer_closes(monkeypatch):
    monkeypatch.setattr("crypten_espn.wire.stream.LINGER_S", 30.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        mine = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
    with mine, Channel(other, role="server", peer_roles=("client",)) as server:
        aborting = in_thread(lambda: server.abort("no"))
        mine.settimeout(20)
        mine.sendall(bytes(16 << 20))  # no kernel keeps so much
        assert mine.recv(100)[-2:] == b"no"
        assert mine.recv(100) == b""
        mine.close()
        aborting.result()


def test_abort_from_another_thread_cuts_the_message_under_way(connected):
    server, client = connected(timeout=20)
    other = in_thread(lambda: client.send(LARGE, bits=64))
    server.wait(timeout=None, rings={LARGE.nbytes})
    client.abort("going down")
    with pytest.raises(PeerError, match="Lost the client: it closed the connection"):
        server.receive(LARGE.size, bits=64)
    server.close()
    with pytest.raises(PeerError, match="closed on this side"):
        other.result()


def test_abort_from_another_thread_reaches_an_idle_peer(connected):
    server, client = connected(timeout=20)
    other = in_thread(lambda: server.wait(timeout=None, limit=10))
    client.send_bytes(b"known")  # then the server's thread is in wait()
    assert not other.result().is_ring
    server.receive_bytes()
    other = in_thread(lambda: server.wait(timeout=None, limit=10))
    server.abort("going down")
    with pytest.raises(PeerError, match="stopped: going down"), client:
        client.receive_bytes()
    with pytest.raises(PeerError, match="closed"):
        other.result()


def test_close_from_another_thread_ends_a_wait(connected):
    server, client = connected(timeout=20)
    other = in_thread(lambda: server.wait(timeout=None, limit=10))
    server.close()
    with pytest.raises(PeerError, match=r"closed|Lost"):
        other.result()
    with pytest.raises(PeerError, match="Lost the server"):
        client.receive_bytes()


def test_a_peer_that_only_sends_costs_bounded_memory_and_time():
    mine, other = socket.socketpair()
    sent = 0
    header = struct.pack("<4sHHIQ", b"ESPN", PROTOCOL_VERSION, 1, 0, 1 << 20)
    message = memoryview(header + b"x" * 2**20)

    def send():
        nonlocal sent
        with contextlib.suppress(OSError):
            while True:
                sent += mine.send(message[sent % len(message) :])

    thread = threading.Thread(target=send)
    thread.start()
    with (
        Channel(other, role="server", peer_roles=("client",), timeout=0.5) as channel,
        pytest.raises(PeerError, match="silent"),
    ):
        channel.send(LARGE, bits=64)
    thread.join(20)
    mine.close()
    assert not thread.is_alive()
    assert INBOX_BYTES <= sent < INBOX_BYTES + (8 << 20)


def test_a_peer_that_trickles_is_dropped():
    mine, other = socket.socketpair()
    size, sent, ended = 1 << 20, 0, threading.Event()

    def trickle():
        nonlocal sent
        mine.sendall(struct.pack("<4sHHIQ", b"ESPN", PROTOCOL_VERSION, 1, 0, size))
        with contextlib.suppress(OSError):
            while sent < size and not ended.wait(0.01):
                sent += mine.send(b"x")

    thread = threading.Thread(target=trickle)
    with Channel(other, role="server", peer_roles=("client",), timeout=0.5) as channel:
        thread.start()
        with pytest.raises(PeerError, match=r"too slow|silent"):
            channel.receive(size // 8, bits=64)
    ended.set()
    thread.join(20)
    mine.close()
    assert sent < size


def test_deadlines_hold_for_a_message_and_not_for_a_byte():
    deadline = Deadline(10.0, idle=60.0, now=0.0)
    assert deadline.left(59.0) == 1.0  # nobody began
    deadline.progress(1, 50.0)
    assert deadline.left(50.0) == pytest.approx(10.0, abs=0.001)
    for second in range(51, 60):
        deadline.progress(1, float(second))
    assert deadline.left(59.0) < 1.001  # whatever trickles in
    assert "too slow: 10 bytes" in str(deadline.missed("the client", 61.0))


def test_a_slow_but_sufficient_peer_is_kept_and_a_silent_one_is_not():
    deadline = Deadline(10.0, idle=10.0, now=0.0)
    for second in range(1000):
        deadline.progress(MINIMUM_RATE, float(second))
        assert deadline.left(float(second)) == 10.0
    assert deadline.left(1009.5) < 0
    assert "silent for 10 s" in str(deadline.missed("the client", 1010.0))


def test_a_silent_peer_is_named(pair):
    left, right = pair(timeout=0.2)
    with pytest.raises(PeerError, match=r"the client was silent for 0\.2 s"):
        left.receive(10, bits=64)
    right.close()
    with pytest.raises(PeerError, match="Lost the client: it closed the connection"):
        left.receive(10, bits=64)
    left.close()
    with pytest.raises(PeerError, match="closed"):
        left.receive(10, bits=64)
