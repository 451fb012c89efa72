"""Options in; tables and JSON out."""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from crypten_espn.keys import make_keys
from crypten_espn.serving.client import connect
from crypten_espn.serving.link import Link
from crypten_espn.wire.connect import parse_address
from crypten_espn.wire.tls import TLS

from ..processes import SHAPE, Process, Usage, small_network
from ..rows import machine, write_rows
from ..tables import columns
from . import __doc__ as about

SILENT = 1000
_SETTLE_S = 60.0
_GROWTH = 48 << 20  # bytes above the most of the first part


@dataclasses.dataclass
class Report:
    """What was done and what came of it.

    Args:
        clients, seconds: as asked for.
        workers: processes of the server and of the dealer.
        predictions: answered.
        wrong: of them, not the network's.
        refused: failures of clients, by what they were told.
        percentiles_s: of connect, prepare and predict: median, 90 %, 99 %, most.
        usage: of server and dealer: before, the most in the first part (a minute or a
            third) and in the rest, and after all have left.
        silent_s: what a client beside silent connections waited to be connected, and
            for its first answer.
        problems: why it does not hold.
    """

    clients: int
    seconds: float
    workers: int
    predictions: int = 0
    wrong: int = 0
    refused: dict[str, int] = dataclasses.field(default_factory=dict)
    percentiles_s: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    usage: dict[str, list[Usage]] = dataclasses.field(default_factory=dict)
    silent_s: list[float] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)


def show(report: Report) -> str:
    """The report in tables."""
    waits = [["", "median", "90 %", "99 %", "most"]]
    for what, found in report.percentiles_s.items():
        waits.append([what, *(f"{1e3 * value:.0f} ms" for value in found)])
    usage = [["", "", "before", "first part", "rest", "after"]]
    for name, looks in report.usage.items():
        usage.append([name, "memory", *(f"{u.memory / 1e6:.0f} MB" for u in looks)])
        usage.append(["", "threads", *(str(u.threads) for u in looks)])
        usage.append(["", "descriptors", *(str(u.descriptors) for u in looks)])
    rate = report.predictions / report.seconds
    refused = [f"{n} times {text}" for text, n in report.refused.items()]
    silent = ", ".join(f"{1e3 * value:.0f} ms" for value in report.silent_s)
    lines = [
        columns(waits, left=1),
        "",
        columns(usage, left=2),
        "",
        f"{report.predictions} predictions of {report.clients} clients in "
        f"{report.seconds:g} s: {rate:.1f} a second, {report.wrong} wrong",
        f"beside {SILENT} silent connections, connect and first answer: {silent}",
        *refused,
        *(report.problems or ["everything held"]),
    ]
    return "\n".join(lines)


class Service:
    """A server, a dealer and the certificates of all."""

    def __init__(
        self, folder: Path, stack: ExitStack, workers: int, network: Sequence[str]
    ) -> None:
        host = ["127.0.0.1"]
        keys = make_keys(folder / "keys", servers=host, dealers=host, clients=["load"])
        tls = [[str(k.certificate), str(k.key), str(k.authority)] for k in keys]
        self.files = tls[2]
        more = ["--timeout", "120"]
        if workers > 1:
            more += ["--workers", str(workers)]
        self.dealer = Process("deal", [host[0] + ":0", *more, "--tls", *tls[1]], folder)
        stack.callback(self.dealer.end)
        options = [network[0], host[0] + ":0", *more, "--tls", *tls[0]]
        options += ["--dealer", self.dealer.address, "--calibration", network[1]]
        self.server = Process("serve", options, folder)
        stack.callback(self.server.end)

    @property
    def link(self) -> Link:
        return Link(self.dealer.address, tls=TLS(*self.files), timeout=120)

    def most(self, seconds: float) -> dict[str, Usage]:
        """The most that each process holds within these seconds."""
        found, end = self.usage(), time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(1.0, left))
            for name, usage in self.usage().items():
                old = found[name]
                found[name] = Usage(
                    max(old.memory, usage.memory),
                    max(old.descriptors, usage.descriptors),
                    max(old.threads, usage.threads),
                )
        return found

    def usage(self) -> dict[str, Usage]:
        return {p.name: Usage.of(p.pid) for p in (self.server, self.dealer)}


