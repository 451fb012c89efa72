"""Polynomial passes: from an opened value to shares of p(x), and back to an opening.

An opened value c = z + 2**(m-2) + r hides z behind a uniform mask r. Group k of a
polynomial's powers reads it through a mask of its own, c_k = c + delta_k, shifted by
s_k: D_k = (c_k >> s_k) - 2**(m-2-s_k), and x_k = D_k + t_k with the dealer-known
t_k = -(r_k >> s_k), a logical shift where the top bit of c_k is 1 and an arithmetic one
where it is 0.

Values are channels-last, and coefficients stand by channel: element i reads column
i % C of C columns. A polynomial for all channels has one column.
"""

from __future__ import annotations

import numpy as np

from ...compiled import compiled, heats
from .ring import require, same_ring

BLOCK = 512  # elements a polynomial pass keeps in the first-level cache


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
    leading: np.ndarray,
    first_element: int,
    step: int,
    out: np.ndarray,
) -> None:
    reduced = np.empty(BLOCK, np.int64)
    top = np.empty(BLOCK, np.int64)
    acc = np.empty(BLOCK, np.int64)
    total, period = out.shape[0], leading.shape[1]
    start = 0
    while start < total:
        here = first_element + start
        phase = here % period
        size = min(BLOCK, period - phase, total - start)
        result = out[start : start + size]
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
            if g == 0:
                for i in range(size):
                    result[i] = second[i] ^ ((first[i] ^ second[i]) & top[i])
            else:
                for i in range(size):
                    result[i] += second[i] ^ ((first[i] ^ second[i]) & top[i])
            degree = degrees[g]
            if degree > 1:
                offset = np.int64(1) << (width - 2)
                lead = leading[g, phase : phase + size]
                for i in range(size):
                    reduced[i] -= offset
                    acc[i] = lead[i]
                # Horner in the opened value; values hold the rising powers 1, 2, ...
                for j in range(degree - 1, 0, -1):
                    first = values[0, index + j, here : here + size]
                    second = values[1, index + j, here : here + size]
                    for i in range(size):
                        v = second[i] ^ ((first[i] ^ second[i]) & top[i])
                        acc[i] = acc[i] * reduced[i] + v
                for i in range(size):
                    result[i] += acc[i] * reduced[i]
            index += degree
        if step > 0:
            for i in range(size):
                result[i] >>= step
        start += size


@compiled
def _add_linear(
    c: np.ndarray,
    bits: int,
    shift: int,
    coefficient: np.ndarray,
    first_element: int,
    out: np.ndarray,
) -> None:
    mask = np.int64(-1) if bits == 64 else (np.int64(1) << bits) - 1
    offset = np.int64(1) << (bits - 2 - shift)
    total, period = out.shape[0], coefficient.shape[0]
    start = 0
    while start < total:
        phase = (first_element + start) % period
        size = min(period - phase, total - start)
        result, opened = out[start : start + size], c[start : start + size]
        factor = coefficient[phase : phase + size]
        for i in range(size):
            d = ((np.int64(opened[i]) & mask) >> shift) - offset
            result[i] += factor[i] * d
        start += size


