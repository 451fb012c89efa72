"""Options in; tables and JSON out."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..rows import machine, write_atomically
from ..tables import columns
from . import __doc__ as about
from .attack import Report, run


def show(report: Report) -> str:
    """The report as tables."""
    endings = ("reason", "closed", "answer", "left", "silent")
    lines = [["attack", "connections", *endings]]
    for name, found in report.outcomes.items():
        counts = [str(found.get(ending, 0)) for ending in endings]
        lines.append([name, str(sum(found.values())), *counts])
    usage = [["process", "memory before", "after", "descriptors", "threads", "status"]]
    for name, (before, after) in report.usage.items():
        usage.append(
            [
                name,
                f"{before.memory / 1e6:.0f} MB",
                f"{after.memory / 1e6:.0f} MB",
                f"{before.descriptors} -> {after.descriptors}",
                f"{before.threads} -> {after.threads}",
                str(report.statuses[name]),
            ]
        )
    verdict = "\n".join(report.faults) or "everything held"
    return (
        f"{columns(lines, left=1)}\n\n{columns(usage, left=1)}\n\n"
        f"{report.connections} connections in {report.seconds:.0f} s; the honest "
        f"client got {report.served} answers, {report.wrong} of them wrong, the "
        f"slowest in {report.slowest_s:.2f} s\n{verdict}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Attack, print the tables, write the JSON; 1 if something did not hold."""
    parser = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--concurrent", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--limit-s", type=float, default=1800.0, help="seconds after which none begins"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)

    def progress(done: int) -> None:
        if sys.stderr.isatty() and done % 100 == 0:
            print(f"\r{done}/{options.connections}", end="", file=sys.stderr)

    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        report = run(
            Path(folder),
            connections=options.connections,
            concurrent=options.concurrent,
            seed=options.seed,
            limit_s=options.limit_s,
            progress=progress,
        )
    print(show(report))
    if options.json is not None:
        held = {"faults": report.faults, **dataclasses.asdict(report)}
        text = json.dumps({"machine": machine(), "rows": [held]}, indent=1)
        write_atomically(options.json, text + "\n")
    return 1 if report.faults else 0
