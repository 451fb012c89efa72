"""What a client that follows the protocol can learn from many answers to one input.

    python -m benchmarks.leaks                 # all three attacks, a few minutes
    python -m benchmarks.leaks --queries 32000 --networks 2
    python -m benchmarks.leaks --corrections client

Three attacks, each on the engine itself with both parties in one process:

* words: regress the logits on every word that the client drew, holds or received,
  modulo each number of bits that a rounding drops. Rows of the last layer's weights
  appear where the client knows how its values were rounded. The attack is also given
  the coins themselves, which only the dealer knows: that it finds the rows with them
  shows that it would have found them.
* network: the same on a bundled network, one image asked again and again.
* differences: the most frequent differences of two answers are rows of the last layer
  when logits leave as exact integers.

Chance is a median |cosine| of 0.5 between vectors of three logits.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from tqdm import tqdm

import crypten_espn as espn
from crypten_espn.masked.messages import SERVER, Party
from crypten_espn.masked.planning import masked_model
from crypten_espn.pillar.data import fashion_sample
from crypten_espn.table import aligned

from ..rows import machine
from .asking import ask, small_model
from .attacks import Cosines, attack_differences, attack_words

BUNDLED = "fashion-resnet"


def _summary(
    attack: str, network: str, queries: int, words: Cosines, control: Cosines
) -> dict[str, object]:
    medians = {name: float(np.median(values)) for name, values in words.items()}
    worst = max(medians, key=medians.__getitem__)
    least, most = (
        pick(float(np.median(values)) for values in control.values())
        for pick in (min, max)
    )
    return {
        "attack": attack,
        "network": network,
        "queries": queries,
        "kinds": len(medians),
        "median": float(np.median(np.concatenate(list(words.values())))),
        "lowest": min(medians.values()),
        "highest": medians[worst],
        "word": worst,
        "control": f"{least:.3f} to {most:.3f}",
    }


def _words(networks: int, queries: int, corrections: Party) -> dict[str, object]:
    words: dict[str, list[np.ndarray]] = {}
    control: dict[str, list[np.ndarray]] = {}
    for seed in range(networks):
        model = small_model(seed)
        torch.manual_seed(100 + seed)
        x = (torch.randn(1, 1, 4, 4) * 2).repeat(128, 1, 1, 1)
        found = attack_words(
            model,
            x,
            batches=queries // 128,
            corrections=corrections,
            progress=f"network {seed}",
        )
        for into, values in zip((words, control), found, strict=True):
            for name, value in values.items():
                into.setdefault(name, []).append(value)
    joined, known = (
        {name: np.concatenate(values) for name, values in which.items()}
        for which in (words, control)
    )
    network = f"16-16-3, {networks} seeds"
    return _summary("words", network, queries // 128 * 128, joined, known)


def _network(queries: int, corrections: Party) -> dict[str, object]:
    sample = fashion_sample()
    images = sample.normalization(sample.images[:32])
    model = masked_model(espn.convert(espn.bundled(BUNDLED), images))
    x = images[:1].repeat(32, 1, 1, 1)
    found = attack_words(
        model,
        x,
        batches=queries // 32,
        corrections=corrections,
        progress="fashion",
    )
    return _summary("network", BUNDLED, queries // 32 * 32, *found)


def _differences(queries: int) -> dict[str, object]:
    model = small_model(0)
    torch.manual_seed(100)
    x = (torch.randn(1, 1, 4, 4) * 2).repeat(100, 1, 1, 1)
    asked = ask(model, x, batches=queries // 100)
    answers = list(tqdm(asked, "differences", total=queries // 100))
    logits = np.concatenate([answer.logits for answer in answers])
    rows = model.weights.integers[-1].reshape(-1, 3)
    bits = model.plan.output.noise_bits
    return {
        "attack": "differences",
        "network": "16-16-3, seed 0",
        "queries": len(logits),
        "noise_bits": bits,
        "found": attack_differences(logits, rows, top=32, noise_bits=bits),
        "rows": len(rows),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the attacks and print what they find."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", type=int, default=8)
    parser.add_argument("--queries", type=int, default=256_000)
    parser.add_argument("--images", type=int, default=6_560)
    parser.add_argument("--answers", type=int, default=8_000)
    parser.add_argument("--corrections", choices=get_args(Party), default=SERVER)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    rows = [
        _words(args.networks, args.queries, args.corrections),
        _network(args.images, args.corrections),
    ]
    rows.append(_differences(args.answers))
    columns = (
        "attack", "network", "queries", "kinds", "median", "lowest", "highest", "word",
        "control", "found",
    )  # fmt: skip
    table: list[tuple[str, ...]] = [columns]
    for row in rows:
        table.append(
            tuple(
                f"{value:.3f}" if isinstance(value, float) else str(value)
                for value in (row.get(c, "") for c in columns)
            )
        )
    print("\n".join(aligned(table, left=len(columns))))
    if args.json is not None:
        text = json.dumps({"machine": machine(), "rows": rows}, indent=1)
        args.json.write_text(text + "\n")
    return 0
