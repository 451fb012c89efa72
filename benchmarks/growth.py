"""Does anything grow faster than the work? Batch, image size and depth, in sessions.

    python -m benchmarks.growth
    python -m benchmarks.growth --series batch depth --json FILE

Each series begins with a base point. What another point takes is divided by what the
base takes and by how much more there is to do: seconds online by multiplications, and
preparing, the dealer's bytes and those online by activations. 1 is linear, below 1 is
better; whatever is above `--tolerance` is named. Sessions are those of
`benchmarks.offline`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .offline import add_session_options, read, run
from .sessions import Point, Session
from .tables import columns

TOLERANCE = 1.1
SERIES = {
    "batch": [Point.of("resnet18", batch=batch) for batch in (1, 8, 32)],
    "size": [Point.of("resnet18", size=size) for size in (32, 64, 128, 224)],
    "depth": [Point.of("resnet32"), Point.of("resnet110")],
}
COLUMNS = (
    "series",
    "model",
    "size",
    "batch",
    "prepare(1)",
    "prepare(n)",
    "online",
    "dealer bytes",
    "client bytes",
    "online bytes",
)


@dataclasses.dataclass(frozen=True)
class Growth:
    """A point of a series beside its base: 1 where it grows as the work does.

    Args:
        series: its name.
        row: the point's session.
        shares: by what COLUMNS calls them.
    """

    series: str
    row: Session
    shares: dict[str, float]

    def above(self, tolerance: float) -> list[str]:
        """What grows faster than the work by more than that."""
        row = self.row
        return [
            f"{self.series}: {name} of {row.model} at {row.size} pixels, batch "
            f"{row.batch}, is {share:.2f} times linear growth"
            for name, share in self.shares.items()
            if share > tolerance
        ]


def grown(rows: Sequence[Session]) -> Iterator[Growth]:
    """Every point of a series whose base was measured on the same path."""
    found = {(*_run(row), row.model, row.size, row.batch): row for row in rows}
    for run_as in dict.fromkeys(map(_run, rows)):
        for series, points in SERIES.items():
            keys = [(*run_as, p.model, p.size, p.batch) for p in points]
            base = found.get(keys[0])
            for key in keys[1:]:
                if base is not None and key in found:
                    yield Growth(series, found[key], _shares(base, found[key]))


def _run(row: Session) -> tuple[str, str, str, int]:
    """What a point and its base must have in common."""
    return row.network, row.corrections, row.precision, row.threads


def _shares(base: Session, row: Session) -> dict[str, float]:
    """Seconds are for an image, bytes for an inference."""
    activations = row.activations / base.activations
    images = row.batch / base.batch
    return {
        "prepare(1)": row.one_s.median / base.one_s.median / activations,
        "prepare(n)": row.many_s.median / base.many_s.median / activations,
        "online": row.online_s.median / base.online_s.median / (row.macs / base.macs),
        "dealer bytes": row.dealer_bytes / base.dealer_bytes / activations / images,
        "client bytes": row.client_bytes / base.client_bytes / activations / images,
        "online bytes": sum(row.online_bytes)
        / sum(base.online_bytes)
        / activations
        / images,
    }


def cells(growth: Growth) -> tuple[str, ...]:
    """A point as text, one piece per entry of COLUMNS."""
    row = growth.row
    where = (growth.series, row.model, str(row.size), str(row.batch))
    return (*where, *(f"{share:.2f}" for share in growth.shares.values()))


def table(rows: Sequence[Session], *, tolerance: float = TOLERANCE) -> str:
    """The growth of every series, and what is above linear."""
    found = list(grown(rows))
    above = [line for growth in found for line in growth.above(tolerance)]
    return "\n".join(
        [
            columns([COLUMNS, *map(cells, found)], left=2),
            *(above or [f"nothing is above {tolerance:g} times linear growth"]),
        ]
    )


def lines_of(path: Path) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
    """The machine and the table's lines of a JSON file."""
    about, rows = read(path)
    return about, [cells(growth) for growth in grown(rows)]


def make_parser() -> argparse.ArgumentParser:
    """The command line of this benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.growth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--series", nargs="+", choices=SERIES, default=list(SERIES))
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help=f"times linear growth that is not named; default {TOLERANCE:g}",
    )
    add_session_options(parser, repeat=5)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's text for examples."""
    options = make_parser().parse_args(arguments)
    chosen = [point for name in options.series for point in SERIES[name]]

    def show(rows: Sequence[Session]) -> str:
        return table(rows, tolerance=options.tolerance)

    return run(list(dict.fromkeys(chosen)), options, show)


if __name__ == "__main__":
    sys.exit(main())
