"""Two measured cells and a folder of results that holds them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from benchmarks.accuracy import rows as accuracy
from benchmarks.rows import Results, Row, Skipped, Spread

LOOPBACK = Row(
    model="minionn",
    activation="masked",
    engine="masked",
    network="loopback",
    rtt_ms=0.0,
    mbit=None,
    batch=1,
    threads=1,
    rounds=16,
    bytes_sent=(1_000_000, 500_000),
    online_s=Spread.of([0.02, 0.03, 0.04]),
    offline_s=Spread.of([0.1]),
    total_s=Spread.of([0.13]),
    offline_bytes=5000,
    max_abs_error=0.01,
    argmax_agreement=1.0,
)
WAN = dataclasses.replace(
    LOOPBACK, network="wan", rtt_ms=100.0, mbit=100.0, online_s=Spread.of([1.1])
)


def write_results(path: Path) -> None:
    """inference.json, accuracy.json and commands.json."""
    results = Results(path / "inference.json")
    results.add(LOOPBACK)
    results.add(WAN)
    results.skip(Skipped("vgg16", "espn", "crypten+gloo", "wan", "<too long>"))
    row = accuracy.Accuracy(
        *("net", "relu", "masked", 8, 4, 0.5, 0.5, 0.625, 0.875, 0.01, 0.2, 0.3)
    )
    accuracy.write(path / "accuracy.json", results.machine, [row])
    commands = {"inference": "python -m benchmarks.inference"}
    (path / "commands.json").write_text(json.dumps(commands))