@compiled
def _deal_polynomial(
    masks: np.ndarray,
    bits: int,
    shifts: np.ndarray,
    degrees: np.ndarray,
    coeffs: np.ndarray,
    linear: np.ndarray,
    linear_shift: int,
    rounding: np.ndarray,
    taken: np.ndarray,
    out: np.ndarray,
) -> None:
    mask = np.int64(-1) if bits == 64 else (np.int64(1) << bits) - 1
    sign = 64 - bits
    total, period = masks.shape[1], coeffs.shape[2]
    t = np.empty(BLOCK, np.int64)
    product = np.empty(BLOCK, np.int64)
    found = np.empty((coeffs.shape[1], BLOCK), np.int64)
    start = 0
    while start < total:
        phase = start % period
        size = min(BLOCK, period - phase, total - start)
        stop = start + size
        for case in range(2):
            index = 0
            for g in range(masks.shape[0]):
                r = masks[g, start:stop]
                degree = degrees[g]
                shift = shifts[g]
                if case == 0:
                    for i in range(size):
                        t[i] = -((np.int64(r[i]) & mask) >> shift)
                else:
                    for i in range(size):
                        t[i] = -(((np.int64(r[i]) << sign) >> sign) >> shift)
                constant = found[0]
                row = coeffs[g, 0, phase : phase + size]
                for i in range(size):
                    constant[i] = row[i]
                if degree > 1:
                    # The coefficients of p(D + t) in D, by repeated division; the
                    # leading one is p's.
                    lead = coeffs[g, degree, phase : phase + size]
                    for i in range(size):
                        product[i] = lead[i] * t[i]
                    last = found[degree - 1]
                    row = coeffs[g, degree - 1, phase : phase + size]
                    for i in range(size):
                        last[i] = row[i] + product[i]
                    for j in range(degree - 2, -1, -1):
                        line, above = found[j], found[j + 1]
                        row = coeffs[g, j, phase : phase + size]
                        for i in range(size):
                            line[i] = row[i] + above[i] * t[i]
                    for k in range(1, degree):
                        for i in range(size):
                            last[i] += product[i]
                        for j in range(degree - 2, k - 1, -1):
                            line, above = found[j], found[j + 1]
                            for i in range(size):
                                line[i] += above[i] * t[i]
                if g == 0:
                    factor = linear[phase : phase + size]
                    coins = rounding[start:stop]
                    for i in range(size):
                        if case == 0:
                            d = -((np.int64(r[i]) & mask) >> linear_shift)
                        else:
                            d = -(((np.int64(r[i]) << sign) >> sign) >> linear_shift)
                        constant[i] += factor[i] * d + coins[i]
                for j in range(degree):
                    line = found[j]
                    drawn = taken[case, index + j, start:stop]
                    given = out[case, index + j, start:stop]
                    for i in range(size):
                        given[i] = line[i] - drawn[i]
                index += degree
        start = stop


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


def _periods(columns: np.ndarray) -> np.ndarray:
    """Coefficients by channel, the last axis, repeated to about a block's length.

    So a block reads each row from its first element's channel on, without a gap.
    """
    *before, channels = columns.shape
    times = max(1, BLOCK // channels)
    repeated = np.empty((*before, times, channels), dtype=np.int64)
    repeated[:] = columns[..., None, :]
    return repeated.reshape(*before, times * channels)


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
    leading: np.ndarray,
    start: int,
    step: int,
    out: np.ndarray,
) -> None:
    """One party's share of p(x) but for its linear term, each operand read once.

    With D_k = opened[k] - 2**(widths[k]-2), the sum over the groups of
    leading * D_k**degree and, for each lower power of D_k, its selected value.

    Args:
        opened: (groups, n), row k modulo 2**widths[k]: c_k >> s_k.
        values: (2, V, N) this party's shares of the dealer's values, for each group its
            constant and the powers 1 to degree - 1; [0] where the top bit of opened[k]
            is 1, [1] where it is 0.
        widths, degrees: (groups,) int64; a group of degree 1 has its constant alone.
        leading: (groups, C) integer coefficients of each group's highest power; zero
            for the client. Element i of the N belongs to channel i % C.
        start: which of the N elements the first of the n is.
        step: low bits dropped from the share at the end.
        out: (n,) int64, the share modulo 2**64, shifted by `step`.
    """
    groups, n = len(degrees), len(out)
    require(
        opened.shape == (groups, n)
        and out.ndim == 1
        and same_ring(opened)
        and same_ring(out, values, leading, widths, degrees)
        and out.dtype == np.int64
        and widths.shape == degrees.shape == (groups,)
        and groups > 0
        and int(degrees.min()) >= 1
        and leading.ndim == 2
        and len(leading) == groups
        and leading.size > 0
        and values.ndim == 3
        and values.shape[:2] == (2, int(degrees.sum()))
        and 0 <= start <= values.shape[2] - n
        and 0 <= step < 64
        and 1 <= int(widths.min()) <= int(widths.max()) < 64,
        "polynomial_share",
        opened,
        values,
        leading,
        out,
    )
    _polynomial_share(
        opened, widths, degrees, values, _periods(leading), start, step, out
    )


