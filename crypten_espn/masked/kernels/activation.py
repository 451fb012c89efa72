"""Polynomial passes: from an opened value to shares of p(x), and back to an opening.

An opened value c = z + 2**(m-2) + r hides z behind a uniform mask r. Group k of a
polynomial's powers reads it through a mask of its own, c_k = c + delta_k, shifted by
s_k: D_k = (c_k >> s_k) - 2**(m-2-s_k), and x_k = D_k + t_k with the dealer-known
t_k = -(r_k >> s_k), a logical shift where the top bit of c_k is 1 and an arithmetic one
where it is 0.
"""

from __future__ import annotations

import numpy as np

from ...compiled import compiled, heats
from .ring import require, same_ring

BLOCK = 1024  # elements a polynomial pass keeps in the first-level cache


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
def _polynomial_share(
    opened: np.ndarray,
    widths: np.ndarray,
    degrees: np.ndarray,
    values: np.ndarray,
    public: np.ndarray,
    constant: np.int64,
    first_element: int,
    step: int,
    out: np.ndarray,
) -> None:
    reduced = np.empty(BLOCK, np.int64)
    top = np.empty(BLOCK, np.int64)
    acc = np.empty(BLOCK, np.int64)
    total = out.shape[0]
    for start in range(0, total, BLOCK):
        size = min(BLOCK, total - start)
        here = first_element + start
        result = out[start : start + size]
        for i in range(size):
            result[i] = constant
        index = 0
        for g in range(opened.shape[0]):
            width = widths[g]
            mask = (np.int64(1) << width) - 1
            line = opened[g, start : start + size]
            for i in range(size):
                u = np.int64(line[i]) & mask
                reduced[i] = u
                # All ones where the top bit is set: the logical case, values[0].
                top[i] = -(u >> (width - 1))
            first = values[0, index, here : here + size]
            second = values[1, index, here : here + size]
            for i in range(size):
                result[i] += second[i] ^ ((first[i] ^ second[i]) & top[i])
            degree = degrees[g]
            if degree > 1:
                offset = np.int64(1) << (width - 2)
                lead = public[g, degree]
                for i in range(size):
                    reduced[i] -= offset
                    acc[i] = lead
                # Horner in the opened value; values hold the rising powers 1, 2, ...
                for j in range(degree - 1, 0, -1):
                    coefficient = public[g, j]
                    first = values[0, index + j, here : here + size]
                    second = values[1, index + j, here : here + size]
                    for i in range(size):
                        v = second[i] ^ ((first[i] ^ second[i]) & top[i])
                        acc[i] = acc[i] * reduced[i] + coefficient + v
                for i in range(size):
                    result[i] += acc[i] * reduced[i]
            index += degree
        if step > 0:
            for i in range(size):
                result[i] >>= step


@compiled
def _add_linear(
    c: np.ndarray, bits: int, shift: int, coefficient: np.int64, out: np.ndarray
) -> None:
    mask = np.int64(-1) if bits == 64 else (np.int64(1) << bits) - 1
    offset = np.int64(1) << (bits - 2 - shift)
    for i in range(out.shape[0]):
        out[i] += coefficient * (((np.int64(c[i]) & mask) >> shift) - offset)


