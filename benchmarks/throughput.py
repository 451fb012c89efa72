"""Images a second of the masked engine: one at a time, batches, several in flight.

    python -m benchmarks.throughput --models resnet18 --json FILE

Both parties and the dealer run on this machine over loopback, each party held to one
processor. Material is prepared before; only the online phase is timed. The ways to
work take turns within one run, so that whatever else the machine does hits all.

Beside each speed stands what it cost each party in processor time. The busier party
sets the floor: no way of working can take less time an image than that. Peak memory
counts both phases, with the material of all of one sample's inferences.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from crypten_espn.launch import run_parties
from crypten_espn.masked.model import MaskedModel
from crypten_espn.serving.client import Client, connect
from crypten_espn.serving.dealer import DealerServer
from crypten_espn.serving.server import ModelServer

from .networks import MODELS, images, planned
from .processes import peak_memory
from .rows import Spread, machine, read_rows, write_atomically
from .tables import columns

_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")
_SERVER, _CLIENT, _DEALER = range(3)


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to work through images.

    Args:
        name: what the table calls it.
        batch: images in each inference.
        in_flight: inferences at once.
        inferences: how many one sample takes.
    """

    name: str
    batch: int
    in_flight: int
    inferences: int


@dataclasses.dataclass(frozen=True)
class Speed:
    """What one way to work gave.

    Args:
        model, way: what was measured.
        seconds: per image, over the samples.
        ratio: images a second against one at a time, sample by sample.
        busy: median processor seconds per image, of rank 0 and of rank 1.
    """

    model: str
    way: str
    seconds: Spread
    ratio: Spread
    busy: tuple[float, float]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Speed:
        """The inverse of `dataclasses.asdict`, as read from JSON."""
        first, second = values["busy"]
        return cls(
            values["model"],
            values["way"],
            Spread.from_dict(values["seconds"]),
            Spread.from_dict(values["ratio"]),
            (first, second),
        )


def ways(*, batch: int, in_flight: int) -> list[Way]:
    """One image at a time first: the others are compared with it."""
    found = [Way("one at a time", 1, 1, in_flight)]
    if in_flight > 1:
        found.append(Way(f"{in_flight} in flight", 1, in_flight, in_flight))
    if batch > 1:
        found.append(Way(f"batch {batch}", batch, 1, 1))
    return found


def measure(
    model: MaskedModel, x: torch.Tensor, compared: Sequence[Way], *, repeat: int
) -> tuple[list[list[tuple[float, float, float]]], float, list[int]]:
    """Run the parties and the dealer; both phases of every sample.

    Args:
        model: the planned network.
        x: images, as many as the largest batch.
        compared: the ways to work.
        repeat: samples of each, after one that is not counted.

    Returns: samples of (seconds, rank 0's and rank 1's processor seconds) an image, by
        way; seconds of a round trip of an empty message between the parties; the most
        bytes that rank 0, rank 1 and the dealer ever had in memory.
    """
    with tempfile.TemporaryDirectory(prefix="throughput-") as folder:
        args = (model, x, list(compared), repeat, folder)
        server, client, dealer = run_parties(
            _party, world_size=3, args=args, timeout=1800
        )
    samples, trip, most = client
    return samples, trip, [server, most, dealer]


def _party(
    model: MaskedModel, x: torch.Tensor, compared: list[Way], repeat: int, folder: str
) -> Any:
    rank, place = int(os.environ["RANK"]), Path(folder)
    cores = sorted(os.sched_getaffinity(0))
    if rank != _DEALER and len(cores) > 1:
        os.sched_setaffinity(0, {cores[rank]})
    if rank == _DEALER:
        dealer = DealerServer("127.0.0.1:0", timeout=300)
        return _serve(dealer, place, "dealer")
    trip = _round_trip(rank)
    dealt = _await(place / "dealer").split()[0]
    if rank == _SERVER:
        server = ModelServer(model, "127.0.0.1:0", dealer=dealt, timeout=300)
        return _serve(server, place, "server")
    address, process = _await(place / "server").split()
    try:
        with connect(address, dealer=dealt, timeout=300) as client:
            samples = [
                [_sample(client, x, way, int(process)) for way in compared]
                for _ in range(repeat + 1)
            ]
    finally:
        (place / "done").touch()
    columns = [list(column) for column in zip(*samples[1:], strict=True)]
    return columns, trip, peak_memory()


def _round_trip(rank: int) -> float:
    """Median seconds for a byte there and back: how soon a waiting party wakes."""
    trips = []
    for _ in range(50):
        start = time.perf_counter()
        one = torch.zeros(1)
        for sender in (0, 1):
            if rank == sender:
                distributed.send(one, 1 - rank)
            else:
                distributed.recv(one, 1 - rank)
        trips.append(time.perf_counter() - start)
    return Spread.of(trips).median


