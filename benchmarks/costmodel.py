"""Does the cost model hold? Predictions beside every measured cell.

    python -m benchmarks.costmodel                      # the committed results
    python -m benchmarks.costmodel out/inference.json --macs 40

The model is the package's own, `cost.Traffic`: computation, a one-way delay for each
message that waits for another, and the bytes at the rate of the line. Two things have
to be known about a system for that:

  * how bytes share the line: CrypTen's openings travel both ways at once, so each
    direction carries one party's bytes; the masked engine's messages alternate, so
    both parties' bytes follow one another;
  * how many one-way delays a round takes: one over the direct channel, four over gloo,
    whose all_reduce of two ranks makes two round trips.

Whether TCP starts slowly depends on what the connection did before, so a prediction is
a range: on a warm connection, and after silence. The difference is that of the measured
median from the nearer end of the range, nothing inside it.

From loopback: computation is what the same system took over loopback. From shapes:
nothing measured goes in but this processor's rates and what an opening costs CrypTen's
Python, as in `crypten-espn estimate`; rounds and bytes are then compared too, and must
be equal.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from crypten_espn.cost import GLOO_DELAYS, PAYLOAD, Traffic
from crypten_espn.errors import EspnError
from crypten_espn.estimate.engines import EngineCost, engine_costs
from crypten_espn.estimate.processor import REFERENCE, Processor, calibrate
from crypten_espn.estimate.workload import ALIASES, workload
from crypten_espn.pillar.networks import NETWORKS

from .networks import CLASSES
from .rows import ROOT, Results, ResultsError, Row
from .tables import columns

__all__ = ["COLUMNS", "PAYLOAD", "Check", "checks", "from_shapes", "table_rows"]
COLUMNS = (
    "network",
    "model",
    "system",
    "predicted s",
    "after silence s",
    "measured s",
    "difference",
)
MASKED_TOLERANCE = 0.05
NAMED = frozenset({*NETWORKS, *ALIASES})  # as estimate and the rows call them
FOLDER = ROOT / "benchmarks" / "results"
FILES = ("masked", "inference", "large", "lan-metro")
RESULTS = [FOLDER / f"{name}.json" for name in FILES]


@dataclasses.dataclass(frozen=True)
class Check:
    """One measured cell, its prediction, and by how much the two differ.

    Args:
        row: the cell.
        predicted_s: on a warm connection.
        silent_s: when the connection was silent before.
        exact: whether rounds and bytes are as derived; None if they were an input.
    """

    row: Row
    predicted_s: float
    silent_s: float
    exact: bool | None = None

    @property
    def error(self) -> float:
        """(measured - predicted) / predicted on a warm connection."""
        return self.row.online_s.median / self.predicted_s - 1

    @property
    def difference(self) -> float:
        """The same from the nearer end of the range; 0 inside it."""
        measured = self.row.online_s.median
        nearer = min(max(measured, self.predicted_s), self.silent_s)
        return measured / nearer - 1


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
            yield _check(row, _traffic(row), base[key].online_s.median)


def from_shapes(rows: Sequence[Row], processor: Processor) -> Iterator[Check]:
    """Every row of a network that estimate has, whose engine's cost it derives."""
    known: dict[tuple[str, int], dict[str, EngineCost]] = {}
    for row in rows:
        if row.model not in NAMED:
            continue  # one layer, or a network of the benchmarks' own
        key = (row.model, row.batch)
        if key not in known:
            work = workload(row.model, classes=CLASSES.get(row.model, 10))
            costs = engine_costs(work, batch=row.batch)
            known[key] = {cost.engine: cost for cost in costs}
        cost = known[key].get(row.activation)
        if cost is None:
            continue
        if row.engine.endswith("+gloo"):
            cost = cost.over_gloo()
        traffic = cost.traffic
        # CrypTen's counter splits the last, one-sided message between the parties.
        predicted, sent = sum(traffic.bytes_sent), sum(row.bytes_sent)
        # What a masked opening drops, and the dealer leaves out of its words, follows
        # calibration: a few bits an activation.
        tolerance = MASKED_TOLERANCE if row.engine == "masked" else 0.0
        offline = cost.dealer_bytes + cost.client_bytes
        exact = (
            traffic.rounds == row.rounds
            and abs(predicted - sent) <= tolerance * sent
            and abs(offline - row.offline_bytes) <= tolerance * row.offline_bytes
        )
        yield _check(row, traffic, cost.online.seconds(processor), exact=exact)


def _traffic(row: Row) -> Traffic:
    delays = GLOO_DELAYS if row.engine.endswith("+gloo") else 1
    return Traffic(row.rounds, row.bytes_sent, row.engine == "masked", delays)


