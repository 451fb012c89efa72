"""Strangers by the thousand, an honest client beside them, and what is left."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from crypten_espn.errors import EspnError
from crypten_espn.serving.client import connect
from crypten_espn.serving.link import Link

from ..processes import SHAPE, Process, Usage, running
from .strangers import ATTACKS, attack

_SETTLE_S = 60.0


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
        inputs = torch.randn(1, *SHAPE)
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
