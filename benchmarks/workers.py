"""One server process or several behind a port: images a second, and the server's line.

    python -m benchmarks.workers --model resnet18 --workers 1 2 --clients 2

`crypten-espn serve --workers N`, a dealer, and clients that are processes of their own.
Each prepares, waits for the others, and predicts; the clock runs from the first to the
last. The bytes that the server's processes report, in both phases, are compared with
those of `crypten-espn estimate` for the same plan; but for frames they must be equal,
or the command fails. Nothing but the material's journal is shared between processes, so
what they cannot have is more cores than the machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch

from crypten_espn.cost import PAYLOAD
from crypten_espn.estimate.engines import EngineCost, engine_costs
from crypten_espn.estimate.workload import workload
from crypten_espn.masked.messages import CLIENT, SERVER, Party
from crypten_espn.masked.plan import Plan

from . import hosts
from .costmodel import NAMED
from .hosts import Hosts
from .networks import CLASSES, MODELS, PRECISIONS, planned
from .processes import Process, connected
from .rows import Spread, machine, read_rows, write_rows
from .tables import columns

COLUMNS = (
    "model",
    "workers",
    "answering",
    "clients",
    "corrections to",
    "precision",
    "images/s",
    "of one",
    "prepare images/s",
    "received MB",
    "sent MB",
    "as estimated",
    "images/s at 10 Gbit/s",
)
_LINE_BITS = 10e9
_TRIES = 50


@dataclasses.dataclass(frozen=True)
class Served:
    """What so many server processes answered.

    Args:
        model, workers, clients, batch: as asked for.
        corrections: who receives the dealer's.
        precision: of the plan.
        inferences: of each client and sample.
        seconds: online, per image of all clients.
        prepare_s: the same of preparing.
        answering: processes of the server that clients were connected to.
        received, sent: bytes of the server's line for one inference, both phases,
            frames left out.
        exact: whether estimate says the same bytes.
    """

    model: str
    workers: int
    clients: int
    batch: int
    inferences: int
    corrections: str
    precision: str
    seconds: Spread
    prepare_s: Spread
    answering: int
    received: int
    sent: int
    exact: bool

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Served:
        """The inverse of `dataclasses.asdict`, as read from JSON."""
        spreads = {
            name: Spread.from_dict(values[name]) for name in ("seconds", "prepare_s")
        }
        return cls(**{**values, **spreads})

    @property
    def line_images(self) -> float:
        """Images a second that a line of 10 Gbit/s each way has room for."""
        most = max(self.received, self.sent)
        return self.batch * PAYLOAD * _LINE_BITS / (8 * most)


def read(path: Path) -> tuple[dict[str, Any], list[Served]]:
    """The machine and the rows of a JSON file; see `read_rows`."""
    return read_rows(path, lambda **values: Served.from_dict(values))


def estimated(name: str, plan: Plan, *, batch: int, corrections: Party) -> EngineCost:
    """What estimate says of the masked engine, for the plan that is served."""
    work = workload(name, classes=CLASSES.get(name, 10))
    served = dataclasses.replace(work, plan=plan)
    cost, *_ = engine_costs(served, batch=batch, corrections=corrections)
    return cost


# -------------------------------------------------------------------------- measuring


class _Clients:
    """Client processes that do one thing at a time, all of them together."""

    def __init__(
        self, ports: Sequence[int], *, count: int, batch: int, corrections: Party
    ) -> None:
        told = json.dumps(
            {"ports": list(ports), "batch": batch, "corrections": corrections}
        )
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.workers", "--client", told],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(count)
        ]
        for process in self._processes:
            _heard(process)

    def all(self, order: str, inferences: int) -> float:
        """Have each do it so often; seconds until the last is done."""
        began = time.perf_counter()
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{order} {inferences}\n")
            process.stdin.flush()
        for process in self._processes:
            _heard(process)
        return time.perf_counter() - began

    def spread(self, server: Process, wanted: int) -> int:
        """Connect until so many processes of a server have a client; how many have.

        Which process accepts a connection is chance.
        """
        for _ in range(_TRIES):
            if (answering := len(connected(server))) >= wanted:
                break
            self.all("connect", 1)
        return answering

    def __enter__(self) -> _Clients:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes:
            streams: list[IO[str] | None] = [process.stdin, process.stdout]
            for stream in streams:
                assert stream is not None
                stream.close()
            process.wait(60)


def _heard(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    if process.stdout.readline() != "done\n":
        raise RuntimeError("a client failed; what it wrote says why")


def _client(told: dict[str, Any]) -> None:
    """Body of a client process: orders on standard input until it is closed."""
    torch.set_num_threads(1)
    batch, receiver = told["batch"], told["corrections"]
    client = hosts.reach("127.0.0.1", told["ports"], corrections=receiver)
    x = torch.randn(batch, *client.plan.input.shape)
    print("done", flush=True)
    for line in sys.stdin:
        order, inferences = line.split()
        if order == "connect":
            client.close()
            client = hosts.reach("127.0.0.1", told["ports"], corrections=receiver)
        elif order == "prepare":
            client.prepare(int(inferences), batch=batch)
        else:
            for _ in range(int(inferences)):
                client.predict(x)
        print("done", flush=True)
    client.close()


def measure(
    name: str,
    *,
    workers: int,
    clients: int,
    batch: int,
    inferences: int,
    repeat: int,
    corrections: Party = SERVER,
    precision: str = "fast",
) -> Served:
    """Serve one model by so many processes, and have the clients use it.

    Raises: RuntimeError if what crossed the line is not what the plan says.
    """
    model = planned(name, precision=precision)
    plan, images = model.plan, clients * inferences * batch
    prepare_s, online_s = [], []
    with Hosts(model, workers=workers) as served:
        ports = [hosts.port(served.server), hosts.port(served.dealer)]
        with _Clients(
            ports, count=clients, batch=batch, corrections=corrections
        ) as users:
            answering = users.spread(served.server, min(workers, clients))
            users.all("prepare", 1)  # the weights
            users.all("predict", 1)
            for _ in range(repeat):
                prepare_s.append(users.all("prepare", inferences) / images)
                online_s.append(users.all("predict", inferences) / images)
        orders = clients * (1 + repeat)
        received, sent = _line(served, plan, orders, clients, inferences, batch)
    if corrections == SERVER:
        received += plan.dealer_bytes(batch=batch)
    cost = estimated(name, plan, batch=batch, corrections=corrections)
    expected = cost.received[0], cost.traffic.bytes_sent[0]
    return Served(
        *(name, workers, clients, batch, inferences, corrections, precision),
        Spread.of(online_s),
        Spread.of(prepare_s),
        answering,
        received,
        sent,
        (received, sent) == expected,
    )


def _line(
    served: Hosts, plan: Plan, orders: int, clients: int, inferences: int, batch: int
) -> tuple[int, int]:
    """What server and client sent each other for an inference, by the logs of all.

    Every preparation and every inference is looked at.
    """

    def by_order(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return sorted(events, key=lambda event: (event["session"], event["start"]))

    server = served.server
    dealt = served.events(served.dealer, "dealt", orders)
    prepared = served.events(server, "prepared", orders)
    answered = served.events(
        server, "inference", clients + (orders - clients) * inferences
    )
    for order, seen in zip(by_order(dealt), by_order(prepared), strict=True):
        hosts.check_offline(
            plan,
            dealt=order["sent"],
            received=seen["received"],
            batch=batch,
            count=order["count"],
        )
    for event in answered:
        hosts.online_payload(plan, CLIENT, event["received"], batch=batch)
        hosts.online_payload(plan, SERVER, event["sent"], batch=batch)
    last = answered[-1]
    online = hosts.online_payload(plan, CLIENT, last["received"], batch=batch)
    down = hosts.online_payload(plan, SERVER, last["sent"], batch=batch)
    return online + plan.client_bytes(batch=batch), down


# ----------------------------------------------------------------------- command line


def lines(rows: Sequence[Served]) -> list[tuple[str, ...]]:
    """The rows as text; a speed beside that of the first of its model and receiver."""
    found: list[tuple[str, ...]] = []
    first: dict[tuple[str, str], float] = {}
    for row in rows:
        seconds = row.seconds.median
        base = first.setdefault((row.model, row.corrections), seconds)
        found.append(
            (
                row.model,
                str(row.workers),
                str(row.answering),
                str(row.clients),
                row.corrections,
                row.precision,
                f"{1 / seconds:.1f}",
                f"{base / seconds:.2f}",
                f"{1 / row.prepare_s.median:.1f}",
                f"{row.received / 1e6:.3f}",
                f"{row.sent / 1e6:.3f}",
                "exactly" if row.exact else "NO",
                f"{row.line_images:.0f}",
            )
        )
    return found


def lines_of(path: Path) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
    """The machine and the table's lines of a JSON file."""
    about, rows = read(path)
    return about, lines(rows)


def make_parser() -> argparse.ArgumentParser:
    """The command line of this benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.workers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", choices=[m for m in MODELS if m in NAMED], default="resnet18"
    )
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument(
        "--corrections",
        nargs="+",
        choices=(SERVER, CLIENT),
        default=[SERVER, CLIENT],
        help="who receives the dealer's; each in turn",
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="fast")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--inferences", type=int, default=16, help="of a client")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--client", help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's text. 1 if bytes are not as estimated."""
    options = make_parser().parse_args(arguments)
    if options.client:
        _client(json.loads(options.client))
        return 0
    rows: list[Served] = []
    about = machine()
    for receiver, workers in itertools.product(options.corrections, options.workers):
        rows.append(
            measure(
                options.model,
                workers=workers,
                corrections=receiver,
                precision=options.precision,
                clients=options.clients,
                batch=options.batch,
                inferences=options.inferences,
                repeat=options.repeat,
            )
        )
        if options.json:
            write_rows(options.json, about, rows)
    print(columns([COLUMNS, *lines(rows)], left=1))
    return 0 if all(row.exact for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
