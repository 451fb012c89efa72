"""The generator of masks beside torch.randint: bytes a second on one core.

    python -m benchmarks.randomness --json FILE

Both fill a new int64 tensor of uniform 64-bit ring elements, as CrypTen does for each
mask; `fill` writes into memory that is already there. Repetitions of the two alternate,
so that whatever else the machine does hits both.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crypten_espn.randomness import Keystream

from .rows import Spread, machine, write_atomically

ELEMENT_BYTES = 8
SIZES = (100, 1_000, 10_000, 100_000, 1_000_000, 10_000_000)


def generators(size: int) -> dict[str, Callable[[], Any]]:
    """What is compared, ready to be called."""
    stream = Keystream()
    out = np.zeros(size, dtype=np.int64)
    low, high = -(2**63), 2**63 - 1
    return {
        "torch.randint": lambda: torch.randint(low, high, (size,)),
        "Keystream.ring": lambda: stream.ring(size),
        "Keystream.fill": lambda: stream.fill(out),
    }


def measure(size: int, *, repeat: int, seconds: float) -> dict[str, Spread]:
    """Gigabytes a second of each generator.

    Args:
        size: elements a call.
        repeat: samples of each.
        seconds: how long a sample takes, about.
    """
    compared = generators(size)
    calls = {name: _calls(draw, seconds) for name, draw in compared.items()}
    samples: dict[str, list[float]] = {name: [] for name in compared}
    for _ in range(repeat):
        for name, draw in compared.items():
            took = _seconds(draw, calls[name])
            samples[name].append(size * ELEMENT_BYTES * calls[name] / took / 1e9)
    return {name: Spread.of(values) for name, values in samples.items()}


def _calls(draw: Callable[[], Any], seconds: float) -> int:
    _seconds(draw, 2)
    return max(1, round(3 * seconds / _seconds(draw, 3)))


def _seconds(draw: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        draw()
    return time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.1, help="a sample")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    print(f"{'elements':>10}  {'generator':<15} {'GB/s: median [min, max]':<28} ratio")
    for size in options.sizes:
        speeds = measure(size, repeat=options.repeat, seconds=options.seconds)
        base = speeds["torch.randint"].median
        for name, speed in speeds.items():
            ratio = speed.median / base
            print(f"{size:>10}  {name:<15} {speed!s:<28} {ratio:.2f}")
            rows.append(
                {
                    "elements": size,
                    "generator": name,
                    "gigabytes_per_s": {
                        "median": speed.median,
                        "min": speed.min,
                        "max": speed.max,
                    },
                    "ratio_to_randint": ratio,
                }
            )
    if options.json:
        text = json.dumps({"machine": machine(), "rows": rows}, indent=2)
        write_atomically(options.json, text + "\n")


if __name__ == "__main__":
    main()
