"""What a client that follows the protocol can learn from many answers to one input.

    python -m benchmarks.leaks                 # all three attacks, a few minutes
    python -m benchmarks.leaks --queries 32000 --networks 2

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
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import crypten_espn as espn
from crypten_espn.masked import kernels
from crypten_espn.masked.dealing import Dealing, coins
from crypten_espn.masked.drivers import together
from crypten_espn.masked.inference import chunks, client, server
from crypten_espn.masked.material import (
    ClientMaterial,
    Pairing,
    client_draws,
    inference_seeds,
)
from crypten_espn.masked.messages import CLIENT, DEALER, SERVER, Send
from crypten_espn.masked.model import MaskedModel
from crypten_espn.masked.plan import Plan
from crypten_espn.masked.planning import masked_model
from crypten_espn.masked.preparing import ClientPreparation, ServerPreparation
from crypten_espn.pillar.data import fashion_sample
from crypten_espn.randomness import Keystream
from crypten_espn.table import aligned

from .rows import machine

QUARTIC = espn.Polynomial((322, 512, 160, 0, -3), 10, (-5.0, 5.0))
BUNDLED = "fashion-resnet"


def small_model(seed: int, *, width: int = 16, logits: int = 3) -> MaskedModel:
    """A network of 16 inputs, one hidden layer and a few logits, weights at random."""
    torch.manual_seed(seed)
    network = torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(16, width),
        espn.PolynomialActivation(QUARTIC),
        torch.nn.Linear(width, logits),
    ).eval()
    images = torch.randn(64, 1, 4, 4) * 2
    return masked_model(espn.convert(network.requires_grad_(False), images))


@dataclass
class Answer:
    """One batch of queries of one input.

    Args:
        logits: (batch, n) integers as the client learns them.
        words: by name, (batch, elements) of what the client drew, holds or received.
        coins: likewise, what only the dealer or the server knows.
    """

    logits: np.ndarray
    words: dict[str, np.ndarray]
    coins: dict[str, np.ndarray]


def ask(model: MaskedModel, x: torch.Tensor, *, batches: int) -> Iterator[Answer]:
    """Query the engine `batches` times with the same batch; note all the client sees.

    Args:
        x: (batch, *input shape); rows are usually equal.
    """
    plan, batch, seed = model.plan, len(x), bytes(range(16))
    dealing = Dealing(plan, seed=seed)
    ours = ServerPreparation(plan, model.weights, dealing.seeds[0])
    theirs = ClientPreparation(plan, dealing.seeds[1])
    together({SERVER: ours.open_weights(), CLIENT: theirs.open_weights()})
    # The dealer's secrets once more, for the control.
    root = Keystream(seed)
    ratchets = [
        inference_seeds(own)
        for own in (root.fork(b"dealer").bytes(16), dealing.seeds[0])
    ]
    encoded = plan.encode(x)
    for index in range(batches):
        pairing = Pairing(bytes(16), index, batch)
        ready, offline = together(
            {
                DEALER: dealing.deal(index, batch),
                SERVER: ours.prepare(pairing),
                CLIENT: theirs.prepare(pairing),
            },
            keep=True,
        )
        held = _held(plan, ready[CLIENT], batch)
        values, online = together(
            {
                SERVER: server(plan, model.weights, ready[SERVER]),
                CLIENT: client(plan, ready[CLIENT], encoded),
            },
            keep=True,
        )
        for event in offline.sends:
            if event[0] == CLIENT:
                held |= _joined(f"half {len(held)}", [event[1]], batch)
        held |= _online(plan, online.sends, batch)
        own, at_server = (ratchet.take(index) for ratchet in ratchets)
        z = kernels.centred(values[CLIENT], plan.output.ring).reshape(batch, -1)
        yield Answer(z, held, _coins(plan, own, at_server, ready[SERVER], batch))


def _held(plan: Plan, material: ClientMaterial, batch: int) -> dict[str, np.ndarray]:
    """Everything the client's seed gives, and what it made of it."""
    held = {
        "input mask": material.input_mask.reshape(batch, -1),
        "output": material.output.reshape(batch, -1).copy(),
    }
    for number, drawn in enumerate(client_draws(plan, material.seed, batch)):
        held[f"linear {number}"] = drawn.linear.reshape(batch, -1)
        if drawn.values is not None and drawn.hidden is not None:
            held[f"hidden {number}"] = drawn.hidden.reshape(batch, -1)
            for case in range(2):
                for place, line in enumerate(drawn.values[case]):
                    name = f"value {number} {case} {place}"
                    held[name] = line.reshape(batch, -1)
    return held


