"""The direct channel: packing, simultaneous sends, dead peers, hostile bytes, TLS."""

from __future__ import annotations

import datetime
import hashlib
import socket
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crypten_espn.errors import PeerError, PlanMismatchError
from crypten_espn.wire.channel import Channel, socket_pair
from crypten_espn.wire.connect import Listener, connect_channel, parse_address
from crypten_espn.wire.packing import pack, packed_bytes, unpack
from crypten_espn.wire.tls import TLS

DIGEST = hashlib.sha256(b"a plan").digest()


def in_thread(function, *arguments):
    """Run a function beside the test; `.result()` joins and re-raises."""
    box = {}

    def run():
        try:
            box["value"] = function(*arguments)
        except BaseException as error:
            box["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def result():
        thread.join(20)
        assert not thread.is_alive()
        if "error" in box:
            raise box["error"]
        return box["value"]

    return SimpleNamespace(result=result)


@settings(max_examples=80, deadline=None)
@given(bits=st.integers(1, 64), count=st.integers(0, 200), seed=st.integers(0, 2**31))
def test_pack_is_exact_and_tight(bits, count, seed):
    words = np.random.default_rng(seed).bytes(8 * count)
    values = np.frombuffer(words, dtype=np.int64)
    packed = bytes(pack(values, bits=bits))
    assert len(packed) == packed_bytes(count, bits)
    # Oracle: one Python integer, little-endian.
    mask = (1 << bits) - 1
    number = sum((int(v) & mask) << (i * bits) for i, v in enumerate(values))
    assert packed == number.to_bytes(packed_bytes(count, bits), "little")
    back = unpack(packed, count, bits=bits)
    assert [int(v) & mask for v in back] == [int(v) & mask for v in values]


@pytest.fixture
def pair():
    """Make connected channels; close them when the test ends."""
    made: list[Channel] = []

    def make(timeout):
        made.extend(socket_pair(timeout=timeout))
        return made[-2:]

    yield make
    for channel in made:
        channel.close()


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


def test_silent_peer_is_an_error_within_the_timeout(pair):
    left, right = pair(timeout=0.3)
    start = time.monotonic()
    with pytest.raises(PeerError, match="silent"):
        left.receive(10, bits=64)
    assert time.monotonic() - start < 2
    right.close()
    with pytest.raises(PeerError, match="Lost"):
        left.receive(10, bits=64)


def test_peer_that_stops_reading_is_an_error(pair):
    left, right = pair(timeout=0.3)
    with pytest.raises(PeerError, match="silent"):
        left.send(np.zeros(4_000_000, dtype=np.int64), bits=64)
    right.close()


def test_abort_reason_reaches_the_peer(pair):
    left, right = pair(timeout=2)
    right.abort("material is exhausted")
    with pytest.raises(PeerError, match="material is exhausted"):
        left.receive(4, bits=64)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"GET / HTTP/1.1\r\nHost: here\r\n\r\n", "protocol"),
        (b"ESPN\x09\x00\x01\x00" + b"\0" * 12, "version"),
        (b"ESPN\x01\x00\x01\x00\0\0\0\0" + (1 << 60).to_bytes(8, "little"), "step"),
        (b"ESPN\x01\x00\x01\x00\x07\0\0\0" + (32).to_bytes(8, "little"), "tag 7"),
        (b"ESPN\x01\x00\x02\x00\0\0\0\0" + (32).to_bytes(8, "little"), "kind 2"),
    ],
)
def test_foreign_bytes_are_refused_before_use(data, message):
    raw, other = socket.socketpair()
    channel = Channel(other, timeout=1)
    raw.sendall(data)
    with pytest.raises(PeerError, match=message):
        channel.receive(4, bits=64)
    raw.close()
    channel.close()


def test_handshake_names_both_plans(pair):
    left, right = pair(timeout=2)
    other = in_thread(lambda: right.handshake(role="rank 1", digest=DIGEST))
    assert left.handshake(role="rank 0", digest=DIGEST) == "rank 1"
    assert other.result() == "rank 0"
    wrong = hashlib.sha256(b"another plan").digest()
    other = in_thread(lambda: right.handshake(role="rank 1", digest=wrong))
    with pytest.raises(PlanMismatchError, match=DIGEST.hex()[:16]) as here:
        left.handshake(role="rank 0", digest=DIGEST)
    assert wrong.hex()[:16] in str(here.value)
    with pytest.raises(PlanMismatchError, match=wrong.hex()[:16]):
        other.result()
    other = in_thread(lambda: right.handshake(role="rank 0", digest=DIGEST))
    with pytest.raises(PeerError, match="Both sides act"):
        left.handshake(role="rank 0", digest=DIGEST)
    with pytest.raises(PeerError):
        other.result()


def test_bytes_messages_have_a_limit(pair):
    left, right = pair(timeout=2)
    right.send_bytes(b"x" * 100)
    assert left.receive_bytes(limit=100) == b"x" * 100
    right.send_bytes(b"x" * 101)
    with pytest.raises(PeerError, match="at most 100 bytes"):
        left.receive_bytes(limit=100)


def test_addresses():
    assert parse_address("[::1]:80") == ("::1", 80)
    assert parse_address("host:29500") == ("host", 29500)
    for bad in ("host", ":80", "host:", "host:99999", "host:x"):
        with pytest.raises(PeerError, match="host:port"):
            parse_address(bad)
    with pytest.raises(PeerError, match="Cannot reach"):
        connect_channel("127.0.0.1:1", timeout=0.2)
    with Listener("127.0.0.1:0") as listener, pytest.raises(PeerError, match="client"):
        listener.accept(timeout=0.1, peer="client")


