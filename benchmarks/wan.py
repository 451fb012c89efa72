"""The command line of the simulated path; `benchmarks.link` says what it is.

python -m benchmarks.wan --selftest --profile wan
python -m benchmarks.wan --selftest --profile 50ms,20mbit
python -m benchmarks.wan --profile metro -- python3 my_party.py   # run per rank
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from .link import PROFILES, Path, PathError, self_test


def _print_line(rank: int, line: str) -> None:
    print(f"[{rank}] {line}", end="", flush=True)


def _self_test_main(names: Sequence[str], parties: int) -> int:
    failed = False
    for name in names:
        with Path(name, parties=parties) as path:
            result = self_test(path)
            verdict = "ok"
            if path.kind == "tcp" and not result.passed:
                verdict, failed = "NOT within 5 % (or 0.05 ms)", True
            print(f"{result}  [{verdict}]")
            if path.kind == "tcp":
                taken_us = path.overhead_s * 1e6
                print(
                    f"    congestion control {path.congestion}; taken off the round "
                    f"trip for the forwarder: {taken_us:.0f} us"
                )
    return int(failed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's text for examples."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.wan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--profile",
        action="append",
        help=f"{', '.join(PROFILES)}, or numbers such as 50ms,20mbit (may be repeated)",
    )
    parser.add_argument("--parties", type=int, default=2, help="2, or 3 with a dealer")
    parser.add_argument(
        "--selftest", action="store_true", help="measure delay and rate of the path"
    )
    parser.add_argument(
        "command",
        nargs="*",
        help="run this per rank, with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT set",
    )
    options = parser.parse_args(arguments)
    profiles = options.profile or ["wan"]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if options.selftest:
            return _self_test_main(profiles, options.parties)
        if not options.command:
            parser.error("nothing to do: give --selftest or a command to run")
        with Path(profiles[0], parties=options.parties) as path:
            print(path.profile, file=sys.stderr)
            commands = [options.command] * options.parties
            path.run(commands, on_line=_print_line)
    except PathError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
