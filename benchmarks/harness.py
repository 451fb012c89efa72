"""Results files: their rows as a table, and two of them compared.

python -m benchmarks.harness --compare OLD.json NEW.json    # rounds and bytes
python -m benchmarks.harness --table FILE.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .compare import report_comparison
from .rows import Results, ResultsError
from .tables import table


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's text for examples."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.harness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--compare", nargs=2, metavar=("OLD", "NEW"))
    parser.add_argument("--table", metavar="FILE")
    options = parser.parse_args(arguments)
    if not (options.compare or options.table):
        parser.error("give --compare OLD NEW or --table FILE")
    try:
        if options.table:
            print(table(Results.read(options.table)))
        if options.compare:
            old, new = options.compare
            return report_comparison(old, Results.read(new))
    except ResultsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
