"""The options that every measuring benchmark has, and what its end does."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .compare import report_comparison
from .link import PROFILES
from .rows import Results
from .tables import frame, table


def add_run_options(
    parser: argparse.ArgumentParser, *, networks: Sequence[str], repeat: int
) -> None:
    """The options every measuring benchmark has.

    Args:
        networks, repeat: their defaults.
    """
    parser.add_argument(
        "--networks",
        nargs="+",
        default=list(networks),
        help=f"{', '.join(PROFILES)}, or numbers such as 50ms,20mbit (round trip, "
        f"rate); default {' '.join(networks)}",
    )
    parser.add_argument(
        "--repeat",
        type=int,
        default=repeat,
        help=f"turns; a short system runs several times in each; default {repeat}",
    )
    parser.add_argument(
        "--fill-s",
        type=float,
        default=12.0,
        help="seconds for which a short system is repeated, up to 41 runs; 0: --repeat "
        "alone counts; default 12",
    )
    parser.add_argument("--threads", type=int, default=1, help="per party; default 1")
    parser.add_argument(
        "--provider",
        choices=("TFP", "TTP"),
        default="TFP",
        help="CrypTen's randomness: made by the first party, or by a third process",
    )
    parser.add_argument(
        "--limit-s",
        type=float,
        default=600.0,
        help="fewer repetitions of a system that together take longer; one of which "
        "a single run takes longer is left out; default 600",
    )
    parser.add_argument(
        "--timeout-s",
        type=float,
        default=7200.0,
        help="end a network's parties after this; default 7200",
    )
    parser.add_argument(
        "--warm",
        action="store_true",
        help="no TCP slow start after idle (net.ipv4.tcp_slow_start_after_idle=0)",
    )
    parser.add_argument("--json", metavar="FILE", help="write rows here as they finish")
    parser.add_argument("--csv", metavar="FILE", help="write rows here at the end")
    parser.add_argument("--plot", metavar="STEM", help="write STEM-....png and .svg")
    parser.add_argument(
        "--compare",
        metavar="OLD",
        help="exit non-zero if rounds or bytes differ from this results file",
    )


def finish(results: Results, options: argparse.Namespace, *, ended_well: bool) -> int:
    """Print the table, write the CSV, compare; the exit status."""
    print(table(results))
    if options.csv:
        Path(options.csv).parent.mkdir(parents=True, exist_ok=True)
        frame(results).to_csv(options.csv, index=False, float_format="%.6g")
    changed = report_comparison(options.compare, results) if options.compare else 0
    return changed if ended_well else 3