def _online(
    plan: Plan, sends: list[tuple[str, Send]], batch: int
) -> dict[str, np.ndarray]:
    """Every online message, with the chunks of a large batch joined."""
    parts = len(chunks(batch))
    found: dict[str, np.ndarray] = {}
    for party in (SERVER, CLIENT):
        events = [event for sender, event in sends if sender == party]
        if party == CLIENT:
            found |= _joined("input", [events.pop(0)], batch)
        for number in range(len(plan.steps)):
            mine, events = events[:parts], events[parts:]
            found |= _joined(f"{party} message {number}", mine, batch)
        for event in events:
            found |= _joined("logits' share", [event], batch)
    return found


def _joined(name: str, events: list[Send], batch: int) -> dict[str, np.ndarray]:
    columns = zip(*[event.parts for event in events], strict=True)
    return {
        f"{name} part {place}": np.concatenate(
            [array.reshape(-1) for array, _ in column]
        ).reshape(batch, -1)
        for place, column in enumerate(columns)
    }


def _coins(plan, own, at_server, material, batch) -> dict[str, np.ndarray]:
    """What the client must not know: the dealer's coins, the low bits of c."""
    found = {}
    for number, coin in enumerate(coins(plan, own, at_server, batch)):
        if coin is None:
            continue
        step = plan.steps[number]
        scale = 2.0**-step.activation.drop
        found[f"second coins {number}"] = coin.rounding.reshape(batch, -1) * scale
        c = material.linear[number].reshape(batch, -1).astype(np.int64)
        deltas = material.deltas[number]
        for k, group in enumerate(step.activation.groups):
            own_c = c if k == 0 else c + deltas[k - 1].reshape(batch, -1)
            low = own_c & ((1 << group.shift) - 1)
            found[f"first coins {number} {k}"] = low * 2.0**-group.shift
    return found


def dropped_bits(plan: Plan, number: int) -> dict[str, int]:
    """Every number of bits that some rounding of a step drops, and the words' own."""
    step = plan.steps[number]
    act = step.activation
    found = {f"shift {k}": group.shift for k, group in enumerate(act.groups)}
    found |= {"drop": act.drop, "dropped by the client": act.drop - act.kept}
    found |= {"kept": act.kept, "ring": step.ring, "word": 64}
    return {name: bits for name, bits in found.items() if bits}


class Regression:
    """Least squares of the logits on one kind of word, from sums over batches."""

    def __init__(self) -> None:
        self.count = 0
        self._xx = self._xz = self._x = self._z = np.zeros(())

    def add(self, x: np.ndarray, z: np.ndarray) -> None:
        """Rows x (batch, n) beside logits z (batch, m)."""
        self.count += len(x)
        self._xx = self._xx + x.T @ x
        self._xz = self._xz + x.T @ z
        self._x = self._x + x.sum(0)
        self._z = self._z + z.sum(0)

    def slopes(self) -> np.ndarray:
        """(n, m), how the logits move with each word."""
        xx = self._xx - np.outer(self._x, self._x) / self.count
        xz = self._xz - np.outer(self._x, self._z) / self.count
        return np.linalg.lstsq(xx, xz, rcond=None)[0]


