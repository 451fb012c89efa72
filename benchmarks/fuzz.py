"""Mutated input against every parser: refused by name, or read and used.

    python -m benchmarks.fuzz                      # all of them, some minutes
    python -m benchmarks.fuzz --plans 500 --networks 0 --onnx 0 --frames 0 \\
        --messages 0 --material 0 --seed 7

Plans: prints how many were refused, run (dealt, prepared and inferred by both parties),
and accepted but larger than what is run here; and each fault: an exception that is no
PlanError, or a signal. Network files and ONNX files likewise: refused, loaded or
converted, and each fault. Frames, messages and material end at the first fault. Leaves
with 1 if there is one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import crypten_espn  # noqa: F401 - CrypTen cannot be imported before its patches
from crypten_espn.errors import PeerError
from crypten_espn.serving.messages import decode
from tests import fuzz_networks, fuzz_onnx
from tests.fuzzing import Outcome
from tests.masked import fuzz_plans, stored
from tests.masked.cases import fuzzed_plans
from tests.serving import fuzz as messages
from tests.wire.test_fuzz import fuzz_frames


def _shown(name: str, outcome: Outcome) -> int:
    """Print what became of mutants; 1 if any was at fault."""
    for result, count in sorted(outcome.counts.items()):
        print(f"{name} {result}: {count:,}")
    print(f"{name}, faults: {len(outcome.faults):,}", flush=True)
    for number, text in outcome.faults:
        print(f"\nmutant {number}: {text}")
    return 1 if outcome.faults else 0


def _messages(count: int, seed: int) -> str:
    refused = 0
    kinds = tuple({type(message) for message in messages.EXAMPLES})
    for data in messages.mutated(count, seed=seed):
        try:
            decode(data, *kinds)
        except PeerError:
            refused += 1
    return f"messages: {count:,} read as any kind, {refused:,} refused"


def main() -> int:
    """Run what was asked for; 1 if anything was at fault."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, count in (
        ("plans", 12_000),
        ("networks", 100_000),
        ("onnx", 100_000),
        ("frames", 100_000),
        ("messages", 100_000),
        ("material", 100_000),
    ):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.frames:
        print(f"frames: {fuzz_frames(args.frames, seed=args.seed)}", flush=True)
    if args.messages:
        print(_messages(args.messages, args.seed), flush=True)
    if args.material:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "material"
            refused = stored.refused(place, count=args.material, seed=args.seed)
        print(f"material: {args.material:,} files, {refused:,} refused", flush=True)
    failed = 0
    if args.networks:
        files = fuzz_networks.files()
        outcome = fuzz_networks.run(files, seed=args.seed, count=args.networks)
        failed |= _shown("networks", outcome)
    if args.onnx:
        files = fuzz_onnx.files()
        outcome = fuzz_onnx.run(files, seed=args.seed, count=args.onnx)
        failed |= _shown("onnx", outcome)
    if args.plans:
        outcome = fuzz_plans.run(fuzzed_plans(), seed=args.seed, count=args.plans)
        failed |= _shown("plans", outcome)
    return failed


if __name__ == "__main__":
    sys.exit(main())