def load(
    service: Service, report: Report, x: torch.Tensor, right: torch.Tensor
) -> None:
    """Have the clients run, and look at the processes meanwhile."""
    told = {
        "server": service.server.address,
        "dealer": service.dealer.address,
        "tls": service.files,
        "timeout": 120.0,
        "x": x.tolist(),
        "right": right.tolist(),
        "clients": report.clients,
        "seconds": report.seconds,
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.load.clients", json.dumps(told)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    with process:
        process.stdout.readline()
        before = service.usage()
        process.stdin.write("go\n")
        process.stdin.flush()
        first = min(60.0, report.seconds / 3)
        most = [service.most(seconds) for seconds in (first, report.seconds - first)]
        looks = [before, *most]
        found = json.loads(process.stdout.readline())
    end = time.monotonic() + _SETTLE_S
    after = service.usage()
    while time.monotonic() < end and not _settled(before, after):
        time.sleep(1.0)
        after = service.usage()
    looks.append(after)
    report.usage = {name: [look[name] for look in looks] for name in before}
    report.wrong, report.refused = found["wrong"], found["failures"]
    report.predictions = len(found["seconds"].get("predict", ()))
    for what, taken in found["seconds"].items():
        quantiles = [float(np.quantile(taken, part)) for part in (0.5, 0.9, 0.99, 1)]
        report.percentiles_s[what] = quantiles


def _settled(before: dict[str, Usage], after: dict[str, Usage]) -> bool:
    return all(after[name].near(usage) for name, usage in before.items())


def beside_silent_ones(service: Service, report: Report, x: torch.Tensor) -> None:
    """Be served while many connections say nothing."""
    addresses = [service.server.address, service.dealer.address]
    with ExitStack() as stack:
        for place in map(parse_address, addresses):
            for _ in range(SILENT):
                silent = socket.create_connection(place, timeout=20)
                stack.enter_context(silent)
        began = time.perf_counter()
        with connect(service.server.address, link=service.link) as client:
            report.silent_s.append(time.perf_counter() - began)
            client.predict(x)
            report.silent_s.append(time.perf_counter() - began)


def judge(report: Report) -> None:
    """Why it does not hold, if it does not."""
    if report.wrong:
        report.problems.append(f"{report.wrong} wrong answers")
    stated = ("LimitError", "QuotaError", "ClosingError")
    for text, count in report.refused.items():
        if not text.startswith(stated):
            report.problems.append(f"{count} times {text}")
    for name, (before, first, rest, after) in report.usage.items():
        if rest.memory > first.memory + _GROWTH or rest.threads > first.threads + 8:
            report.problems.append(f"{name} grew from {first} to {rest}")
        if not after.near(before):
            report.problems.append(f"{name} kept {after}, it began with {before}")
    if report.silent_s and report.silent_s[0] > 1.0:
        report.problems.append("silent connections kept a new client waiting")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write the JSON; 1 if something did not hold."""
    parser = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--network", help="as `serve` takes it; needs --calibration")
    parser.add_argument("--calibration", help="an .npy of inputs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if (options.network is None) != (options.calibration is None):
        parser.error("--network and --calibration go together")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # theirs too
    report = Report(options.clients, options.seconds, options.workers)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if options.network is None:
            network = small_network(folder)
            x = torch.randn(1, *SHAPE)
            right = network(x)
            files = [str(folder / "network.onnx"), str(folder / "calibration.npy")]
        else:
            files = [options.network, options.calibration]
            x = torch.from_numpy(np.load(options.calibration)[:1])
            right = None
        service = Service(folder, stack, options.workers, files)
        if right is None:  # compared with the first answer
            with connect(service.server.address, link=service.link) as client:
                right = client.predict(x)
        load(service, report, x, right)
        beside_silent_ones(service, report, x)
        logs = [*service.server.foreign(), *service.dealer.foreign()]
    report.problems += [f"in a log: {line[:200]}" for line in logs]
    judge(report)
    print(show(report))
    if options.json is not None:
        write_rows(options.json, machine(), [report])
    return 1 if report.problems else 0
