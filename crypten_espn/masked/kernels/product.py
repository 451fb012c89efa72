"""Product passes: from two opened factors to shares of their product.

An opened factor c = z + 2**(m-2) + r is shifted by the bits that nobody multiplies by:
D = (c >> s) - 2**(m-2-s), and x = D + t, where the dealer knows t = -(r >> s), a
logical shift if the top bit of c is 1 and an arithmetic one if it is 0. So

    x1 x2 = D1 D2 + D1 t2 + D2 t1 + t1 t2,

t1 and t2 in two cases each, their product in four.

A row has one input's words from the dealer: t1 in both cases and the four products,
each as long as the result, then t2 in both cases, each as long as the second factor.
Case 0 is that of a top bit of 1; product 2 a + b is of case a of the first factor and b
of the second.

Source: Beaver, CRYPTO 1991, of opened factors; two-valued masks as in `activation`.
"""

from __future__ import annotations

import numpy as np

from ...compiled import compiled, heats
from .ring import require, same_ring


@compiled
def _product_share(
    first: np.ndarray,
    second: np.ndarray,
    widths: np.ndarray,
    places: np.ndarray,
    values: np.ndarray,
    lift: int,
    own: bool,
    step: int,
    out: np.ndarray,
) -> None:
    size, short = first.shape[1], second.shape[1]
    wide, narrow = widths[0], widths[1]
    mask, gate_mask = (np.int64(1) << wide) - 1, (np.int64(1) << narrow) - 1
    offset, gate_offset = np.int64(1) << (wide - 2), np.int64(1) << (narrow - 2)
    for row in range(out.shape[0]):
        line = values[row]
        for i in range(size):
            j = places[i]
            u = np.int64(first[row, i]) & mask
            v = np.int64(second[row, j]) & gate_mask
            a, b = 1 - (u >> (wide - 1)), 1 - (v >> (narrow - 1))
            d, e = u - offset, v - gate_offset
            y = line[(2 + 2 * a + b) * size + i]
            y += d * line[6 * size + b * short + j] + e * line[a * size + i]
            if own:
                y += (d * e) << lift
            out[row, i] = y >> step


@compiled
def _deal_product(
    masks: np.ndarray,
    bits: int,
    dropped: np.ndarray,
    places: np.ndarray,
    lift: int,
    rounding: np.ndarray,
    taken: np.ndarray,
    out: np.ndarray,
) -> None:
    mask = np.int64(-1) if bits == 64 else (np.int64(1) << bits) - 1
    sign = 64 - bits
    size = rounding.shape[1]
    short = masks.shape[1] - size
    t = np.empty((2, masks.shape[1]), np.int64)
    for row in range(out.shape[0]):
        for i in range(masks.shape[1]):
            shift = dropped[0] if i < size else dropped[1]
            r = np.int64(masks[row, i])
            t[0, i] = -((r & mask) >> shift)
            t[1, i] = -(((r << sign) >> sign) >> shift)
        given, drawn = out[row], taken[row]
        for case in range(2):
            for i in range(size):
                k = case * size + i
                given[k] = (t[case, i] << lift) - drawn[k]
            for j in range(short):
                k = 6 * size + case * short + j
                given[k] = (t[case, size + j] << lift) - drawn[k]
        for a in range(2):
            for b in range(2):
                for i in range(size):
                    k = (2 + 2 * a + b) * size + i
                    whole = (t[a, i] * t[b, size + places[i]]) << lift
                    given[k] = whole + rounding[row, i] - drawn[k]


def product_share(
    first: np.ndarray,
    second: np.ndarray,
    values: np.ndarray,
    *,
    widths: np.ndarray,
    places: np.ndarray,
    lift: int,
    own: bool,
    step: int,
    out: np.ndarray,
) -> None:
    """One party's share of x1 x2 * 2**lift.

    Args:
        first, second: (rows, n) and (rows, k) opened factors c >> s, each modulo 2 to
            its width.
        values: (rows, 6 n + 2 k) int64, this party's shares of the dealer's words.
        widths: (2,) int64.
        places: (n,) int64, which of the k each of the n is multiplied by.
        own: whether the product of the opened factors counts: for one party.
        step: low bits dropped from the share at the end.
        out: (rows, n) int64, the share modulo 2**64, shifted by `step`.
    """
    rows, size = out.shape
    require(
        first.shape == (rows, size)
        and second.ndim == 2
        and len(second) == rows
        and second.shape[1] > 0
        and same_ring(first, second)
        and same_ring(out, values, widths, places)
        and out.dtype == np.int64
        and values.shape == (rows, 6 * size + 2 * second.shape[1])
        and _fit(places, size, second.shape[1])
        and widths.shape == (2,)
        and 2 <= int(widths.min()) <= int(widths.max()) < 64
        and 0 <= lift < 64
        and 0 <= step < 64,
        "product_share",
        first,
        second,
        values,
        out,
    )
    _product_share(first, second, widths, places, values, lift, own, step, out)


def deal_product(
    masks: np.ndarray,
    rounding: np.ndarray,
    taken: np.ndarray,
    *,
    bits: int,
    dropped: np.ndarray,
    places: np.ndarray,
    lift: int,
    out: np.ndarray,
) -> None:
    """The dealer's words for every case, less the shares already taken.

    Args:
        masks: (rows, n + k) uniform masks of both factors modulo 2**bits.
        rounding: (rows, n) int64, added to the product of the masks in all four cases:
            the second opening's rounding coins.
        taken: (rows, 6 n + 2 k) int64, the other party's shares, uniform modulo 2**64.
        dropped: (2,) int64, low bits of the factors.
        places, lift: as of `product_share`.
        out: (rows, 6 n + 2 k) what this party gets.
    """
    rows, size = rounding.shape
    short = masks.shape[1] - size
    require(
        len(masks) == rows
        and short > 0
        and same_ring(masks)
        and same_ring(out, taken, rounding, dropped, places)
        and out.dtype == np.int64
        and taken.shape == out.shape == (rows, 6 * size + 2 * short)
        and _fit(places, size, short)
        and dropped.shape == (2,)
        and 1 <= bits <= 64
        and 0 <= int(dropped.min()) <= int(dropped.max()) < bits
        and 0 <= lift < 64,
        "deal_product",
        masks,
        taken,
        rounding,
        out,
    )
    _deal_product(masks, bits, dropped, places, lift, rounding, taken, out)


def _fit(places: np.ndarray, size: int, short: int) -> bool:
    """Whether there is a place for each element, all among the second factor's."""
    return places.shape == (size,) and (
        size == 0 or 0 <= int(places.min()) <= int(places.max()) < short
    )


@heats
def _all_types() -> None:
    places, pair = np.zeros(2, np.int64), np.array([3, 4])
    values, rounding = np.zeros((1, 14), np.int64), np.zeros((1, 2), np.int64)
    for dtype in (np.int32, np.int64):
        masks = np.zeros((1, 3), dtype)
        deal_product(
            masks, rounding, values, bits=30, dropped=pair, places=places, lift=0,
            out=np.empty_like(values),
        )  # fmt: skip
        product_share(
            masks[:, :2].copy(), masks[:, 2:].copy(), values, widths=pair,
            places=places, lift=0, own=True, step=0, out=np.empty_like(rounding),
        )  # fmt: skip
