"""The last layer's rows sought in many answers: by regression, and by differences."""

from __future__ import annotations

import numpy as np
import torch
from tqdm import tqdm

from crypten_espn.masked.messages import SERVER, Party
from crypten_espn.masked.model import MaskedModel
from crypten_espn.masked.plan import Plan
from crypten_espn.masked.steps import Product

from .asking import ask


def dropped_bits(plan: Plan, number: int) -> dict[str, int]:
    """Every number of bits that some rounding of a step drops, and the words' own."""
    step = plan.steps[number]
    act = step.activation
    found = {f"shift {k}": group.shift for k, group in enumerate(act.groups)}
    if isinstance(act, Product):
        found |= {f"dropped of factor {k}": bits for k, bits in enumerate(act.dropped)}
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
    model: MaskedModel,
    x: torch.Tensor,
    *,
    batches: int,
    corrections: Party = SERVER,
    progress: str = "",
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
    asked = ask(model, x, batches=batches, corrections=corrections)
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