def _serve(server: DealerServer | ModelServer, place: Path, name: str) -> int:
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    partial = place / f"{name}.partial"
    partial.write_text(f"{server.address} {os.getpid()}")
    partial.rename(place / name)
    while not (place / "done").exists():
        time.sleep(0.1)
    server.close()
    thread.join(5)
    return peak_memory()


def _await(path: Path) -> str:
    while not path.exists():
        time.sleep(0.01)
    return path.read_text()


def _sample(
    client: Client, x: torch.Tensor, way: Way, server: int
) -> tuple[float, float, float]:
    client.prepare(way.inferences, batch=way.batch)
    inputs = [x[: way.batch]] * way.inferences
    run: Callable[[], Any]
    if way.in_flight > 1:

        def run() -> None:
            client.predict_many(inputs, in_flight=way.in_flight)

    else:

        def run() -> None:
            for one in inputs:
                client.predict(one)

    there, here = _processor_seconds(server), time.process_time()
    start = time.perf_counter()
    run()
    took = time.perf_counter() - start
    here = time.process_time() - here
    there = _processor_seconds(server) - there
    images = way.inferences * way.batch
    return took / images, there / images, here / images


def _processor_seconds(process: int) -> float:
    """User and system time of a process so far, in whole ticks."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK_S


def speeds(
    model: str,
    compared: Sequence[Way],
    samples: Sequence[Sequence[tuple[float, float, float]]],
) -> list[Speed]:
    """Summaries; ratios are taken within each round of samples."""
    alone = [seconds for seconds, _, _ in samples[0]]
    result = []
    for way, column in zip(compared, samples, strict=True):
        pairs = zip(alone, column, strict=True)
        busy = [Spread.of(sample[rank] for sample in column).median for rank in (1, 2)]
        result.append(
            Speed(
                model,
                way.name,
                Spread.of(sample[0] for sample in column),
                Spread.of(base / sample[0] for base, sample in pairs),
                (busy[0], busy[1]),
            )
        )
    return result


COLUMNS = (
    "model",
    "way",
    "images/s",
    "ms an image",
    "ratio",
    "rank 0 ms",
    "rank 1 ms",
)


def cells(row: Speed) -> tuple[str, ...]:
    """A row as text, one piece per entry of COLUMNS."""
    seconds, ratio = row.seconds, row.ratio
    return (
        row.model,
        row.way,
        f"{1 / seconds.median:.1f}",
        f"{seconds.median * 1e3:.1f} "
        f"[{seconds.min * 1e3:.1f}, {seconds.max * 1e3:.1f}]",
        f"{ratio.median:.2f} [{ratio.min:.2f}, {ratio.max:.2f}]",
        f"{row.busy[0] * 1e3:.1f}",
        f"{row.busy[1] * 1e3:.1f}",
    )


def table(rows: Sequence[Speed]) -> str:
    """The rows as text."""
    return columns([COLUMNS, *map(cells, rows)], left=2)


def lines_of(path: Path) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
    """The machine and the table's lines of a JSON file."""
    about, rows = read_rows(path, lambda **values: Speed.from_dict(values))
    return about, [cells(row) for row in rows]


def make_parser() -> argparse.ArgumentParser:
    """The command line of this benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["resnet18"])
    parser.add_argument("--batch", type=int, default=32, help="images of the batch")
    parser.add_argument("--in-flight", type=int, default=8, help="inferences at once")
    parser.add_argument("--repeat", type=int, default=5, help="samples of each way")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's text."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if min(options.batch, options.in_flight, options.repeat) < 1:
        parser.error("--batch, --in-flight and --repeat start at 1")
    torch.set_num_threads(1)
    compared = ways(batch=options.batch, in_flight=options.in_flight)
    rows: list[Speed] = []
    runs: dict[str, Any] = {}
    for name in options.models:
        model = planned(name)
        x = images(name, options.batch)
        samples, trip, most = measure(model, x, compared, repeat=options.repeat)
        rows += speeds(name, compared, samples)
        runs[name] = {"round_trip_s": trip, "peak_bytes": most}
    print(table(rows))
    for name, run in runs.items():
        most = run["peak_bytes"]
        each = ", ".join(f"{size / 1e9:.2f}" for size in most)
        print(
            f"{name}: peak memory {sum(most) / 1e9:.2f} GB (rank 0, rank 1, dealer: "
            f"{each}); a message there and back {run['round_trip_s'] * 1e6:.0f} us"
        )
        if run["round_trip_s"] > 1e-3:
            print(
                "  The processors are busy with something else: waiting parties wake "
                "late, which slows one image at a time most and flatters the ratios."
            )
    if options.json:
        text = json.dumps(
            {
                "machine": machine(),
                "runs": runs,
                "rows": [dataclasses.asdict(row) for row in rows],
            },
            indent=2,
        )
        write_atomically(options.json, text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
