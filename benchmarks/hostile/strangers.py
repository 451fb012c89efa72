"""What strangers do to a server or a dealer, and how each connection ends."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import struct
import time
from collections.abc import Callable

from crypten_espn.wire.connect import parse_address
from crypten_espn.wire.frames import PROTOCOL_VERSION, Kind, frame, hello
from tests.serving.fuzz import NAME, mutated

_PATIENCE_S = 20.0  # an answer must have come by then


Attack = Callable[[socket.socket, str, random.Random], str]


def _ended(sock: socket.socket) -> str:
    """How the other side answers: by a reason, by closing, by words, or not at all."""
    heard = b""
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        sock.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            piece = sock.recv(1 << 16)
        except TimeoutError:
            break
        except OSError:
            piece = b""
        if not piece:
            return "reason" if _has_reason(heard) else "closed"
        heard += piece
        if _has_reason(heard):
            return "reason"
    return "answer" if len(heard) > 68 else "silent"


def _has_reason(heard: bytes) -> bool:
    """Whether one of the messages that were heard is a reason to stop."""
    start = 0
    while len(heard) >= start + 20:
        _, _, kind, _, size = struct.unpack_from("<4sHHIQ", heard, start)
        if kind == Kind.ABORT:
            return True
        start += 20 + size
    return False


def _say(sock: socket.socket, kind: Kind, data: bytes, *, tag: int = 0) -> None:
    with contextlib.suppress(OSError):
        sock.sendall(b"".join(frame(kind, tag, [memoryview(data)])))


def _greet(sock: socket.socket, role: str) -> None:
    with contextlib.suppress(OSError):
        sock.sendall(b"".join(frame(Kind.HELLO, 0, [hello(role, bytes(32))])))


def _greeting(target: str, draws: random.Random) -> str:
    return "client" if target == "serve" else draws.choice(("client", "server"))


def silence(sock: socket.socket, target: str, draws: random.Random) -> str:
    """Say nothing, for a while or until the other side has enough."""
    if draws.random() < 0.02:
        return _ended(sock)
    time.sleep(draws.random() * 0.05)
    return "left"


def half_a_greeting(sock: socket.socket, target: str, draws: random.Random) -> str:
    """Stop in the middle of the first message, and leave or wait."""
    whole = b"".join(frame(Kind.HELLO, 0, [hello("client", bytes(32))]))
    sock.sendall(whole[: draws.randrange(1, len(whole))])
    return _ended(sock) if draws.random() < 0.02 else "left"


def mutated_message(sock: socket.socket, target: str, draws: random.Random) -> str:
    """Greet well, then say something that nearly is a message."""
    _greet(sock, _greeting(target, draws))
    (data,) = mutated(1, seed=draws.getrandbits(63))
    _say(sock, Kind.BYTES, data, tag=draws.choice((0, 0, 0, 1, 2**32 - 1)))
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_WR)  # whoever waits for more learns there is none
    return _ended(sock)


def mutated_frame(sock: socket.socket, target: str, draws: random.Random) -> str:
    """A frame whose header was changed."""
    _greet(sock, _greeting(target, draws))
    data = bytearray(b"".join(frame(Kind.BYTES, 0, [memoryview(b'{"message":"x"}')])))
    for _ in range(draws.randint(1, 4)):
        data[draws.randrange(20)] = draws.randrange(256)
    with contextlib.suppress(OSError):
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
    return _ended(sock)


def wrong_role(sock: socket.socket, target: str, draws: random.Random) -> str:
    """Greet as who may not come here, or as nobody known."""
    known = ["dealer", "server"] if target == "serve" else ["dealer"]
    with contextlib.suppress(OSError):
        role = draws.choice([*known, "nobody"])
        greeting = role.encode().ljust(16, b"\0") + bytes(32)
        sock.sendall(b"".join(frame(Kind.HELLO, 0, [memoryview(greeting)])))
    return _ended(sock)


def close_at_once(sock: socket.socket, target: str, draws: random.Random) -> str:
    """Leave, by a reset as often as not."""
    if draws.random() < 0.5:
        linger = struct.pack("ii", 1, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    return "left"


def trickle(sock: socket.socket, target: str, draws: random.Random) -> str:
    """A byte now and then; mostly leave soon, sometimes see how long it lasts."""
    patient = draws.random() < 0.02
    whole = b"".join(frame(Kind.HELLO, 0, [hello("client", bytes(32))]))
    for byte in whole[: 60 if patient else 5]:
        try:
            sock.send(bytes([byte]))
        except OSError:
            break
        time.sleep(0.2 if patient else 0.01)
    return _ended(sock) if patient else "left"


def huge_numbers(sock: socket.socket, target: str, draws: random.Random) -> str:
    """Ask for more than there is: inferences, inputs, indices, bytes."""
    _greet(sock, "client" if target == "serve" else "server")
    huge = draws.choice((10**9, 2**32, 2**63, 10**30))
    if target == "serve":
        first = {"message": "hello", "session": None, "next_index": 0}
        _say(sock, Kind.BYTES, json.dumps(first).encode())
        kind = draws.choice((Kind.BYTES, Kind.RING, Kind.HELLO))
    else:
        kind = draws.choice((Kind.BYTES, Kind.RING))
    if draws.random() < 0.5:
        wish = {"message": "prepare", "session": NAME, "start": huge, "count": huge}
        _say(sock, Kind.BYTES, json.dumps(wish | {"batch": huge}).encode())
    else:
        header = struct.pack(
            "<4sHHIQ", b"ESPN", PROTOCOL_VERSION, kind, 2**32 - 1, 2**60
        )
        with contextlib.suppress(OSError):
            sock.sendall(header)
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_WR)
    return _ended(sock)


def another_protocol(sock: socket.socket, target: str, draws: random.Random) -> str:
    """Speak HTTP, TLS, or noise."""
    said = draws.choice(
        (
            b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" + b" " * 64,
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(128),
            draws.randbytes(200),
        )
    )
    with contextlib.suppress(OSError):
        sock.sendall(said)
    return _ended(sock)


ATTACKS: tuple[Attack, ...] = (
    silence,
    half_a_greeting,
    mutated_message,
    mutated_frame,
    wrong_role,
    close_at_once,
    trickle,
    huge_numbers,
    another_protocol,
)


def attack(number: int, seed: int, addresses: dict[str, str]) -> tuple[str, str]:
    """Connection `number`: which kind it was and how it ended."""
    draws = random.Random(seed * 1_000_003 + number)
    kind = ATTACKS[number % len(ATTACKS)]
    target = draws.choice(sorted(addresses))
    name = kind.__name__.replace("_", " ")
    try:
        with socket.create_connection(parse_address(addresses[target]), 30) as sock:
            return name, kind(sock, target, draws)
    except TimeoutError:
        return name, "silent"
    except OSError:
        return name, "closed"
