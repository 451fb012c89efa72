"""Parties that are killed, stopped, cut off and restarted, and what came of it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from crypten_espn.keys import make_keys

from ..processes import Process, small_network
from .kinds import faults_of
from .ledger import Ledger
from .namespace import HERE, Link
from .worker import PREPARED, drawn

# Waits that a call of a client is made of, each at most the time-out: to reach the
# server and the dealer, for either's answer, and once more after a lost connection.
WAITS = 6
_CLIENTS = 2
_HEAR_S = 300.0


@dataclasses.dataclass
class Report:
    """What was done and what came of it.

    Args:
        answers, wrong: answers of clients, and those that were not the network's.
        faults_done: each fault, and after how many answers.
        failures: what clients met instead of answers, by call and kind.
        slowest_s: the longest call by what it was, answered or not.
        timeout_s: of every party.
        used, burnt: material numbers claimed by the server, and not answered.
        sessions: of the clients.
        problems: why it does not hold.
        seconds: of the whole run.
    """

    answers: int = 0
    wrong: int = 0
    faults_done: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    failures: dict[str, int] = dataclasses.field(default_factory=dict)
    slowest_s: dict[str, float] = dataclasses.field(default_factory=dict)
    timeout_s: float = 0.0
    used: int = 0
    burnt: int = 0
    sessions: int = 0
    problems: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0


class Party:
    """A process that has several lives, each with a log of its own.

    Args:
        name: of it, and of the folder of its logs.
        start: starts it, given the folder for its log.
    """

    def __init__(
        self, name: str, folder: Path, start: Callable[[Path], int], log: str
    ) -> None:
        self.name, self._folder, self._start, self._log = name, folder, start, log
        self._lives = itertools.count()
        self.logs: list[Path] = []
        self.pid = 0

    def start(self) -> None:
        folder = self._folder / f"{self.name}-{next(self._lives)}"
        folder.mkdir()
        self.logs.append(folder / self._log)
        self.pid = self._start(folder)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)


class Run:
    """One run in a folder; see the module."""

    def __init__(
        self, folder: Path, *, inferences: int, timeout: float, link: Link | None
    ) -> None:
        self.folder, self.inferences, self.timeout = folder, inferences, timeout
        self.link = link
        self.network = small_network(folder)
        host = "127.0.0.1" if link is None else HERE
        clients = [f"client{number}" for number in range(_CLIENTS)]
        keys = make_keys(
            folder / "keys", servers=[host], dealers=[host], clients=clients
        )
        files = [[str(k.certificate), str(k.key), str(k.authority)] for k in keys]
        self._tls = dict(zip(["serve", "deal", *clients], files, strict=True))
        self._hosts: dict[str, Process] = {}
        self._workers: dict[str, subprocess.Popen[str]] = {}
        self._addresses = {"deal": _free(host), "serve": _free(host)}
        self._lines: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue()
        share = -(-inferences // _CLIENTS)
        self._next = {name: i * share for i, name in enumerate(clients)}
        stops = [min(inferences, (i + 1) * share) for i in range(_CLIENTS)]
        self._stops = dict(zip(clients, stops, strict=True))
        self._starts = dict(self._next)
        self._limits = dict(self._next)
        self._report = Report(timeout_s=timeout)
        self._answered: set[int] = set()
        self._doing: set[str] = set()
        self._part = 0.0
        self.parties = {
            name: Party(name, folder, partial(self._host, name), f"{name}.log")
            for name in ("deal", "serve")
        }
        for name in clients:
            self.parties[name] = Party(name, folder, partial(self._worker, name), "log")

    def _host(self, name: str, place: Path) -> int:
        options = ["--log-json", "--timeout", str(self.timeout)]
        options += ["--limit", "waiting_s=5", "--limit", "grace_s=5"]
        options += ["--tls", *self._tls[name]]
        if name == "serve":
            options += ["--dealer", self._addresses["deal"]]
            options += ["--calibration", str(self.folder / "calibration.npy")]
            options += ["--material", str(self.folder / "served")]
            options += ["--quota", "1000000"]
            options.insert(0, str(self.folder / "network.onnx"))
        options.insert(1 if name == "serve" else 0, self._addresses[name])
        self._hosts[name] = Process(name, options, place)
        return self._hosts[name].pid

    def _worker(self, name: str, place: Path) -> int:
        told = {
            "server": self._addresses["serve"],
            "dealer": self._addresses["deal"],
            "folder": str(self.folder / f"{name}-material"),
            "tls": self._tls[name],
            "timeout": self.timeout,
            "start": self._next[name],
            "stop": self._stops[name],
            "limit": self._limits[name],
        }
        inside = [] if self.link is None else self.link.command
        with open(place / "log", "wb") as log:
            worker = subprocess.Popen(
                [
                    *(*inside, sys.executable, "-m", "benchmarks.faults.worker"),
                    json.dumps(told),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._workers[name] = worker
        threading.Thread(target=self._listen, args=(name, worker), daemon=True).start()
        return worker.pid

    def _listen(self, name: str, worker: subprocess.Popen[str]) -> None:
        assert worker.stdout is not None
        with worker.stdout:
            for text in worker.stdout:
                with suppress(ValueError):  # a line that a kill has cut
                    self._lines.put((name, json.loads(text)))

    def restart(self, name: str) -> None:
        """Ask a host to stop, and start it again."""
        status = self._hosts[name].end()
        if status != 0:
            raise RuntimeError(f"{name} ended with status {status}")
        self.parties[name].start()

    def kill(self, name: str) -> None:
        """End a party without a word; it is started again apart."""
        self.parties[name].signal(signal.SIGKILL)
        self._reap(name)

    def heard(self, doing: str) -> None:
        """Wait until a client is about to prepare, or has just prepared."""
        while not self._lines.empty():
            self._note(*self._lines.get())
        self._doing.discard(doing)
        for _ in range(round(_HEAR_S)):
            end = time.monotonic() + 1.0
            while (left := end - time.monotonic()) > 0:
                with suppress(queue.Empty):
                    self._note(*self._lines.get(timeout=left))
                if doing in self._doing:
                    return
            self._allow(self._part + PREPARED / self.inferences)
        raise RuntimeError(f"no client was {doing} within {_HEAR_S:g} s")

    def _reap(self, name: str) -> None:
        if name in self._hosts:
            self._hosts[name].end()
        else:
            _end(self._workers[name])

    def go(self, faults: int, progress: Callable[[str], None]) -> Report:
        """Start everybody, spread the faults over the run, and look at the logs."""
        report, began = self._report, time.monotonic()
        try:
            with ThreadPoolExecutor() as pool:
                list(pool.map(Party.start, self.parties.values()))
            planned = itertools.islice(itertools.cycle(faults_of(self)), faults)
            for number, (what, act) in enumerate(planned, start=1):
                # Half of the answers up to the next fault are still to come.
                self._allow(number / (faults + 1))
                answers = int((number - 0.5) * self.inferences / (faults + 1))
                self._take(answers)
                progress(f"{report.answers} answers: {what}")
                report.faults_done.append((report.answers, what))
                act()
            self._allow(1.0)
            self._take(self.inferences)
            statuses = {name: host.end() for name, host in self._hosts.items()}
        finally:
            for worker in self._workers.values():
                _end(worker)
            for host in self._hosts.values():
                host.end()
        report.seconds = time.monotonic() - began
        report.problems += [
            f"{name} ended with status {status}"
            for name, status in statuses.items()
            if status != 0
        ]
        self._judge()
        return report

    def _allow(self, part: float) -> None:
        """Let every client ask for this part of its numbers."""
        self._part = part = min(1.0, max(part, self._part))
        for name, worker in self._workers.items():
            start, stop = self._starts[name], self._stops[name]
            self._limits[name] = start + round(part * (stop - start))
            assert worker.stdin is not None
            with suppress(OSError):  # it has just ended
                worker.stdin.write(f"{self._limits[name]}\n")
                worker.stdin.flush()

    def _take(self, answers: int) -> None:
        """Hear what clients say until so many answers have come."""
        while self._report.answers < answers:
            self._note(*self._lines.get(timeout=_HEAR_S + 20 * self.timeout))

    def _note(self, name: str, line: dict[str, Any]) -> None:
        """What one client says."""
        report = self._report
        if "doing" in line:
            self._doing.add(line["doing"])
        if "logits" in line:
            self._answered.add(line["number"])
            report.answers = len(self._answered)
            self._next[name] = line["number"] + 1
            right = self.network(drawn(line["number"])).flatten()
            error = (torch.tensor(line["logits"]) - right).abs().max()
            report.wrong += float(error) > 0.05
        elif "failed" in line:
            what = f"{line['failed']}: {line['kind']}"
            report.failures[what] = report.failures.get(what, 0) + 1
        if "seconds" in line:
            doing = line.get("failed", "predict")
            slowest = max(report.slowest_s.get(doing, 0.0), line["seconds"])
            report.slowest_s[doing] = slowest

    def _judge(self) -> None:
        report = self._report
        clients = [party for name, party in self.parties.items() if "client" in name]
        ledger = Ledger(
            {
                "serve": self.parties["serve"].logs,
                "deal": self.parties["deal"].logs,
                "client": [log for party in clients for log in party.logs],
            }
        )
        uses = ledger.uses("serve")
        report.used = len(uses)
        report.burnt = len(uses) - len(ledger.uses("client", "inference"))
        report.sessions = len({session for session, _ in uses})
        report.problems += ledger.faults
        if report.wrong:
            report.problems.append(f"{report.wrong} wrong answers")
        # A stopped client's own clock goes on while it is stopped.
        most = (WAITS + 1.5) * self.timeout
        for doing, seconds in report.slowest_s.items():
            if seconds > most:
                report.problems.append(f"a call to {doing} took {seconds:.1f} s")
        foreign = Counter({k: n for k, n in report.failures.items() if "foreign" in k})
        report.problems += [f"{kind}, {n} times" for kind, n in foreign.items()]
        day = json.loads((self.folder / "served" / "quota.json").read_text())
        if sum(day["used"].values()) < report.answers:
            report.problems.append(f"the quota counts {day['used']}")


def _end(worker: subprocess.Popen[str]) -> None:
    worker.kill()
    worker.wait()
    if worker.stdin is not None:
        with suppress(OSError):
            worker.stdin.close()


def _free(host: str) -> str:
    """An address where nobody listens."""
    with socket.create_server((host, 0)) as taken:
        return f"{host}:{taken.getsockname()[1]}"