def cosines(slopes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """|cosine| of each row of slopes with the same row of the true weights."""
    norms = np.linalg.norm(slopes, axis=1) * np.linalg.norm(rows, axis=1)
    usable = norms > 0
    return np.abs((slopes * rows).sum(1))[usable] / norms[usable]


Cosines = dict[str, np.ndarray]


def attack_words(
    model: MaskedModel, x: torch.Tensor, *, batches: int, progress: str = ""
) -> tuple[Cosines, Cosines]:
    """|cosine| of the last layer's rows by word and bits, and by coin.

    Only words of as many elements as the last layer has inputs can show its rows; a
    bundled network's are summed over the pixels that its last pool reads.
    """
    rows = model.weights.integers[-1].reshape(-1, *model.plan.logits_shape[-1:])
    rows = rows.astype(np.float64)
    last = len(model.plan.steps) - 1
    sums: dict[str, Regression] = {}
    known: dict[str, Regression] = {}
    widths = dropped_bits(model.plan, last)
    asked = ask(model, x, batches=batches)
    for answer in tqdm(asked, progress, total=batches, disable=not progress):
        z = answer.logits.astype(np.float64)
        for name, words in answer.words.items():
            if f" {last}" not in name and last > 0:
                continue
            for role, bits in widths.items():
                part = _pooled(words, bits, len(rows))
                if part is not None:
                    key = f"{name}, modulo {role}"
                    sums.setdefault(key, Regression()).add(part, z)
        for name, coin in answer.coins.items():
            if f"coins {last}" in name:
                part = (coin - 0.5).reshape(len(z), -1, len(rows)).sum(1)
                known.setdefault(name, Regression()).add(part, z)
    found, control = (
        {name: cosines(r.slopes(), rows) for name, r in which.items()}
        for which in (sums, known)
    )
    return found, control


def _uniform(words: np.ndarray, bits: int) -> np.ndarray:
    """Words modulo 2**bits as numbers in [-0.5, 0.5)."""
    if bits >= 64:
        return words.astype(np.float64) * 2.0**-63
    low = words.astype(np.int64) & ((1 << bits) - 1)
    return low * 2.0**-bits - 0.5


def _pooled(words: np.ndarray, bits: int, inputs: int) -> np.ndarray | None:
    """Words modulo 2**bits summed over pixels; None where they do not fit the layer."""
    if words.shape[1] % inputs:
        return None
    return _uniform(words, bits).reshape(len(words), -1, inputs).sum(1)


def attack_differences(
    logits: np.ndarray, rows: np.ndarray, *, top: int, noise_bits: int
) -> int:
    """How many rows of the last layer are among the most frequent differences.

    Args:
        logits: (queries, 3) integers of answers to one input.
        rows: (inputs, 3) integer weights.
        top: how many differences are looked at, exact and rounded to 2**noise_bits.
    """
    true = {tuple(sign * row) for row in rows.astype(np.int64) for sign in (1, -1)}
    hits = set()
    for unit in {1, 1 << noise_bits}:
        values, _ = _frequent(np.rint(logits / unit).astype(np.int64), top)
        targets = {tuple(np.rint(np.array(t) / unit).astype(np.int64)): t for t in true}
        for value in map(tuple, values):
            if any(value) and value in targets:
                hits.add(max(targets[value], tuple(-np.array(targets[value]))))
    return len(hits)


def _frequent(z: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """The most frequent differences between two rows."""
    z = np.unique(z, axis=0)
    span = np.ptp(z, axis=0).astype(np.int64) + 1
    codes = ((z[:, 0] * 2 * span[1]) + z[:, 1]) * 2 * span[2] + z[:, 2]
    order = np.argsort(codes)
    codes = codes[order]
    differences = np.concatenate(
        [codes[lag:] - codes[:-lag] for lag in range(1, len(codes))]
        or [np.empty(0, dtype=np.int64)]
    )
    value, count = np.unique(differences, return_counts=True)
    best = np.argsort(-count)[:top]
    value = value[best]
    last = (value + span[2]) % (2 * span[2]) - span[2]
    value = (value - last) // (2 * span[2])
    middle = (value + span[1]) % (2 * span[1]) - span[1]
    first = (value - middle) // (2 * span[1])
    return np.stack([first, middle, last], axis=1), count[best]


# ---------------------------------------------------------------- the command


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


def _words(networks: int, queries: int) -> dict[str, object]:
    words: dict[str, list[np.ndarray]] = {}
    control: dict[str, list[np.ndarray]] = {}
    for seed in range(networks):
        model = small_model(seed)
        torch.manual_seed(100 + seed)
        x = (torch.randn(1, 1, 4, 4) * 2).repeat(128, 1, 1, 1)
        found = attack_words(
            model, x, batches=queries // 128, progress=f"network {seed}"
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


def _network(queries: int) -> dict[str, object]:
    sample = fashion_sample()
    images = sample.normalization(sample.images[:32])
    model = masked_model(espn.convert(espn.bundled(BUNDLED), images))
    x = images[:1].repeat(32, 1, 1, 1)
    found = attack_words(model, x, batches=queries // 32, progress="fashion")
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
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    rows = [_words(args.networks, args.queries), _network(args.images)]
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


if __name__ == "__main__":
    sys.exit(main())
