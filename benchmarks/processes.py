"""Real `crypten-espn serve` and `deal` processes, and what they hold."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from crypten_espn.graph.trace import export
from crypten_espn.pillar.surgery import PolynomialActivation
from crypten_espn.polynomial import Polynomial

SHAPE = (1, 6, 6)
_ESTABLISHED = "01"  # as /proc/net/tcp has it
_MEMORY = 48 << 20  # what a process may keep: buffers of threads, the allocator's pools


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a process holds."""

    memory: int
    descriptors: int
    threads: int

    @classmethod
    def of(cls, pid: int | str) -> Usage:
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


def peak_memory(pid: int | str = "self") -> int:
    """The most bytes that a process ever had in memory."""
    for line in (Path("/proc") / str(pid) / "status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0  # a kernel thread, or one that has just ended


class Process:
    """A command of ours with its output and its log.

    Args:
        name: serve or deal.
        arguments: after the name.
        folder: where its log goes.
        threads: of torch; as the environment says if None.

    Attributes:
        address: where it listens.
        admin: where it tells its health; empty if it does not.
    """

    admin = ""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        folder: Path,
        *,
        threads: int | None = None,
    ) -> None:
        self.name, self.log = name, folder / f"{name}.log"
        own = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
        with open(self.log, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "crypten_espn.cli", name, *arguments],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **own},
            )
        self.pid = self._process.pid
        self.address = self._await_address()

    def _await_address(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if "http://" in line:
                self.admin = line.split("http://")[1].strip()
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
        return self.wait()

    def wait(self) -> int:
        """Its status, once it has ended by itself."""
        try:
            return self._process.wait(60)
        finally:
            self._process.kill()
            self._process.wait()
            out: IO[str] | None = self._process.stdout
            if out is not None:
                out.close()

    def events(self, name: str) -> list[dict[str, Any]]:
        """Its events of that name so far, if it was told --log-json."""
        lines = self.log.read_text().splitlines(keepends=True)
        told = [one for one in lines if one.startswith("{") and one.endswith("\n")]
        return [event for event in map(json.loads, told) if event["event"] == name]

    def foreign(self) -> list[str]:
        """Lines of its log that tell of an error that is not the package's own."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [
            line for line in lines if " WARNING " not in line and " INFO " not in line
        ]


def connected(process: Process) -> dict[int, int]:
    """Connections to where it listens, by the process of it that holds them."""
    port = int(process.address.rpartition(":")[2])
    held: dict[int, int] = {}
    with open("/proc/net/tcp") as table:
        lines = [line.split() for line in table][1:]
    inodes = {
        f"socket:[{line[9]}]"
        for line in lines
        if line[3] == _ESTABLISHED and int(line[1].rpartition(":")[2], 16) == port
    }
    for pid in family(process.pid):
        with contextlib.suppress(OSError):  # it has just ended
            files = (Path("/proc") / str(pid) / "fd").iterdir()
            count = sum(os.readlink(file) in inodes for file in files)
            if count:
                held[pid] = count
    return held


def family(pid: int) -> list[int]:
    """A process and all that it and its children started, the living ones."""
    children: dict[int, list[int]] = {}
    for place in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            fields = (place / "stat").read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(place.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def small_network(folder: Path) -> torch.nn.Module:
    """The same network every time, as network.onnx with calibration.npy in a folder."""
    torch.manual_seed(0)
    square = Polynomial((0, 512, 256), 10, (-3.0, 3.0))
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1),
        PolynomialActivation(square),
        torch.nn.Flatten(),
        torch.nn.Linear(144, 3),
    ).eval()
    network.requires_grad_(False)
    inputs = torch.randn(16, *SHAPE)
    (folder / "network.onnx").write_bytes(export(network, inputs[:1]))
    np.save(folder / "calibration.npy", inputs.numpy())
    return network


@contextlib.contextmanager
def running(folder: Path) -> Iterator[tuple[Process, Process, torch.nn.Module]]:
    """A dealer and a server of a small network, until the end of the block."""
    network = small_network(folder)
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
