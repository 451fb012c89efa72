"""Exact truncation, many times: none may be off by more than one unit.

    python -m benchmarks.truncations --count 1000000000

Random values up to the largest the ring allows, and near the edges, are masked, opened
and rescaled by the engine's kernels, as rank 0 does with D and rank 1 with t. D + t is
compared with the value shifted in plain integers, which must be met exactly or exceeded
by one, and with the carry that decides between the two. Beside it the same values are
truncated share by share, as CrypTen does between two parties, to show what the exact
way avoids.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from crypten_espn.masked import kernels

from .rows import machine, write_atomically

CHUNK = 1 << 20


@dataclasses.dataclass
class Tally:
    """What was counted.

    Args:
        count: truncations done.
        up: results of floor + 1.
        wrong: results that are neither floor nor floor + 1, or not as the carry says.
        local_wrong: values off by more than one unit when each share is truncated.
    """

    count: int = 0
    up: int = 0
    wrong: int = 0
    local_wrong: int = 0


class Truncations:
    """Streams random truncations through the kernels.

    Args:
        bits, drop: values modulo 2**bits lose `drop` bits.
        seed: of the values and masks.
    """

    def __init__(self, *, bits: int = 64, drop: int = 32, seed: int = 0) -> None:
        if not 3 < bits <= 64 or not 0 < drop <= bits - 3:
            raise ValueError(
                f"bits={bits}, drop={drop}; bits is at most 64, drop at most bits - 3."
            )
        self._bits, self._drop = bits, drop
        self._rng = np.random.default_rng(seed)
        self.tally = Tally()

    def run(self, count: int) -> None:
        """Do `count` more, at most CHUNK of them at once."""
        bits, drop, tally = self._bits, self._drop, self.tally
        rng = self._rng
        y = rng.integers(0, 1 << 64, count, dtype=np.uint64).view(np.int64)
        # Every magnitude: each value keeps a random number of its bits.
        y >>= rng.integers(66 - bits, 64, count, dtype=np.int8)
        edge = (1 << (bits - 2)) - 1
        corners = np.array([0, -1, 1, edge, -edge, 1 << drop, -(1 << drop)])
        y[: len(corners)] = corners[:count]
        mask, share = (
            rng.integers(0, 1 << 64, count, dtype=np.uint64).view(np.int64)
            for _ in range(2)
        )
        ring = bits - drop
        dtype = kernels.ring_dtype(ring)
        # The dealer's coin rounds, the client's mask hides what is kept.
        coin = mask & ((1 << drop) - 1)
        hidden = mask >> drop
        d = np.empty(count, dtype)
        theirs = share + (hidden << drop)
        kernels.truncate(y + coin - share, theirs, bits=bits, drop=drop, step=0, out=d)
        x = kernels.centred(d.astype(np.int64) - hidden, ring)
        # With the coin the sum stays below 2**63: exact in int64.
        expected = (y + coin) >> drop
        rounding = x - (y >> drop)
        ok = (rounding == 0) | (rounding == 1)
        tally.count += count
        tally.up += int((rounding == 1).sum())
        tally.wrong += int((~(ok & (x == expected))).sum())
        halves = (kernels.centred(share, bits), kernels.centred(y - share, bits))
        local = kernels.centred((halves[0] >> drop) + (halves[1] >> drop), bits)
        tally.local_wrong += int((np.abs(local - (y >> drop)) > 1).sum())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10**9, help="truncations")
    parser.add_argument("--bits", type=int, default=64, help="of the opened ring")
    parser.add_argument("--drop", type=int, default=32, help="bits to drop")
    parser.add_argument("--seed", type=int, default=0, help="of values and masks")
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    options = parser.parse_args(arguments)
    if options.count < 1:
        parser.error("--count starts at 1")
    try:
        stream = Truncations(bits=options.bits, drop=options.drop, seed=options.seed)
    except ValueError as error:
        parser.error(str(error))
    tally, start = stream.tally, time.monotonic()
    shown = 0.0
    while tally.count < options.count:
        stream.run(min(CHUNK, options.count - tally.count))
        took = time.monotonic() - start
        if sys.stderr.isatty() and took - shown > 0.5:
            shown = took
            _show(tally.count, options.count, took)
    took = time.monotonic() - start
    if sys.stderr.isatty():
        print(file=sys.stderr)
    print(
        f"{tally.count:,} truncations of {options.bits} bits by {options.drop} in "
        f"{took:.0f} s: {tally.wrong} off by more than one unit, {tally.up:,} rounded "
        f"up; share by share {tally.local_wrong:,} would be off"
    )
    if options.json:
        result = {"machine": machine(), "bits": options.bits, "drop": options.drop}
        result |= {"seconds": took, **dataclasses.asdict(tally)}
        write_atomically(options.json, json.dumps(result, indent=2) + "\n")
    return 1 if tally.wrong else 0


def _show(done: int, count: int, took: float) -> None:
    width = 40
    filled = width * done // count
    left = took * (count - done) / done
    bar = "#" * filled + "." * (width - filled)
    print(f"\r[{bar}] {done / count:6.1%}  {left:4.0f} s left", end="", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
