"""What preparing costs in a real session: seconds, bytes, memory of each party.

    python -m benchmarks.offline --models minionn resnet18 resnet50
    python -m benchmarks.offline --models resnet18 --count 32 --repeat 3 --json FILE

A dealer, a server and a client process on this machine, over sockets, through the
public API. `prepare(1)` and `prepare(n)` are timed apart, from the client's order until
all three are done, and each prepared inference is used before the next preparation. The
first one, which also opens the weights, is not counted. Memory is the most that each
process ever held, all its libraries among it; beside it what it held once connected.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from . import link, sessions
from .networks import MODELS, PRECISIONS
from .rows import machine, read_rows, write_rows
from .sessions import Point, Session
from .tables import columns

COLUMNS = (
    "network",
    "model",
    "size",
    "batch",
    "corrections to",
    "precision",
    "prepare(1) ms",
    "prepare(n) ms",
    "n",
    "online ms",
    "dealer MB",
    "client MB",
    "online MB",
    "server mem MB",
    "client mem MB",
    "dealer mem MB",
)


def cells(row: Session) -> tuple[str, ...]:
    """A row as text, one piece per entry of COLUMNS; all but memory for one image."""
    one, many, online = (
        f"{1e3 * spread.median:#.3g}".rstrip(".")
        for spread in (row.one_s, row.many_s, row.online_s)
    )
    sent = (row.dealer_bytes, row.client_bytes, sum(row.online_bytes))
    memory = zip(row.idle_bytes, row.peak_bytes, strict=True)
    return (
        row.network,
        row.model,
        str(row.size),
        str(row.batch),
        row.corrections,
        row.precision,
        one,
        many,
        str(row.count),
        online,
        *(f"{size / row.batch / 1e6:.2f}" for size in sent),
        *(f"{idle / 1e6:.0f} to {peak / 1e6:.0f}" for idle, peak in memory),
    )


def table(rows: Iterable[Session]) -> str:
    """The rows as text."""
    return columns([COLUMNS, *map(cells, rows)], left=2)


def read(path: Path) -> tuple[dict[str, Any], list[Session]]:
    """The machine and the rows of a JSON file; see `read_rows`."""
    return read_rows(path, lambda **values: Session.from_dict(values))


def lines_of(path: Path) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
    """The machine and the table's lines of a JSON file."""
    about, rows = read(path)
    return about, [cells(row) for row in rows]


# ----------------------------------------------------------------------- command line


def add_session_options(parser: argparse.ArgumentParser, *, repeat: int) -> None:
    """What every benchmark of sessions is told."""
    parser.add_argument("--networks", nargs="+", default=["loopback"])
    parser.add_argument("--repeat", type=int, default=repeat, help=f"default {repeat}")
    parser.add_argument(
        "--corrections",
        nargs="+",
        choices=("server", "client"),
        default=["server"],
        help="who receives the dealer's; default server",
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="fast", help="default fast"
    )
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--timeout-s", type=float, default=1800.0)
    parser.add_argument("--json", type=Path, metavar="FILE")


def run(
    points: Sequence[Point],
    options: argparse.Namespace,
    show: Callable[[Sequence[Session]], str],
) -> int:
    """Measure every point on every network; rows are kept as they come.

    Returns: the exit status: 3 if a point was lost, 130 if interrupted.
    """
    rows: list[Session] = []
    about = machine()
    status = 0
    try:
        for network, receiver, point in itertools.product(
            options.networks, options.corrections, points
        ):
            try:
                row = sessions.measure(
                    point,
                    network,
                    repeat=options.repeat,
                    threads=options.threads,
                    timeout_s=options.timeout_s,
                    corrections=receiver,
                    precision=options.precision,
                )
            except link.PartyError as error:
                print(f"error: {point} on {network}: {error}", file=sys.stderr)
                status = 3
                continue
            rows.append(row)
            print(" ".join(cells(row)), flush=True)
            if options.json:
                write_rows(options.json, about, rows)
    except link.PathError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; finished rows are kept", file=sys.stderr)
        status = 130
    if rows:
        print(show(rows))
    return status


def make_parser() -> argparse.ArgumentParser:
    """The command line of this benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.offline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["resnet18"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--size", type=int, help="of the images; the network's own")
    parser.add_argument(
        "--count",
        type=int,
        help="inferences of the larger preparation; 2 to 8, by the images' size",
    )
    add_session_options(parser, repeat=7)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's text for examples."""
    options = make_parser().parse_args(arguments)
    points = [
        Point.of(model, batch=batch, size=options.size, count=options.count)
        for model in options.models
        for batch in options.batch
    ]
    return run(points, options, table)


if __name__ == "__main__":
    sys.exit(main())