@compiled
def _deal_polynomial(
    masks: np.ndarray,
    bits: int,
    shifts: np.ndarray,
    degrees: np.ndarray,
    table: np.ndarray,
    linear: np.int64,
    linear_shift: int,
    rounding: np.ndarray,
    taken: np.ndarray,
    out: np.ndarray,
) -> None:
    mask = np.int64(-1) if bits == 64 else (np.int64(1) << bits) - 1
    sign = 64 - bits
    limit = table.shape[1]
    powers = np.empty((limit + 1, BLOCK), np.int64)
    acc = np.empty(BLOCK, np.int64)
    total = masks.shape[1]
    for start in range(0, total, BLOCK):
        size = min(BLOCK, total - start)
        stop = start + size
        for case in range(2):
            index = 0
            for g in range(masks.shape[0]):
                r = masks[g, start:stop]
                if g == 0:
                    for i in range(size):
                        if case == 0:
                            t = -((np.int64(r[i]) & mask) >> linear_shift)
                        else:
                            t = -(((np.int64(r[i]) << sign) >> sign) >> linear_shift)
                        acc[i] = linear * t + rounding[start + i]
                else:
                    for i in range(size):
                        acc[i] = 0
                degree = degrees[g]
                if degree > 1:
                    shift = shifts[g]
                    base = powers[1]
                    if case == 0:
                        for i in range(size):
                            base[i] = -((np.int64(r[i]) & mask) >> shift)
                    else:
                        for i in range(size):
                            base[i] = -(((np.int64(r[i]) << sign) >> sign) >> shift)
                    for k in range(2, degree + 1):
                        low = powers[k - 1]
                        high = powers[k]
                        for i in range(size):
                            high[i] = low[i] * base[i]
                    for k in range(1, degree + 1):
                        weight = table[g, 0, k]
                        power = powers[k]
                        for i in range(size):
                            acc[i] += weight * power[i]
                drawn = taken[case, index, start:stop]
                given = out[case, index, start:stop]
                for i in range(size):
                    given[i] = acc[i] - drawn[i]
                for j in range(1, degree):
                    for i in range(size):
                        acc[i] = 0
                    for k in range(1, degree - j + 1):
                        weight = table[g, j, k]
                        power = powers[k]
                        for i in range(size):
                            acc[i] += weight * power[i]
                    drawn = taken[case, index + j, start:stop]
                    given = out[case, index + j, start:stop]
                    for i in range(size):
                        given[i] = acc[i] - drawn[i]
                index += degree


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


def _degrees_fit(degrees: np.ndarray, by_power: np.ndarray) -> bool:
    """Whether each group has a degree, and a coefficient up to the largest."""
    return (
        degrees.ndim == 1
        and by_power.ndim == 2
        and len(by_power) == len(degrees) > 0
        and 1 <= int(degrees.min()) <= int(degrees.max()) < by_power.shape[1]
    )


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
        and 0 <= int(shifts.min()) <= int(shifts.max()) < bits,
        "shifted_openings",
        c,
        deltas,
        shifts,
        out,
    )
    _shifted_openings(c, deltas, bits, shifts, out)


def polynomial_share(
    opened: np.ndarray,
    values: np.ndarray,
    *,
    widths: np.ndarray,
    degrees: np.ndarray,
    public: np.ndarray,
    constant: int,
    start: int,
    step: int,
    out: np.ndarray,
) -> None:
    """One party's share of p(x) but for its linear term, each operand read once.

    With D_k = opened[k] - 2**(widths[k]-2), adds for each group its selected constant
    and sum_j D_k**j * (public[k, j] + selected values of that power).

    Args:
        opened: (groups, n), row k modulo 2**widths[k]: c_k >> s_k.
        values: (2, V, N) this party's shares of the dealer's values, for each group its
            constant and the powers 1 to degree - 1; [0] where the top bit of opened[k]
            is 1, [1] where it is 0.
        widths, degrees: (groups,) int64; a group of degree 1 has its constant alone.
        public: (groups, max degree + 1) integer coefficients; zero for the client.
        constant: added to every element; zero for the client.
        start: which of the N elements the first of the n is.
        step: low bits dropped from the share at the end.
        out: (n,) int64, the share modulo 2**64, shifted by `step`.
    """
    groups, n = len(degrees), len(out)
    require(
        opened.shape == (groups, n)
        and out.ndim == 1
        and same_ring(opened)
        and same_ring(out, values, public, widths, degrees)
        and out.dtype == np.int64
        and widths.shape == (groups,)
        and _degrees_fit(degrees, public)
        and values.ndim == 3
        and values.shape[:2] == (2, int(degrees.sum()))
        and 0 <= start <= values.shape[2] - n
        and 0 <= step < 64
        and 1 <= int(widths.min()) <= int(widths.max()) < 64,
        "polynomial_share",
        opened,
        values,
        public,
        out,
    )
    _polynomial_share(
        opened, widths, degrees, values, public, np.int64(constant), start, step, out
    )


