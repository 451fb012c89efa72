"""Options in; a table and JSON out."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..rows import machine, write_rows
from ..tables import columns
from . import __doc__ as about
from .namespace import namespace
from .run import Report, Run


def show(report: Report) -> str:
    """The report in words and tables."""
    done = [["after answers", "fault"]]
    done += [[str(answers), what] for answers, what in report.faults_done]
    met = [["clients met", "times"]]
    met += [[what, str(n)] for what, n in sorted(report.failures.items())]
    slowest = ", ".join(f"{k} {s:.1f} s" for k, s in sorted(report.slowest_s.items()))
    verdict = "\n".join(report.problems) or "everything held"
    return (
        f"{columns(done, left=2)}\n\n{columns(met, left=1)}\n\n"
        f"{report.answers} answers in {report.seconds:.0f} s, {report.wrong} wrong; "
        f"{report.used} numbers used in {report.sessions} sessions, each once, "
        f"{report.burnt} of them burnt; slowest calls: {slowest}, with a time-out of "
        f"{report.timeout_s:g} s\n{verdict}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write the JSON; 1 if something did not hold."""
    parser = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    parser.add_argument("--inferences", type=int, default=1000)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--timeout", type=float, default=5.0, help="of every party")
    parser.add_argument(
        "--namespaces", action="store_true", help="clients in their own"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-"))
        try:
            link = stack.enter_context(namespace()) if options.namespaces else None
        except PermissionError as error:
            print(error, file=sys.stderr)
            return 2
        run = Run(
            Path(folder),
            inferences=options.inferences,
            timeout=options.timeout,
            link=link,
        )
        report = run.go(options.faults, lambda text: print(text, file=sys.stderr))
    print(show(report))
    if options.json is not None:
        write_rows(options.json, machine(), [report])
    return 1 if report.problems else 0
