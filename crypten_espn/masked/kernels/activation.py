"""Polynomial passes: from an opened value to shares of p(x), and back to an opening.

An opened value c = z + 2**(m-2) + r hides z behind a uniform mask r. Group k of a
polynomial's powers reads it through a mask of its own, c_k = c + delta_k, shifted by
s_k: D_k = (c_k >> s_k) - 2**(m-2-s_k), and x_k = D_k + t_k with the dealer-known
t_k = -(r_k >> s_k), an arithmetic shift where the top bit of c_k is 0 and a logical one
where it is 1. The second is the first less 2**(m-s_k) where the top bit of r_k is 1.

So the dealer gives p's coefficients in D_k for the first case, and what each changes by
in the second, a multiple of 2**(m-s_k): a word for the constants of all groups; for
each group one for each power 1 to degree - 1, less p's own coefficient, then one change
for each from 0 on. The leading coefficient is p's own. Of each word only the bits
travel that reach the result; `zeros` counts the low ones that do not.

Values are channels-last, and coefficients stand by channel: element i reads column
i % C of C columns. A polynomial for all channels has one column.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    zeros: np.ndarray,
    public: np.ndarray,
    step: int,
    out: np.ndarray,
) -> None:
    reduced = np.empty(BLOCK, np.int64)
    top = np.empty(BLOCK, np.int64)
    acc = np.empty(BLOCK, np.int64)
    total, period = out.shape[0], public.shape[2]
    start = 0
    while start < total:
        phase = start % period
        size = min(BLOCK, period - phase, total - start)
        stop = start + size
        result = out[start:stop]
        constant, low = values[0, start:stop], zeros[0]
        for i in range(size):
            result[i] = constant[i] << low
        index = 1
        for g in range(opened.shape[0]):
            width, degree = widths[g], degrees[g]
            mask = (np.int64(1) << width) - 1
            line = opened[g, start:stop]
            beside = index + degree - 1
            other, other_low = values[beside, start:stop], zeros[beside]
            for i in range(size):
                u = np.int64(line[i]) & mask
                reduced[i] = u
                # All ones where the top bit is set: the logical case.
                top[i] = -(u >> (width - 1))
                result[i] += (other[i] << other_low) & top[i]
            if degree > 1:
                offset = np.int64(1) << (width - 2)
                lead = public[g, degree, phase : phase + size]
                for i in range(size):
                    reduced[i] -= offset
                    acc[i] = lead[i]
                # Horner in the opened value.
                for j in range(degree - 1, 0, -1):
                    base = values[index + j - 1, start:stop]
                    other = values[beside + j, start:stop]
                    low, other_low = zeros[index + j - 1], zeros[beside + j]
                    row = public[g, j, phase : phase + size]
                    for i in range(size):
                        v = (base[i] << low) + ((other[i] << other_low) & top[i])
                        acc[i] = acc[i] * reduced[i] + (row[i] + v)
                for i in range(size):
                    result[i] += acc[i] * reduced[i]
            index = beside + degree
        if step > 0:
            for i in range(size):
                result[i] >>= step
        start = stop


@compiled
def _add_linear(
    c: np.ndarray,
    bits: int,
    shift: int,
    coefficient: np.ndarray,
    out: np.ndarray,
) -> None:
    mask = np.int64(-1) if bits == 64 else (np.int64(1) << bits) - 1
    offset = np.int64(1) << (bits - 2 - shift)
    total, period = out.shape[0], coefficient.shape[0]
    start = 0
    while start < total:
        phase = start % period
        size = min(period - phase, total - start)
        result, opened = out[start : start + size], c[start : start + size]
        factor = coefficient[phase : phase + size]
        for i in range(size):
            d = ((np.int64(opened[i]) & mask) >> shift) - offset
            result[i] += factor[i] * d
        start += size


@compiled
def _coefficients(
    t: np.ndarray, rows: np.ndarray, degree: int, phase: int, found: np.ndarray
) -> None:
    """The coefficients of p(D + t) in D but the leading one, by repeated division."""
    size = t.shape[0]
    for j in range(degree):
        line, row = found[j], rows[j, phase : phase + size]
        for i in range(size):
            line[i] = row[i]
    if degree == 1:
        return
    lead = rows[degree, phase : phase + size]
    last = found[degree - 1]
    for k in range(degree):
        for i in range(size):
            last[i] += lead[i] * t[i]
        for j in range(degree - 2, k - 1, -1):
            line, above = found[j], found[j + 1]
            for i in range(size):
                line[i] += above[i] * t[i]


@compiled
def _deal_polynomial(
    masks: np.ndarray,
    bits: int,
    shifts: np.ndarray,
    degrees: np.ndarray,
    coeffs: np.ndarray,
    linear: np.ndarray,
    linear_shift: int,
    zeros: np.ndarray,
    rounding: np.ndarray,
    taken: np.ndarray,
    out: np.ndarray,
) -> None:
    sign = 64 - bits
    total, period = masks.shape[1], coeffs.shape[2]
    t = np.empty(BLOCK, np.int64)
    wrap = np.empty(BLOCK, np.int64)
    constant = np.empty(BLOCK, np.int64)
    found = np.empty((coeffs.shape[1], BLOCK), np.int64)
    other = np.empty((coeffs.shape[1], BLOCK), np.int64)
    start = 0
    while start < total:
        phase = start % period
        size = min(BLOCK, period - phase, total - start)
        stop = start + size
        coins = rounding[start:stop]
        for i in range(size):
            constant[i] = coins[i]
        index = 1
        for g in range(masks.shape[0]):
            r = masks[g, start:stop]
            degree, shift = degrees[g], shifts[g]
            beside = index + degree - 1
            for i in range(size):
                signed = (np.int64(r[i]) << sign) >> sign
                t[i] = -(signed >> shift)
                # -1 where the mask's top bit is set; 0 otherwise.
                wrap[i] = signed >> 63
            rows = coeffs[g]
            _coefficients(t[:size], rows, degree, phase, found)
            for i in range(size):
                t[i] += wrap[i] << (bits - shift)
            _coefficients(t[:size], rows, degree, phase, other)
            line, second = found[0], other[0]
            for i in range(size):
                second[i] -= line[i]
                constant[i] += line[i]
            if g == 0:
                factor = linear[phase : phase + size]
                for i in range(size):
                    signed = (np.int64(r[i]) << sign) >> sign
                    constant[i] -= factor[i] * (signed >> linear_shift)
                    second[i] += factor[i] * (wrap[i] << (bits - linear_shift))
            for j in range(1, degree):
                line, second = found[j], other[j]
                row = rows[j, phase : phase + size]
                low = zeros[index + j - 1]
                drawn = taken[index + j - 1, start:stop]
                given = out[index + j - 1, start:stop]
                for i in range(size):
                    second[i] -= line[i]
                    given[i] = ((line[i] - row[i]) >> low) - drawn[i]
            for j in range(degree):
                second, low = other[j], zeros[beside + j]
                drawn = taken[beside + j, start:stop]
                given = out[beside + j, start:stop]
                for i in range(size):
                    given[i] = (second[i] >> low) - drawn[i]
            index = beside + degree
        drawn, given, low = taken[0, start:stop], out[0, start:stop], zeros[0]
        for i in range(size):
            given[i] = (constant[i] >> low) - drawn[i]
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


def words_of(degrees: Sequence[int] | np.ndarray) -> int:
    """The dealer's words for one element, the groups' degrees given."""
    return 1 + sum(2 * int(degree) - 1 for degree in degrees)


def polynomial_share(
    opened: np.ndarray,
    values: np.ndarray,
    *,
    widths: np.ndarray,
    degrees: np.ndarray,
    zeros: np.ndarray,
    public: np.ndarray,
    step: int,
    out: np.ndarray,
) -> None:
    """One party's share of p(x) but for its linear term, each operand read once.

    With D_k = opened[k] - 2**(widths[k]-2), the sum over groups and powers j of
    public * D_k**j and, for each power below the degree, its selected value.

    Args:
        opened: (groups, n), row k modulo 2**widths[k]: c_k >> s_k.
        values: (V, n) this party's shares of the dealer's words, in the module's order,
            word j without its zeros[j] low bits; what stands above 64 - zeros[j] does
            not count.
        widths, degrees: (groups,) int64; a group of degree 1 has its constant alone.
        zeros: (V,) int64.
        public: (groups, K + 1, C) p's own coefficients from power 1 on; zero for the
            client. K is at least the largest degree; element i belongs to channel
            i % C.
        step: low bits dropped from the share at the end.
        out: (n,) int64, the share modulo 2**64, shifted by `step`.
    """
    groups, n = len(degrees), len(out)
    require(
        opened.shape == (groups, n)
        and out.ndim == 1
        and same_ring(opened)
        and same_ring(out, values, public, widths, degrees, zeros)
        and out.dtype == np.int64
        and widths.shape == degrees.shape == (groups,)
        and groups > 0
        and int(degrees.min()) >= 1
        and public.ndim == 3
        and len(public) == groups
        and public.shape[1] > int(degrees.max())
        and public.size > 0
        and values.ndim == 2
        and zeros.shape == (len(values),) == (words_of(degrees),)
        and 0 <= int(zeros.min()) <= int(zeros.max()) < 64
        and values.shape[1] == n
        and 0 <= step < 64
        and 1 <= int(widths.min()) <= int(widths.max()) < 64,
        "polynomial_share",
        opened,
        values,
        public,
        out,
    )
    _polynomial_share(
        opened, widths, degrees, values, zeros, _periods(public), step, out
    )


def add_linear(
    c: np.ndarray,
    *,
    bits: int,
    shift: int,
    coefficient: np.ndarray,
    out: np.ndarray,
) -> None:
    """Add coefficient * ((c >> shift) - 2**(bits-2-shift)): the linear term's D.

    Args:
        c: (n,) modulo 2**bits.
        coefficient: (C,) int64; element i is of channel i % C.
        out: (n,) int64.
    """
    fits = c.shape == out.shape and c.ndim == 1 and coefficient.ndim == 1
    fits = fits and same_ring(c) and out.dtype == coefficient.dtype == np.int64
    fits = fits and coefficient.size > 0
    require(fits and 0 <= shift <= bits - 2 <= 62, "add_linear", c, coefficient, out)
    _add_linear(c, bits, shift, _periods(coefficient), out)


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
    zeros: np.ndarray,
    out: np.ndarray,
) -> None:
    """The dealer's words, less the shares already taken.

    Coefficients in D of a group's polynomial of D + t are found by repeated synthetic
    division (Shaw and Traub, On the number of multiplications for the evaluation of a
    polynomial, JACM 1974).

    Args:
        masks: (groups, n) uniform masks r_k modulo 2**bits.
        rounding: (n,) int64, added to the constant: the second opening's rounding
            coins.
        taken: (V, n) the other party's shares, uniform.
        shifts, degrees: (groups,) int64; of a group of degree 1 the constant counts.
        coeffs: (groups, K + 1, C): coeffs[g, k] multiplies x**k; K is at least the
            largest degree. Element i is of channel i % C.
        linear, linear_shift: (C,) the linear term's coefficient, and bits dropped from
            x; it goes with the first group's mask.
        zeros: (V,) int64, low bits that each word is without.
        out: (V, n) what this party gets; the low 64 - zeros[j] bits of word j count.
    """
    groups, n = len(degrees), len(rounding)
    require(
        masks.shape == (groups, n)
        and rounding.ndim == 1
        and same_ring(masks)
        and same_ring(out, taken, coeffs, linear, rounding, shifts, degrees, zeros)
        and out.dtype == np.int64
        and shifts.shape == degrees.shape == (groups,)
        and groups > 0
        and coeffs.ndim == 3
        and len(coeffs) == groups
        and 1 <= int(degrees.min()) <= int(degrees.max()) < coeffs.shape[1]
        and linear.shape == (coeffs.shape[2],)
        and linear.size > 0
        and taken.shape == out.shape == (words_of(degrees), n)
        and zeros.shape == (len(out),)
        and 0 <= int(zeros.min()) <= int(zeros.max()) < 64
        and 1 <= bits < 64
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
        zeros,
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
    values, zeros = np.zeros((7, 4), np.int64), np.zeros(7, np.int64)
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
            zeros=zeros,
            public=coeffs,
            step=0,
            out=half,
        )
        add_linear(c, bits=bits, shift=0, coefficient=coeffs[0, 1], out=half)
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
            zeros=zeros,
            out=np.empty_like(values),
        )
        truncate(half, half, bits=64, drop=64 - bits, step=0, out=c)
