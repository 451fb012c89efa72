"""Frames that were mutated: a receiving channel raises PeerError and nothing else."""

from __future__ import annotations

import random
import resource
import socket
import struct
from collections.abc import Callable, Iterator

import numpy as np

from crypten_espn.errors import PeerError, PlanMismatchError
from crypten_espn.wire.channel import Channel
from crypten_espn.wire.frames import PROTOCOL_VERSION

HEADER = struct.Struct("<4sHHIQ")
DIGEST = bytes(range(32))
LIMIT = 1 << 12  # what a receiver here accepts at most
EDGES = (0, 1, 2, 3, 4, 5, 20, 48, 255, 2**16 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)


def messages(rng: random.Random) -> Iterator[bytes]:
    """Well-formed messages, one to four."""
    for _ in range(rng.randint(1, 4)):
        kind = rng.randint(1, 4)
        payload = {
            1: bytes(rng.getrandbits(8) for _ in range(24)),
            2: b'{"do": "prepare"}'[: rng.randint(0, 17)],
            3: rng.choice([b"server", b"client", b"dealer"]).ljust(16, b"\0") + DIGEST,
            4: b"Lost the dealer \x1b[2J\n"[: rng.randint(0, 20)],
        }[kind]
        yield (
            HEADER.pack(
                b"ESPN", PROTOCOL_VERSION, kind, rng.choice([0, 0, 7]), len(payload)
            )
            + payload
        )


def mutated(rng: random.Random) -> bytes:
    """A stream of messages with up to three faults."""
    data = bytearray(b"".join(messages(rng)))
    for _ in range(rng.randint(0, 3)):
        at = rng.randrange(len(data)) if data else 0
        how = rng.randrange(6)
        if how == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            del data[at : at + rng.randint(1, 40)]
        elif how == 2:
            data[at:at] = bytes(rng.getrandbits(8) for _ in range(rng.randint(1, 40)))
        elif how == 3 and len(data) >= 20:  # a size of the first header
            data[12:20] = struct.pack("<Q", rng.choice(EDGES))
        elif how == 4 and len(data) >= 20:  # another of its fields
            start, form = rng.choice([(4, "<H"), (6, "<H"), (8, "<I")])
            value = rng.choice(EDGES) % (1 << 8 * struct.calcsize(form))
            struct.pack_into(form, data, start, value)
        else:
            del data[at:]
    return bytes(data)


READERS: list[Callable[[Channel], object]] = [
    lambda channel: channel.receive(3, bits=64),
    lambda channel: channel.receive_parts([(5, 13), (2, 64)]),
    lambda channel: channel.receive_bytes(limit=LIMIT),
    lambda channel: channel.exchange(np.arange(3), bits=64),
    lambda channel: channel.handshake(digest=DIGEST),
    lambda channel: channel.wait(timeout=None, rings={24}, limit=LIMIT),
]


def fuzz_frames(inputs: int, *, seed: int) -> dict[str, int]:
    """Give mutated streams to receiving channels.

    Args:
        inputs: how many streams.
        seed: of what is tried.

    Returns: how many streams ended in a refusal, and how many messages were read.
    """
    rng = random.Random(seed)
    found = {"refused": 0, "read": 0}
    for _ in range(inputs):
        mine, other = socket.socketpair()
        with (
            mine,
            Channel(other, role="server", peer_roles=("client",), timeout=5) as channel,
        ):
            mine.sendall(mutated(rng))
            mine.shutdown(socket.SHUT_WR)
            try:
                while True:
                    rng.choice(READERS)(channel)
                    found["read"] += 1
            except PlanMismatchError as error:
                assert str(error).isprintable()
                found["refused"] += 1
            except PeerError as error:
                assert str(error).isprintable() and len(str(error)) < 1200
                found["refused"] += 1
    return found


def test_mutated_frames_end_in_an_error_of_ours_and_cost_no_memory():
    fuzz_frames(50, seed=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = fuzz_frames(2000, seed=2)
    assert found["refused"] == 2000 and found["read"] > 200
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 32 << 10  # KiB