def add_linear(
    c: np.ndarray,
    *,
    bits: int,
    shift: int,
    coefficient: np.ndarray,
    start: int,
    out: np.ndarray,
) -> None:
    """Add coefficient * ((c >> shift) - 2**(bits-2-shift)): the linear term's D.

    Args:
        c: (n,) modulo 2**bits.
        coefficient: (C,) int64; the first element is of channel start % C.
        out: (n,) int64.
    """
    fits = c.shape == out.shape and c.ndim == 1 and coefficient.ndim == 1
    fits = fits and same_ring(c) and out.dtype == coefficient.dtype == np.int64
    fits = fits and coefficient.size > 0 and start >= 0
    require(fits and 0 <= shift <= bits - 2 <= 62, "add_linear", c, coefficient, out)
    _add_linear(c, bits, shift, _periods(coefficient), start, out)


def deal_polynomial(
    masks: np.ndarray,
    rounding: np.ndarray,
    taken: np.ndarray,
    *,
    bits: int,
    shifts: np.ndarray,
    degrees: np.ndarray,
    coeffs: np.ndarray,
    linear: np.ndarray,
    linear_shift: int,
    out: np.ndarray,
) -> None:
    """The dealer's values for both cases of each mask, less the shares already taken.

    A group's value j is the coefficient of D**j in its polynomial of D + t, for j below
    its degree. They are found by repeated synthetic division (Shaw and Traub, On the
    number of multiplications for the evaluation of a polynomial, JACM 1974).

    Args:
        masks: (groups, n) uniform masks r_k modulo 2**bits.
        rounding: (n,) int64, added to the first group's constant: the second opening's
            rounding coins.
        taken: (2, V, n) the other party's shares, uniform modulo 2**64.
        shifts, degrees: (groups,) int64; of a group of degree 1 the constant counts.
        coeffs: (groups, K + 1, C): coeffs[g, k] multiplies x**k; K is at least the
            largest degree. Element i is of channel i % C.
        linear, linear_shift: (C,) the linear term's coefficient, and bits dropped from
            x; it goes with the first group's constant.
        out: (2, V, n) what this party gets.
    """
    groups, n = len(degrees), len(rounding)
    require(
        masks.shape == (groups, n)
        and rounding.ndim == 1
        and same_ring(masks)
        and same_ring(out, taken, coeffs, linear, rounding, shifts, degrees)
        and out.dtype == np.int64
        and shifts.shape == degrees.shape == (groups,)
        and groups > 0
        and coeffs.ndim == 3
        and len(coeffs) == groups
        and 1 <= int(degrees.min()) <= int(degrees.max()) < coeffs.shape[1]
        and linear.shape == (coeffs.shape[2],)
        and linear.size > 0
        and taken.shape == out.shape == (2, int(degrees.sum()), n)
        and 1 <= bits <= 64
        and 0 <= int(shifts.min()) <= int(shifts.max()) < bits
        and 0 <= linear_shift < bits,
        "deal_polynomial",
        masks,
        taken,
        coeffs,
        linear,
        out,
    )
    _deal_polynomial(
        masks,
        bits,
        shifts,
        degrees,
        _periods(coeffs),
        _periods(linear),
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
    coeffs = np.zeros((2, 3, 2), np.int64)
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
            leading=coeffs[:, 2],
            start=0,
            step=0,
            out=half,
        )
        add_linear(c, bits=bits, shift=0, coefficient=coeffs[0, 1], start=0, out=half)
        deal_polynomial(
            openings,
            rounding,
            values,
            bits=bits,
            shifts=shifts,
            degrees=degrees,
            coeffs=coeffs,
            linear=coeffs[0, 1],
            linear_shift=0,
            out=np.empty_like(values),
        )
        truncate(half, half, bits=64, drop=64 - bits, step=0, out=c)
