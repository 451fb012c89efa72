"""Hostile connections against real `crypten-espn serve` and `deal` processes.

    python -m benchmarks.hostile --connections 10000 --json FILE

Over loopback, without certificates: every attack reaches the parsers. Strangers say
nothing, half a greeting, or something else altogether; they mutate messages, take roles
that are not theirs, send a byte now and then, or ask for numbers without end. An honest
client is served all the while. It holds if

1. both processes live, and their logs hold no error that is not the package's own;
2. every stranger that said something whole got an answer, a reason or a closed
   connection, and none was left waiting;
3. the honest client got right answers only;
4. descriptors, threads and memory are back near where they were;
5. SIGTERM ends both with status 0.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch

from crypten_espn.errors import EspnError
from crypten_espn.graph import export
from crypten_espn.polynomial import Polynomial
from crypten_espn.serving.client import connect
from crypten_espn.serving.link import Link
from crypten_espn.wire.connect import parse_address
from crypten_espn.wire.frames import Kind, frame, hello
from tests.serving.fuzz import NAME, mutated

from .rows import machine, write_atomically
from .tables import columns

_PATIENCE_S = 20.0  # an answer must have come by then
_SETTLE_S = 60.0
_SHAPE = (1, 6, 6)
_MEMORY = 48 << 20  # what a process may keep: buffers of threads, the allocator's pools


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a process holds."""

    memory: int
    descriptors: int
    threads: int

    @classmethod
    def of(cls, pid: int) -> Usage:
        place = Path("/proc") / str(pid)
        fields = dict(
            line.split(":", 1) for line in (place / "status").read_text().splitlines()
        )
        return cls(
            int(fields["VmRSS"].split()[0]) * 1024,
            len(list((place / "fd").iterdir())),
            int(fields["Threads"]),
        )

    def near(self, before: Usage) -> bool:
        """Whether it is back at what it was before."""
        return (
            self.memory <= before.memory + _MEMORY
            and self.descriptors <= before.descriptors
            and self.threads <= before.threads
        )


@dataclasses.dataclass
class Report:
    """What was done and what came of it.

    Args:
        connections: strangers' connections.
        outcomes: by kind of attack, how each ended: "reason", "answer", "closed",
            "left" (the stranger did) or "silent".
        served, wrong: the honest client's answers, and those that were wrong.
        failures: what the honest client met instead of answers.
        slowest_s: its slowest answer, preparation included.
        foreign: lines of the logs that no error of ours explains.
        usage: of each process, before and after.
        statuses: how the processes ended.
        seconds: of all attacks.
    """

    connections: int
    outcomes: dict[str, dict[str, int]]
    served: int
    wrong: int
    failures: list[str]
    slowest_s: float
    foreign: list[str]
    usage: dict[str, tuple[Usage, Usage]]
    statuses: dict[str, int]
    seconds: float

    @property
    def faults(self) -> list[str]:
        """Why it does not hold; empty if it does."""
        silent = sum(kinds.get("silent", 0) for kinds in self.outcomes.values())
        found = [f"{silent} strangers were left without an answer"] if silent else []
        found += [f"the honest client: {text}" for text in self.failures]
        if self.wrong or not self.served:
            found.append(f"{self.wrong} wrong answers of {self.served}")
        found += [f"in a log: {line}" for line in self.foreign]
        for name, (before, after) in self.usage.items():
            if not after.near(before):
                found.append(f"{name} holds {after}, it held {before}")
        for name, status in self.statuses.items():
            if status != 0:
                found.append(f"{name} ended with status {status}")
        return found


# ---------------------------------------------------------------- the processes


