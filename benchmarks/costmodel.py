"""Does the cost model hold? Predicted seconds beside the measured ones.

    python -m benchmarks.costmodel out/inference.json

A prediction is the package's own, `Cost.seconds_at`: what the same system took over
loopback, a one-way delay for each message that waits for another, and the bytes at the
rate of the line. Two things have to be known about a system for that:

  * how bytes share the line: CrypTen's openings travel both ways at once, so each
    direction carries one party's bytes; the masked engine's messages alternate, so
    both parties' bytes follow one another;
  * how many one-way delays a round takes: one over the direct channel, four over gloo,
    whose all_reduce of two ranks makes two round trips.

What the prediction leaves out shows in the last column: TCP's slow start above all.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence

from crypten_espn.cost import Cost

from .harness import Results, ResultsError, Row, columns

GLOO_DELAYS = 4
COLUMNS = ("network", "model", "system", "predicted s", "measured s", "difference")
PAYLOAD = 1448 / 1500  # TCP payload of a packet, with time stamps


@dataclasses.dataclass(frozen=True)
class Check:
    """One measured cell, its prediction, and by how much the two differ."""

    row: Row
    predicted_s: float

    @property
    def error(self) -> float:
        """(measured - predicted) / predicted."""
        return self.row.online_s.median / self.predicted_s - 1


def predict(row: Row, loopback: Row) -> float:
    """Online seconds of `row`'s system on `row`'s network.

    Args:
        row: gives the network, rounds and bytes; its times are not used.
        loopback: the same system over loopback; gives the seconds of computation.
    """
    alternating = row.engine == "masked"
    delays = GLOO_DELAYS if row.engine.endswith("+gloo") else 1
    cost = Cost(
        rounds=delays * row.rounds,
        bytes_sent=sum(row.bytes_sent) if alternating else max(row.bytes_sent),
        seconds=loopback.online_s.median,
    )
    rate = float("inf") if row.mbit is None else row.mbit * 1e6 * PAYLOAD
    return cost.seconds_at(rtt_s=row.rtt_ms / 1e3, bits_per_second=rate)


def checks(rows: Sequence[Row]) -> Iterator[Check]:
    """Every row with a delay or a rate whose system was also run over loopback."""
    base = {
        (row.model, row.activation, row.engine, row.batch, row.threads): row
        for row in rows
        if row.network == "loopback"
    }
    for row in rows:
        key = (row.model, row.activation, row.engine, row.batch, row.threads)
        if row.network != "loopback" and key in base:
            yield Check(row, predict(row, base[key]))


def table_rows(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Every check as text, one piece per entry of COLUMNS."""
    return [
        (
            check.row.network,
            check.row.model,
            check.row.system,
            f"{check.predicted_s:.3f}",
            f"{check.row.online_s.median:.3f}",
            f"{check.error:+.0%}",
        )
        for check in checks(rows)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's text for an example."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.costmodel",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", help="results written with --json")
    options = parser.parse_args(arguments)
    try:
        rows = [row for file in options.files for row in Results.read(file).rows]
    except ResultsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(columns([COLUMNS, *table_rows(rows)], left=3))
    return 0


if __name__ == "__main__":
    sys.exit(main())