def add_linear(
    c: np.ndarray, *, bits: int, shift: int, coefficient: int, out: np.ndarray
) -> None:
    """Add coefficient * ((c >> shift) - 2**(bits-2-shift)): the linear term's D.

    Args:
        c: (n,) modulo 2**bits.
        out: (n,) int64.
    """
    fits = c.shape == out.shape and c.ndim == 1
    fits = fits and same_ring(c) and out.dtype == np.int64
    require(fits and 0 <= shift <= bits - 2 <= 62, "add_linear", c, out)
    _add_linear(c, bits, shift, np.int64(coefficient), out)


def deal_polynomial(
    masks: np.ndarray,
    rounding: np.ndarray,
    taken: np.ndarray,
    *,
    bits: int,
    shifts: np.ndarray,
    degrees: np.ndarray,
    table: np.ndarray,
    linear: int,
    linear_shift: int,
    out: np.ndarray,
) -> None:
    """The dealer's values for both cases of each mask, less the shares already taken.

    Args:
        masks: (groups, n) uniform masks r_k modulo 2**bits.
        rounding: (n,) int64, added to the first group's constant: the second opening's
            rounding coins.
        taken: (2, V, n) the other party's shares, uniform modulo 2**64.
        shifts, degrees: (groups,) int64.
        table: (groups, K, K + 1): table[g, j, k] multiplies t**k in the value that
            belongs to D**j; K is the largest degree.
        linear, linear_shift: the linear term's coefficient, and bits dropped from x.
        out: (2, V, n) what this party gets.
    """
    groups, n = len(degrees), len(rounding)
    require(
        masks.shape == (groups, n)
        and rounding.ndim == 1
        and same_ring(masks)
        and same_ring(out, taken, table, rounding, shifts, degrees)
        and out.dtype == np.int64
        and shifts.shape == (groups,)
        and table.ndim == 3
        and _degrees_fit(degrees, table[:, 0])
        and table.shape[1] >= int(degrees.max())
        and taken.shape == out.shape == (2, int(degrees.sum()), n)
        and 1 <= bits <= 64
        and 0 <= int(shifts.min()) <= int(shifts.max()) < bits
        and 0 <= linear_shift < bits,
        "deal_polynomial",
        masks,
        taken,
        table,
        out,
    )
    _deal_polynomial(
        masks,
        bits,
        shifts,
        degrees,
        table,
        np.int64(linear),
        linear_shift,
        rounding,
        taken,
        out,
    )


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


@heats
def _all_types() -> None:
    shifts, degrees = np.array([1, 2]), np.array([2, 2])
    public, table = np.zeros((2, 3), np.int64), np.zeros((2, 2, 3), np.int64)
    values = np.zeros((2, 4, 4), np.int64)
    half, rounding = np.zeros(4, np.int64), np.zeros(4, np.int64)
    for bits, dtype in ((32, np.int32), (40, np.int64)):
        c = np.zeros(4, dtype)
        openings = np.zeros((2, 4), dtype)
        # A chunk of a batch reads a part of each row.
        for deltas in (np.zeros((1, 4), dtype), np.zeros((2, 8), dtype)[:1, 2:6]):
            shifted_openings(c, deltas, bits=bits, shifts=shifts, out=openings)
        polynomial_share(
            openings,
            values,
            widths=bits - shifts,
            degrees=degrees,
            public=public,
            constant=0,
            start=0,
            step=0,
            out=half,
        )
        add_linear(c, bits=bits, shift=0, coefficient=1, out=half)
        deal_polynomial(
            openings,
            rounding,
            values,
            bits=bits,
            shifts=shifts,
            degrees=degrees,
            table=table,
            linear=1,
            linear_shift=0,
            out=np.empty_like(values),
        )
        truncate(half, half, bits=64, drop=64 - bits, step=0, out=c)