class Process:
    """A command of ours with its output and its log.

    Args:
        name: serve or deal.
        arguments: after the name.
        folder: where its log goes.
    """

    def __init__(self, name: str, arguments: Sequence[str], folder: Path) -> None:
        self.name, self.log = name, folder / f"{name}.log"
        with open(self.log, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "crypten_espn.cli", name, *arguments],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.pid = self._process.pid
        self.address = self._await_address()

    def _await_address(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if "; Ctrl-C ends" in line:
                return line.split(";")[0].split()[-1]
        raise RuntimeError(f"{self.name} did not start: {self.log.read_text()[-2000:]}")

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def end(self) -> int:
        """Ask it to stop; its status."""
        if self.alive:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(60)
        finally:
            self._process.kill()
            self._process.wait()
            out: IO[str] | None = self._process.stdout
            if out is not None:
                out.close()

    def foreign(self) -> list[str]:
        """Lines of its log that tell of an error that is not the package's own."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [
            line for line in lines if " WARNING " not in line and " INFO " not in line
        ]


@contextlib.contextmanager
def running(folder: Path) -> Iterator[tuple[Process, Process, torch.nn.Module]]:
    """A dealer and a server of a small network, until the end of the block."""
    torch.manual_seed(0)
    square = Polynomial((0, 512, 256), 10, (-3.0, 3.0))
    from crypten_espn.pillar.surgery import PolynomialActivation

    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1),
        PolynomialActivation(square),
        torch.nn.Flatten(),
        torch.nn.Linear(144, 3),
    ).eval()
    network.requires_grad_(False)
    inputs = torch.randn(16, *_SHAPE)
    (folder / "network.onnx").write_bytes(export(network, inputs[:1]))
    np.save(folder / "calibration.npy", inputs.numpy())
    short = ["--limit", "handshake_s=3", "--limit", "waiting_s=3"]
    dealer = Process("deal", ["127.0.0.1:0", *short], folder)
    try:
        server = Process(
            "serve",
            [
                *(str(folder / "network.onnx"), "127.0.0.1:0", *short),
                *("--dealer", dealer.address),
                *("--calibration", str(folder / "calibration.npy")),
            ],
            folder,
        )
        try:
            yield dealer, server, network
        finally:
            server.end()
    finally:
        dealer.end()


# ---------------------------------------------------------------- the strangers

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
        header = struct.pack("<4sHHIQ", b"ESPN", 2, kind, 2**32 - 1, 2**60)
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


# ---------------------------------------------------------------- all together


class Honest:
    """A client that predicts until it is told to stop, in sessions of five."""

    def __init__(self, address: str, link: Link, network: torch.nn.Module) -> None:
        self._address, self._link, self._network = address, link, network
        self._stop = threading.Event()
        self.served = self.wrong = 0
        self.slowest = 0.0
        self.failures: list[str] = []
        self.thread = threading.Thread(target=self._run)

    def predict(self, times: int) -> None:
        """One session."""
        inputs = torch.randn(1, *_SHAPE)
        with connect(self._address, link=self._link) as client:
            for _ in range(times):
                began = time.monotonic()
                logits = client.predict(inputs)
                self.slowest = max(self.slowest, time.monotonic() - began)
                error = float((logits - self._network(inputs)).abs().max())
                self.served += 1
                self.wrong += error > 0.05

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.predict(5)
            except EspnError as error:
                self.failures.append(f"{type(error).__name__}: {error}")

    def stop(self) -> None:
        self._stop.set()
        self.thread.join()


def run(
    folder: Path,
    *,
    connections: int,
    concurrent: int,
    seed: int,
    limit_s: float,
    progress: Callable[[int], None] = lambda _: None,
) -> Report:
    """Start both processes, attack them, and see what is left.

    Args:
        folder: for files and logs.
        connections: how many strangers.
        concurrent: how many at once.
        seed: of all that is random.
        limit_s: seconds after which no more begin.
        progress: called with the number of those that ended.
    """
    with running(folder) as (dealer, server, network):
        processes = {"deal": dealer, "serve": server}
        addresses = {name: process.address for name, process in processes.items()}
        honest = Honest(server.address, Link(dealer.address), network)
        honest.predict(3)
        for number in range(4 * len(ATTACKS)):  # what a first time allocates
            attack(number, seed + 1, addresses)
        before = _settled(processes, None)
        outcomes: dict[str, Counter[str]] = {}
        numbers = iter(range(connections))
        lock = threading.Lock()
        done = 0
        end = time.monotonic() + limit_s

        def work() -> None:
            nonlocal done
            while time.monotonic() < end:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                name, outcome = attack(number, seed, addresses)
                with lock:
                    outcomes.setdefault(name, Counter())[outcome] += 1
                    done += 1
                    progress(done)

        began = time.monotonic()
        honest.thread.start()
        threads = [threading.Thread(target=work) for _ in range(concurrent)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        honest.stop()
        seconds = time.monotonic() - began
        after = _settled(processes, before)
        statuses = {name: process.end() for name, process in processes.items()}
        return Report(
            done,
            {name: dict(found) for name, found in sorted(outcomes.items())},
            honest.served,
            honest.wrong,
            honest.failures,
            honest.slowest,
            [line for process in processes.values() for line in process.foreign()],
            {name: (before[name], after[name]) for name in processes},
            statuses,
            seconds,
        )


def _settled(
    processes: dict[str, Process], before: dict[str, Usage] | None
) -> dict[str, Usage]:
    """What the processes hold once it no longer shrinks, or is what it was."""
    end = time.monotonic() + _SETTLE_S
    usage = {name: Usage.of(process.pid) for name, process in processes.items()}
    while time.monotonic() < end:
        time.sleep(1.0)
        again = {name: Usage.of(process.pid) for name, process in processes.items()}
        if before is None and again == usage:
            break
        usage = again
        if before is not None and all(usage[n].near(before[n]) for n in usage):
            break
    return usage


def show(report: Report) -> str:
    """The report as tables."""
    endings = ("reason", "closed", "answer", "left", "silent")
    lines = [["attack", "connections", *endings]]
    for name, found in report.outcomes.items():
        counts = [str(found.get(ending, 0)) for ending in endings]
        lines.append([name, str(sum(found.values())), *counts])
    usage = [["process", "memory before", "after", "descriptors", "threads", "status"]]
    for name, (before, after) in report.usage.items():
        usage.append(
            [
                name,
                f"{before.memory / 1e6:.0f} MB",
                f"{after.memory / 1e6:.0f} MB",
                f"{before.descriptors} -> {after.descriptors}",
                f"{before.threads} -> {after.threads}",
                str(report.statuses[name]),
            ]
        )
    verdict = "\n".join(report.faults) or "everything held"
    return (
        f"{columns(lines, left=1)}\n\n{columns(usage, left=1)}\n\n"
        f"{report.connections} connections in {report.seconds:.0f} s; the honest "
        f"client got {report.served} answers, {report.wrong} of them wrong, the "
        f"slowest in {report.slowest_s:.2f} s\n{verdict}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Attack, print the tables, write the JSON; 1 if something did not hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--concurrent", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--limit-s", type=float, default=1800.0, help="seconds after which none begins"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)

    def progress(done: int) -> None:
        if sys.stderr.isatty() and done % 100 == 0:
            print(f"\r{done}/{options.connections}", end="", file=sys.stderr)

    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        report = run(
            Path(folder),
            connections=options.connections,
            concurrent=options.concurrent,
            seed=options.seed,
            limit_s=options.limit_s,
            progress=progress,
        )
    print(show(report))
    if options.json is not None:
        held = {"faults": report.faults, **dataclasses.asdict(report)}
        text = json.dumps({"machine": machine(), "rows": [held]}, indent=1)
        write_atomically(options.json, text + "\n")
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
