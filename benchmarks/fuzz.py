"""Mutated plans against the masked engine: refused by name, or dealt and inferred.

    python -m benchmarks.fuzz --plans 12000
    python -m benchmarks.fuzz --plans 500 --seed 7

Prints how many were refused, run (dealt, prepared and inferred by both parties), and
accepted but larger than what is run here; and each fault: an exception that is no
PlanError, or a signal. Leaves with 1 if there is one.
"""

from __future__ import annotations

import argparse
import sys

import crypten_espn  # noqa: F401 - CrypTen cannot be imported before its patches
from tests.masked import fuzz_plans
from tests.masked.cases import fuzzed_plans


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--plans", type=int, default=12_000, help="mutants to try")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    outcome = fuzz_plans.run(fuzzed_plans(), seed=args.seed, count=args.plans)
    for result in (fuzz_plans.REFUSED, fuzz_plans.RUN, fuzz_plans.LARGE):
        print(f"{result}: {outcome.counts[result]:,}")
    print(f"faults: {len(outcome.faults):,}")
    for number, text in outcome.faults:
        print(f"\nmutant {number}: {text}")
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    sys.exit(main())
