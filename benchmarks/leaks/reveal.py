"""Noise at the reveal for CrypTen's protocols: what it costs and what it gains.

    python -m benchmarks.leaks.reveal              # some minutes
    python -m benchmarks.leaks.reveal --answers 4096 --json FILE

Protocol espn, local truncation, 16 bits, in the arithmetic of `espn.explain`: that of
the two parties, bit for bit.

* cost: a bundled network's classes on the bundled sample, with noise and without.
* averaging: answers to one input until the mean of their noise has the standard
  deviation that the parties' roundings give a single answer; measured on means of drawn
  noise, beside (noise / roundings)**2.
* attack: on a 16-16-3 network, a party regresses the answers to one input on the low
  bits of its own shares. |cosine| with the rows of the last layer's weights; 0.5 is
  chance. Noise is added to the same answers.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import crypten_espn as espn
from crypten_espn.convert import nearest
from crypten_espn.explain.shares import Shares
from crypten_espn.masked.planning.network import parameters_of
from crypten_espn.pillar.data import fashion_sample
from crypten_espn.protocols import settings
from crypten_espn.protocols.noise import noise
from crypten_espn.randomness import Keystream
from crypten_espn.table import aligned

from ..rows import machine
from .asking import QUARTIC
from .attacks import Regression, cosines

BUNDLED = "fashion-resnet"
BITS = 16
PART = 8192
ATTACKED = (0, 8, 12)
LOW_BITS = range(8, 44, 2)
COUNTS = (1024, 4096, 16_384, 65_536, 262_144)
# Where the noise's deviation is more than so many of the roundings', means of it are
# not drawn.
MEASURED = 64.0


@dataclass
class Recorded:
    """A party's shares, in the order of use, as `espn.explain` draws them."""

    stream: Keystream = field(default_factory=Keystream)
    words: list[torch.Tensor] = field(default_factory=list)

    def ring(self, size: Sequence[int]) -> torch.Tensor:
        drawn = self.stream.ring(tuple(size))
        self.words.append(drawn)
        return drawn


def noisy(answers: torch.Tensor, noise_bits: int) -> torch.Tensor:
    """Integers as rank 1 learns them."""
    return answers + noise(tuple(answers.shape), noise_bits=noise_bits)


def cost(
    answers: torch.Tensor, labels: torch.Tensor, noise_bits: int
) -> dict[str, float]:
    """Accuracy with noise, and how many classes stay what they were."""
    found = noisy(answers, noise_bits)
    return {
        "accuracy": float((found.argmax(1) == labels).double().mean()),
        "agreement": float((found.argmax(1) == answers.argmax(1)).double().mean()),
        "largest": float((found - answers).abs().max()) * 2.0**-BITS,
    }


def averaged(noise_bits: int, answers: int, *, trials: int) -> float:
    """Standard deviation, in units, of the mean of the noise of so many answers."""
    sums = torch.zeros(trials, dtype=torch.float64)
    for start in range(0, answers, 512):
        size = (trials, min(512, answers - start))
        sums += noise(size, noise_bits=noise_bits).double().sum(1)
    return float((sums / answers).std())


def average_until(noise_bits: int, roundings: float, *, trials: int = 200) -> int:
    """Answers, to a tenth, until the mean's noise is no more than the roundings'.

    Args:
        noise_bits: of the noise.
        roundings: standard deviation of one answer without noise, in units.
        trials: means that are drawn for each number of answers.
    """
    answers = 1
    while averaged(noise_bits, answers, trials=trials) > roundings:
        answers = math.ceil(answers * 1.1)
    return answers


