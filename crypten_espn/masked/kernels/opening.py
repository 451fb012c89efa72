"""Passes at both openings of a polynomial.

What the client receives of the first, and the next value from both halves of the
second, under the mask that joined one of them.
"""

from __future__ import annotations

import numpy as np

from ...compiled import compiled, heats
from .ring import require, same_ring, within


@compiled
def _shifted_openings(
    c: np.ndarray, deltas: np.ndarray, bits: int, shifts: np.ndarray, out: np.ndarray
) -> None:
    mask = np.int64(-1) if bits == 64 else (np.int64(1) << bits) - 1
    for k in range(out.shape[0]):
        line = out[k]
        shift = shifts[k]
        if k == 0:
            for i in range(c.shape[0]):
                line[i] = (np.int64(c[i]) & mask) >> shift
        else:
            delta = deltas[k - 1]
            for i in range(c.shape[0]):
                line[i] = ((np.int64(c[i]) + np.int64(delta[i])) & mask) >> shift


@compiled
def _truncate(
    mine: np.ndarray,
    theirs: np.ndarray,
    bits: int,
    drop: int,
    step: int,
    out: np.ndarray,
) -> None:
    mask = np.int64(-1) if bits == 64 else (np.int64(1) << bits) - 1
    offset = np.int64(1) << (bits - 2)
    keep = (np.int64(1) << (bits - drop)) - 1
    reduced = np.int64(1) << (bits - 2 - drop)
    for i in range(out.shape[0]):
        c = (mine[i] + (theirs[i] << step) + offset) & mask
        # The shift is logical: the bits an arithmetic one would smear are masked.
        out[i] = ((c >> drop) & keep) - reduced


@compiled
def _hide(words: np.ndarray, mask: np.ndarray, kept: int) -> None:
    for i in range(mask.shape[0]):
        words[i] += np.int64(mask[i]) << kept


def shifted_openings(
    c: np.ndarray, deltas: np.ndarray, *, bits: int, shifts: np.ndarray, out: np.ndarray
) -> None:
    """What the client receives of an opening: c_k >> s_k of every group.

    Args:
        c: (n,) modulo 2**bits, int32 or int64.
        deltas: (groups - 1, n), what each further group's mask adds to the first's.
        shifts: (groups,) int64.
        out: (groups, n) in c's type; row k in [0, 2**(bits - s_k)).
    """
    groups = len(shifts)
    require(
        c.ndim == 1
        and out.shape == (groups, len(c))
        and deltas.shape == (groups - 1, len(c))
        and shifts.shape == (groups,)
        and same_ring(c, deltas, out)
        and shifts.dtype == np.int64
        and 1 <= bits <= 64
        and groups > 0
        and within(0, shifts, bits),
        "shifted_openings",
        c,
        deltas,
        shifts,
        out,
    )
    _shifted_openings(c, deltas, bits, shifts, out)


def truncate(
    mine: np.ndarray,
    theirs: np.ndarray,
    *,
    bits: int,
    drop: int,
    step: int,
    out: np.ndarray,
) -> None:
    """D = (c >> drop) - 2**(bits-2-drop), c = mine + theirs * 2**step + 2**(bits-2).

    Args:
        mine: (n,) int64.
        theirs: (n,) int64, the other share's bits from `step` on.
        out: (n,) in the type of the ring modulo 2**(bits - drop).
    """
    fits = mine.shape == theirs.shape == out.shape and mine.ndim == 1
    fits = fits and mine.dtype == theirs.dtype == np.int64 and same_ring(out)
    fits = fits and 0 <= drop <= bits - 2 <= 62 and 0 <= step < 64
    require(fits, "truncate", mine, theirs, out)
    _truncate(mine, theirs, bits, drop, step, out)


def hide(words: np.ndarray, mask: np.ndarray, *, kept: int) -> None:
    """Add the second opening's mask, mask * 2**kept, to one line of shares.

    Args:
        words: (n,) int64, changed in place.
        mask: (n,).
        kept: low bits of the words that the mask leaves alone.
    """
    fits = words.shape == mask.shape and words.ndim == 1
    fits = fits and words.dtype == np.int64 and same_ring(mask) and 0 <= kept < 64
    require(fits, "hide", words, mask)
    _hide(words, mask, kept)


@heats
def _all_types() -> None:
    half, shifts = np.zeros(4, np.int64), np.array([1, 2])
    for bits, dtype in ((32, np.int32), (40, np.int64)):
        c, openings = np.zeros(4, dtype), np.zeros((2, 4), dtype)
        # A chunk of a batch reads a part of each row.
        for deltas in (np.zeros((1, 4), dtype), np.zeros((2, 8), dtype)[:1, 2:6]):
            shifted_openings(c, deltas, bits=bits, shifts=shifts, out=openings)
        truncate(half, half, bits=64, drop=64 - bits, step=0, out=c)
        hide(half, c, kept=16)
