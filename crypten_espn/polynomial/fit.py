"""The integers of least squared error: the closest vector of a lattice."""

from __future__ import annotations

import math

import numpy as np

# What an error counts far from where inputs crowd, against 1 there.
FLOOR = 0.02


def best_numerators(
    points: np.ndarray,
    values: np.ndarray,
    degree: int,
    frac_bits: int,
    spread: float | None,
) -> list[int]:
    """argmin over integer c of the squared error of c / 2**frac_bits, constant first.

    Args:
        points, values: (n,) float64, the samples.
        spread: errors count by the normal density of this width and `FLOOR`; evenly
            if None.
    """
    basis = points[:, None] ** np.arange(degree + 1) / 2.0**frac_bits
    if spread is not None:
        weight = np.sqrt(np.exp(-((points / spread) ** 2) / 2) + FLOOR)
        basis, values = basis * weight[:, None], values * weight
    return _closest_integers(basis, values)


def _closest_integers(basis: np.ndarray, target: np.ndarray) -> list[int]:
    """argmin over integer c of |basis @ c - target|, solved to optimality.

    1. QR: only the triangular factor matters, the rest of the error is constant.
    2. LLL-reduce its columns, remembering the unimodular change of basis.
    3. Schnorr-Euchner enumeration from the last coordinate, nearest integers first,
       pruned by the best distance so far: exhaustive within that radius.

    Source: Agrell, Eriksson, Vardy, Zeger, IEEE Trans. Information Theory 48(8), 2002.
    """
    q, r = np.linalg.qr(basis)
    reduced, change = _lll(r)
    q2, r2 = np.linalg.qr(reduced)
    centre = q2.T @ (q.T @ target)
    z = _enumerate(r2, centre)
    d = len(z)
    return [sum(change[i][j] * z[j] for j in range(d)) for i in range(d)]


def _triangle(columns: np.ndarray) -> np.ndarray:
    return np.linalg.qr(columns)[1]


def _lll(columns: np.ndarray) -> tuple[np.ndarray, list[list[int]]]:
    d = columns.shape[1]
    change = [[int(i == j) for j in range(d)] for i in range(d)]
    b = columns.copy()

    def add_column(target: int, source: int, factor: int) -> None:
        b[:, target] += factor * b[:, source]
        for row in change:
            row[target] += factor * row[source]

    k = 1
    while k < d:
        for j in range(k - 1, -1, -1):
            r = _triangle(b)
            factor = round(float(r[j, k] / r[j, j]))
            if factor:
                add_column(k, j, -factor)
        r = _triangle(b)
        if (
            r[k, k] ** 2
            >= (0.99 - (r[k - 1, k] / r[k - 1, k - 1]) ** 2) * r[k - 1, k - 1] ** 2
        ):
            k += 1
        else:
            b[:, [k - 1, k]] = b[:, [k, k - 1]]
            for row in change:
                row[k - 1], row[k] = row[k], row[k - 1]
            k = max(k - 1, 1)
    return b, change


def _enumerate(r: np.ndarray, centre: np.ndarray) -> list[int]:
    d = len(centre)
    best: list[int] = []
    best_distance = math.inf
    z = [0] * d

    def descend(level: int, distance: float) -> None:
        nonlocal best, best_distance
        if level < 0:
            best, best_distance = z.copy(), distance
            return
        rest = centre[level] - sum(r[level, j] * z[j] for j in range(level + 1, d))
        middle = rest / r[level, level]
        nearest = round(middle)
        step = 1 if middle >= nearest else -1
        candidate, offset = nearest, 0
        while True:
            cost = distance + float(rest - r[level, level] * candidate) ** 2
            if cost >= best_distance:
                return
            z[level] = candidate
            descend(level - 1, cost)
            offset += 1
            sign = step if offset % 2 else -step
            candidate = nearest + sign * ((offset + 1) // 2)

    descend(d - 1, 0.0)
    return best