def small_network(seed: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """A 16-16-3 network and one input."""
    torch.manual_seed(seed)
    network = torch.nn.Sequential(
        torch.nn.Linear(16, 16),
        espn.PolynomialActivation(QUARTIC),
        torch.nn.Linear(16, 3),
    )
    return network.eval().requires_grad_(False), torch.randn(1, 16) * 2


def answered(
    private: espn.PrivateNetwork, x: torch.Tensor, draws: Recorded
) -> torch.Tensor:
    """Logits (batch, n) as integers, by the parties' own arithmetic."""
    # CrypTen cannot be imported before its patches, which crypten_espn applies.
    from crypten.encoder import FixedPointEncoder

    encoder = FixedPointEncoder(precision_bits=BITS)
    with settings(protocol="espn", truncation="local") as chosen:
        shares = Shares(encoder, chosen, draws)
        held = {
            name: shares.share(
                encoder.encode(nearest(torch.from_numpy(array), frac_bits=BITS))
            )
            for name, array in parameters_of(private).items()
        }
        held[private.input_names[0]] = shares.share(encoder.encode(x))
        for name, layer in private.layers.items():
            values = [held[given] for given in private._graph[name]]
            held[name] = layer.apply(shares, values)
    return held[private.output_names[0]].total


Kind = tuple[int, int]


def attack(
    noise_bits: Sequence[int], counts: Sequence[int], *, seed: int = 0
) -> dict[int, list[float]]:
    """The median |cosine| after each number of answers, by bits of noise.

    The party tries every word of as many elements as the last layer has inputs, and
    every number of low bits of it. Which is best is chosen without noise, after all
    answers: that favours the attack.
    """
    network, x = small_network(seed)
    rows = network.get_parameter("2.weight").double().numpy().T
    private = espn.convert(network, x, protocol="espn")
    sums: dict[int, dict[Kind, Regression]] = {bits: {} for bits in noise_bits}
    found: dict[int, list[dict[Kind, float]]] = {bits: [] for bits in noise_bits}
    asked = 0
    for count in counts:
        while asked < count:
            size = min(PART, count - asked)
            # The parties' shares from the seed, so that a run can be repeated.
            key = asked.to_bytes(8, "little") + seed.to_bytes(8, "little")
            draws = Recorded(Keystream(key))
            answers = answered(private, x.expand(size, -1), draws)
            words = [word for word in draws.words if word.shape == (size, 16)]
            logits = {
                bits: noisy(answers, bits).double().numpy() for bits in noise_bits
            }
            for place, word in enumerate(words):
                for low in LOW_BITS:
                    part = (word & ((1 << low) - 1)).double().numpy() * 2.0**-low - 0.5
                    for bits, z in logits.items():
                        kinds = sums[bits]
                        kinds.setdefault((place, low), Regression()).add(part, z)
            asked += size
        for bits in noise_bits:
            found[bits].append(
                {
                    kind: float(np.median(cosines(regression.slopes(), rows)))
                    for kind, regression in sums[bits].items()
                }
            )
    last = found[min(noise_bits)][-1]
    best = max(last, key=last.__getitem__)
    return {bits: [each[best] for each in found[bits]] for bits in noise_bits}


def measured(
    *, images: int, repeated: int, answers: int, noise_bits: Sequence[int]
) -> list[dict[str, object]]:
    """All three measurements.

    Args:
        images: of the bundled sample, for the cost.
        repeated: answers to one image, for the roundings' deviation.
        answers: to one input of the small network, at most.
        noise_bits: for the cost.
    """
    sample = fashion_sample()
    x, labels = sample.normalization(sample.images[:images]), sample.labels[:images]
    private = espn.convert(espn.bundled(BUNDLED), x[:4], protocol="espn")
    plain = torch.cat([answered(private, part, Recorded()) for part in x.split(32)])
    first = x[:1].expand(32, -1, -1, -1)
    same = torch.cat(
        [answered(private, first, Recorded()) for _ in range(repeated // 32)]
    )
    roundings = float(same.double().std(0).square().mean().sqrt())
    rows: list[dict[str, object]] = []
    for bits in noise_bits:
        spread = math.sqrt(max(4**bits - 1, 0) / 12)
        row: dict[str, object] = {
            "measurement": "cost",
            "network": BUNDLED,
            "noise_bits": bits,
            **cost(plain, labels, bits),
            "roundings": roundings,
            "expected_answers": max(1, round((spread / roundings) ** 2)),
        }
        if spread / roundings < MEASURED:
            row["averaged_answers"] = average_until(bits, roundings)
        rows.append(row)
    counts = [count for count in COUNTS if count <= answers]
    for bits, values in attack(ATTACKED, counts).items():
        rows.extend(
            {
                "measurement": "attack",
                "network": "16-16-3, seed 0",
                "noise_bits": bits,
                "answers": count,
                "cosine": value,
            }
            for count, value in zip(counts, values, strict=True)
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--repeated", type=int, default=256)
    parser.add_argument("--answers", type=int, default=262_144)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    rows = measured(
        images=args.images,
        repeated=args.repeated,
        answers=args.answers,
        noise_bits=(0, 4, 6, 8, 10, 12, 14, 16),
    )
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    table: list[tuple[str, ...]] = [columns]
    for row in rows:
        values = (row.get(column, "") for column in columns)
        table.append(
            tuple(f"{v:.4f}" if isinstance(v, float) else str(v) for v in values)
        )
    print("\n".join(aligned(table, left=2)))
    if args.json is not None:
        text = json.dumps({"machine": machine(), "rows": rows}, indent=1)
        args.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
