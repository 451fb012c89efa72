"""One-byte exchanges and a bulk transfer over a path: what TCP makes of it."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import socket
import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .profile import PathError
from .system import worker

if TYPE_CHECKING:
    from .path import Path


def free_port() -> int:
    """A TCP port that nobody listens on at the moment."""
    with socket.socket() as handle:
        handle.bind(("127.0.0.1", 0))
        return handle.getsockname()[1]


def _connect(address: str, port: int) -> socket.socket:
    deadline = time.monotonic() + 30
    while True:
        try:
            handle = socket.create_connection((address, port), timeout=30)
            break
        except OSError as error:
            late = time.monotonic() > deadline
            if late or error.errno not in (errno.ECONNREFUSED, errno.ETIMEDOUT):
                raise
            time.sleep(0.02)
    handle.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return handle


def _accept(address: str, port: int) -> socket.socket:
    with socket.create_server((address, port)) as listener:
        listener.settimeout(30)
        handle, _ = listener.accept()
    handle.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return handle


def _receive_rate(handle: socket.socket, warm_up: float, seconds: float) -> float:
    """Payload bytes per second received once `warm_up` seconds have passed."""
    handle.settimeout(30)
    start = time.monotonic() + warm_up
    received, first, last = 0, 0.0, 0.0
    while True:
        size = len(handle.recv(1 << 20))
        last = time.monotonic()
        if size == 0:
            raise PathError("the sender closed the connection early")
        if last < start:
            continue
        if first == 0.0:
            first = last  # the clock starts with bytes that are then not counted
            continue
        received += size
        if last - first > seconds:
            return received / (last - first)


def probe_main(role: str, address: str, port: int, amount: float) -> int:
    """One end of the self-test; prints a line of JSON."""
    if role == "echo-server":
        with _accept(address, port) as handle:
            while data := handle.recv(64):
                handle.sendall(data)
    elif role == "echo":
        trips = []
        with _connect(address, port) as handle:
            for _ in range(int(amount)):
                start = time.perf_counter()
                handle.sendall(b"x")
                handle.recv(1)
                trips.append(time.perf_counter() - start)
        trips = trips[len(trips) // 10 :]
        figures = _Trip(statistics.median(trips), min(trips), max(trips))
        print(json.dumps(dataclasses.asdict(figures)))
    elif role == "sink":
        with _accept(address, port) as handle:
            rate = _receive_rate(handle, amount / 2, amount)
            print(json.dumps({"bytes_per_s": rate}))
    elif role == "source":
        block = bytes(1 << 20)
        with _connect(address, port) as handle, contextlib.suppress(OSError):
            while True:
                handle.sendall(block)
    return 0


def probe(
    path: Path, roles: Sequence[str], amount: float, timeout: float
) -> dict[str, float]:
    """Run the self-test's server and client roles over `path`; their figures."""
    where = (path.addresses[0], free_port(), amount)
    commands = [worker("probe", role, *where) for role in roles]
    results = path.run(commands, timeout=timeout)
    return json.loads("".join(result.stdout for result in results))


@dataclasses.dataclass(frozen=True)
class _Trip:
    """Seconds of one-byte exchanges."""

    median_s: float
    min_s: float
    max_s: float


def exchange(path: Path, trips: int) -> _Trip:
    """Seconds of `trips` one-byte exchanges over `path`; the first tenth is dropped."""
    timeout = 60 + trips * path.profile.rtt_ms / 1e3
    return _Trip(**probe(path, ("echo-server", "echo"), trips, timeout))