def _check(
    row: Row, traffic: Traffic, seconds: float, *, exact: bool | None = None
) -> Check:
    rtt_s = row.rtt_ms / 1e3
    rate = float("inf") if row.mbit is None else row.mbit * 1e6
    warm = traffic.seconds_at(rtt_s=rtt_s, bits_per_second=rate, seconds=seconds)
    slow = traffic.slow_start_s(rtt_s=rtt_s, bits_per_second=rate)
    return Check(row, warm, warm + slow, exact)


def table_rows(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Every check from loopback as text, one piece per entry of COLUMNS."""
    return [_cells(check) for check in checks(rows)]


def _cells(check: Check) -> tuple[str, ...]:
    return (
        check.row.network,
        check.row.model,
        check.row.system,
        f"{check.predicted_s:.3f}",
        f"{check.silent_s:.3f}",
        f"{check.row.online_s.median:.3f}",
        f"{check.difference:+.0%}",
    )


def validated(folder: Path) -> list[tuple[str, ...]]:
    """How far a folder's results are from the model: a line for each kind of cell.

    The processor is one of 40 G multiply-accumulates a second, as with `--macs 40`.
    Raises: ResultsError where results are missing.
    """
    processor = REFERENCE.scaled(40e9)

    def read(*names: str) -> list[Row]:
        files = [folder / f"{name}.json" for name in names]
        return [row for file in files for row in Results.read(file).rows]

    def on(network: str, found: Iterable[Check]) -> list[Check]:
        return [check for check in found if check.row.network == network]

    command = "`python -m benchmarks.costmodel"
    whole, near = read("masked", "inference", "large"), read("lan-metro")
    shapes = list(from_shapes([*whole, *near], processor))
    idle = on("loopback", shapes)
    files = "benchmarks/results/inference.json benchmarks/results/lan-metro.json"
    layers = list(checks(read("activations")))
    measured, own = "as measured over loopback", "--macs 40"
    kinds = (
        ("whole networks on wan", measured, on("wan", checks(whole)), own),
        ("whole networks on wan", "from shapes", on("wan", shapes), own),
        ("whole networks on cheetah", measured, on("cheetah", checks(whole)), own),
        ("whole networks on cheetah", "from shapes", on("cheetah", shapes), own),
        ("on lan", "from shapes", on("lan", shapes), f"{files} --macs 40"),
        ("on metro", "from shapes", on("metro", shapes), f"{files} --macs 40"),
        ("whole networks over loopback", "from shapes", idle, own),
        ("activation layers", measured, layers, "benchmarks/results/activations.json"),
    )
    return [
        (f"{len(some)} {what}", how, *_within(some), f"{command} {options}`")
        for what, how, some, options in kinds
        if some
    ]


def _within(found: Sequence[Check]) -> tuple[str, str]:
    """The largest difference, and the median one."""
    sizes = [abs(check.difference) for check in found]
    return f"{max(sizes):.0%}", f"{statistics.median(sizes):.0%}"


def summary(found: Sequence[Check]) -> list[str]:
    """One line per network: how far its cells are from the model."""
    lines = []
    for network in dict.fromkeys(check.row.network for check in found):
        some = [check for check in found if check.row.network == network]
        most, half = _within(some)
        text = (
            f"{network}, {len(some)} cells: validated within {most}, half of them "
            f"within {half}"
        )
        if some[0].exact is not None:
            equal = sum(bool(check.exact) for check in some)
            text += f"; rounds and bytes equal in {equal}"
        lines.append(text)
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's text for an example. 1 if bytes are not equal."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.costmodel",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "files",
        nargs="*",
        type=Path,
        default=RESULTS,
        help="results written with --json (default: the committed whole networks)",
    )
    parser.add_argument(
        "--macs",
        type=float,
        help="10^9 32-bit multiply-accumulates a second; measured here when left out",
    )
    options = parser.parse_args(arguments)
    try:
        rows = [row for file in options.files for row in Results.read(file).rows]
        if options.macs is None:
            processor = calibrate()
        else:
            processor = REFERENCE.scaled(1e9 * options.macs)
    except (ResultsError, EspnError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    shaped = list(from_shapes(rows, processor))
    for title, found in (
        ("Computation as measured over loopback", list(checks(rows))),
        (
            f"From shapes, with {processor.macs32 / 1e9:.3g} G multiply-accumulates a "
            "second",
            shaped,
        ),
    ):
        if found:
            print(f"{title}:")
            print(columns([COLUMNS, *map(_cells, found)], left=3))
            print("\n".join(summary(found)), end="\n\n")
    return 0 if all(check.exact for check in shaped) else 1


if __name__ == "__main__":
    sys.exit(main())