def certificates(folder, name):
    """A self-signed authority and one certificate it signed, as PEM files."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def build(subject, issuer, key, signer, *, authority):
        def name(text):
            return x509.Name([x509.NameAttribute(x509.OID_COMMON_NAME, text)])

        now = datetime.datetime.now(datetime.timezone.utc)
        return (
            x509.CertificateBuilder()
            .subject_name(name(subject))
            .issuer_name(name(issuer))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(authority, None), critical=True)
            .sign(signer, hashes.SHA256())
        )

    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca = build(name + " ca", name + " ca", ca_key, ca_key, authority=True)
    certificate = build(name, name + " ca", key, ca_key, authority=False)
    paths = [folder / f"{name}.{part}.pem" for part in ("cert", "key", "ca")]
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    paths[2].write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    return paths


def test_tls_is_mutual(tmp_path):
    cert0, key0, ca0 = certificates(tmp_path, "server")
    cert1, key1, ca1 = certificates(tmp_path, "client")
    server = TLS(cert0, key0, ca1)
    client = TLS(cert1, key1, ca0)
    values = np.arange(400_000, dtype=np.int64)
    with Listener("127.0.0.1:0", tls=server) as listener:
        other = in_thread(
            lambda: listener.accept(timeout=5, peer_timeout=5, peer="client")
        )
        here = connect_channel(listener.address, timeout=5, tls=client, peer="server")
        there = other.result()
        other = in_thread(lambda: there.exchange(values, bits=64))
        assert np.array_equal(here.exchange(values + 1, bits=64), values)
        assert np.array_equal(other.result(), values + 1)
        here.close()
        there.close()
        # A certificate from another authority is refused.
        strange = certificates(tmp_path, "stranger")
        stranger = TLS(strange[0], strange[1], ca0)
        other = in_thread(
            lambda: listener.accept(timeout=5, peer_timeout=5, peer="client")
        )
        with (
            pytest.raises(PeerError),
            connect_channel(
                listener.address, timeout=5, tls=stranger, peer="server"
            ) as channel,
        ):
            channel.receive(1, bits=64)
        with pytest.raises(PeerError, match="TLS"):
            other.result()


# ---------------------------------------------------------------- CrypTen over it


def over_direct_channel():
    """Every collective once over gloo and once direct; then a ReLU on both."""
    import crypten
    import torch
    from crypten import communicator as comm

    from crypten_espn.wire.crypten import use_direct_channel

    def collectives(rank):
        c = comm.get()
        torch.manual_seed(rank)
        a, b = torch.randint(-(2**62), 2**62, (2, 3, 5)).unbind()
        bits = torch.tensor([1 + rank], dtype=torch.uint8)
        out = [
            c.all_reduce(a),
            *c.all_reduce([a, b], batched=True),
            c.all_reduce(a, op=torch.distributed.ReduceOp.BXOR),
            c.all_reduce(bits),
            c.reduce(a, 0),
            c.reduce([a, b], 1, batched=True),
            c.broadcast(a.clone(), 1),
            *c.broadcast([a.clone(), b.clone()], 0, batched=True),
            c.gather(a, 0),
            c.all_gather(b),
            c.scatter([a, b] if rank == 0 else None, 0, size=(3, 5)),
        ]
        if rank == 0:
            c.send(b, 1)
        else:
            out.append(c.recv(torch.zeros(3, 5, dtype=torch.long), 0))
        c.barrier()
        out.append(c.broadcast_obj({"k": [1, 2]} if rank == 0 else None, 0))
        return out

    def private():
        torch.manual_seed(3)
        x = torch.randn(2, 7)
        return crypten.cryptensor(x, src=1).relu().get_plain_text()

    rank = comm.get().get_rank()
    before = comm.get()
    plain = collectives(rank), private()
    with use_direct_channel(timeout=20) as channel:
        direct = collectives(rank), private()
        messages, size = channel.messages_sent, channel.bytes_sent
        channel.reset_counters()
        crypten.cryptensor(torch.ones(4), src=0).get_plain_text()
        last = channel.bytes_sent
    restored = comm.get() is before
    return plain, direct, messages, size, last, restored


def same(a, b):
    import torch

    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_crypten_computes_the_same_over_a_direct_channel():
    from crypten_espn import run_parties

    outcomes = run_parties(over_direct_channel, world_size=2, timeout=60)
    for plain, direct, messages, size, last, restored in outcomes:
        assert same(plain[0], direct[0])
        assert float((plain[1] - direct[1]).abs().max()) < 1e-3
        assert messages >= 19 and size > 20 * messages
        assert last == 4 * 8 + 20  # one opening: one message, one header
        assert restored


def test_direct_channel_needs_two_crypten_processes():
    from crypten_espn.wire.crypten import use_direct_channel

    with pytest.raises(PeerError, match=r"crypten\.init"), use_direct_channel():
        pass


def test_pace_is_asked_for_and_never_fails() -> None:
    with Listener("127.0.0.1:0") as listener:
        client = connect_channel(listener.address, timeout=5, peer="rank 0")
        server = listener.accept(timeout=5, peer_timeout=5, peer="rank 1")
        for channel in (client, server):
            channel.pace()
        client.send_bytes(b"x" * 100_000)
        assert server.receive_bytes() == b"x" * 100_000
        client.close()
        server.close()
