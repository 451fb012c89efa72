"""Polynomial passes: from an opened value to shares of p(x).

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

Both passes go once over the elements, a vector of them at a time, and keep what they
compute in registers: the words come from memory, which is what such a pass waits for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...compiled import compiled, heats
from .ring import require, same_ring, within
from .vectors import LANES, load, negative, padded, repeated, store

BLOCK = 512  # elements of which a pass keeps sums in the first-level cache


def words_of(degrees: Sequence[int] | np.ndarray) -> int:
    """The dealer's words for one element, the groups' degrees given."""
    return 1 + sum(2 * int(degree) - 1 for degree in degrees)


# The client's columns.
_NO_ROWS = np.empty((1, 0, 2 * LANES), dtype=np.int64)

# ---------------------------------------------------------------- both parties


@compiled
def _polynomial_share(
    opened: np.ndarray,
    widths: np.ndarray,
    degrees: np.ndarray,
    values: np.ndarray,
    zeros: np.ndarray,
    public: np.ndarray,
    phase: int,
    step: int,
    out: np.ndarray,
) -> None:
    own, period = public.shape[1] > 0, public.shape[2] - LANES
    groups, vectors = opened.shape[0], out.shape[0] - LANES + 1
    for start in range(0, vectors, BLOCK):
        stop = min(start + BLOCK, vectors)
        first = phase
        index = 1
        for g in range(groups):
            width, degree = widths[g], degrees[g]
            beside = index + degree - 1
            mask, offset = (np.int64(1) << width) - 1, np.int64(1) << (width - 2)
            drop = step if g == groups - 1 else 0
            phase = first
            for i in range(start, stop, LANES):
                result = load(out, (i,)) if g > 0 else load(values, (0, i)) << zeros[0]
                u = load(opened, (g, i)) & mask
                # All ones where the top bit is set: the logical case.
                top = negative(u << (64 - width))
                result += (load(values, (beside, i)) << zeros[beside]) & top
                if degree > 1:
                    d = u - offset
                    # Horner in the opened value; the leading coefficient is public.
                    j = degree - 1
                    acc = load(values, (beside - 1, i)) << zeros[beside - 1]
                    acc += (load(values, (beside + j, i)) << zeros[beside + j]) & top
                    if own:
                        acc += load(public, (g, degree, phase)) * d
                        acc += load(public, (g, j, phase))
                    for back in range(2, degree):
                        j, base = degree - back, beside - back
                        other = beside + j
                        acc = acc * d
                        acc += load(values, (base, i)) << zeros[base]
                        acc += (load(values, (other, i)) << zeros[other]) & top
                        if own:
                            acc += load(public, (g, j, phase))
                    result += acc * d
                store(out, (i,), result >> drop)
                phase += LANES
                if phase >= period:
                    phase -= period
            index = beside + degree


def polynomial_share(
    opened: np.ndarray,
    values: np.ndarray,
    *,
    widths: np.ndarray,
    degrees: np.ndarray,
    zeros: np.ndarray,
    public: np.ndarray | None,
    step: int,
    out: np.ndarray,
) -> None:
    """One party's share of p(x) but for its linear term, each operand read once.

    With D_k = opened[k] - 2**(widths[k]-2), the sum over groups and powers j of
    public * D_k**j and, for each power below the degree, its selected value.

    Args:
        opened: (groups, n), row k modulo 2**widths[k]: c_k >> s_k. Of int32 where no
            width is above 32, or of int64.
        values: (V, n) this party's shares of the dealer's words, in the module's order,
            word j without its zeros[j] low bits; what stands above 64 - zeros[j] does
            not count.
        widths, degrees: (groups,) int64; a group of degree 1 has its constant alone.
        zeros: (V,) int64.
        public: (groups, K + 1, C) p's own coefficients from power 1 on; None for the
            client. K is at least the largest degree; element i belongs to channel
            i % C.
        step: low bits dropped from the share at the end.
        out: (n,) contiguous, the share modulo 2**64 without `step` low bits.
    """
    groups, n = len(degrees), len(out)
    require(
        opened.shape == (groups, n)
        and out.ndim == 1
        and same_ring(opened)
        and same_ring(out, values, widths, degrees, zeros)
        and out.dtype == np.int64
        and widths.shape == degrees.shape == (groups,)
        and groups > 0
        and within(1, degrees, 1 << 31)
        and (public is None or _are_coefficients(public, degrees))
        and values.ndim == 2
        and zeros.shape == (len(values),) == (words_of(degrees),)
        and within(0, zeros, 64)
        and values.shape[1] == n
        and out.flags.c_contiguous
        and 0 <= step < 64
        and within(1, widths, 64 if opened.dtype == np.int64 else 33),
        "polynomial_share",
        opened,
        values,
        *(() if public is None else (public,)),
        out,
    )
    rows, whole = _NO_ROWS if public is None else repeated(public), n - n % LANES
    opened, values = map(np.ascontiguousarray, (opened, values))
    options = widths, degrees
    if whole:
        _polynomial_share(opened, *options, values, zeros, rows, 0, step, out)
    if whole < n:
        last = np.empty(LANES, dtype=np.int64)
        ends = padded(opened, whole), *options, padded(values, whole), zeros
        phase = whole % (rows.shape[2] - LANES)
        _polynomial_share(*ends, rows, phase, step, last)
        out[whole:] = last[: n - whole]


def _are_coefficients(coeffs: np.ndarray, degrees: np.ndarray) -> bool:
    """Whether every group has rows up to its degree, with as many columns."""
    return (
        coeffs.ndim == 3
        and coeffs.dtype == np.int64
        and len(coeffs) == len(degrees)
        and within(1, degrees, coeffs.shape[1])
        and coeffs.size > 0
    )


# ---------------------------------------------------------------- the dealer


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
    phase: int,
    rounding: np.ndarray,
    taken: np.ndarray,
    out: np.ndarray,
) -> None:
    period, vectors = coeffs.shape[2] - LANES, rounding.shape[0] - LANES + 1
    constant = np.empty(BLOCK, np.int64)
    # The coefficients of one vector in both cases, power by power.
    logical = np.empty((coeffs.shape[1], LANES), np.int64)
    found = np.empty((coeffs.shape[1], LANES), np.int64)
    for start in range(0, vectors, BLOCK):
        stop = min(start + BLOCK, vectors)
        first = phase
        index = 1
        for g in range(masks.shape[0]):
            degree, shift = degrees[g], shifts[g]
            width, beside = bits - shift, index + degree - 1
            phase = first
            for i in range(start, stop, LANES):
                r = load(masks, (g, i)) & ((np.int64(1) << bits) - 1)
                # All ones where the mask's top bit is set: there the cases differ.
                top = negative(r << (64 - bits))
                # p(D - u), u being the logical shift, by repeated division.
                u = r >> shift
                for j in range(degree):
                    store(logical, (j, 0), load(coeffs, (g, j, phase)))
                if degree > 1:
                    lead = load(coeffs, (g, degree, phase))
                    less, more = lead * u, (lead << width) & top
                    for k in range(degree):
                        above = load(logical, (degree - 1, 0)) - less
                        store(logical, (degree - 1, 0), above)
                        for back in range(2, degree - k + 1):
                            j = degree - back
                            above = load(logical, (j, 0)) - above * u
                            store(logical, (j, 0), above)
                for j in range(degree):
                    store(found, (j, 0), load(logical, (j, 0)))
                if degree > 1:
                    # From there 2**width further where the top bit is set.
                    for k in range(degree):
                        above = load(found, (degree - 1, 0)) + more
                        store(found, (degree - 1, 0), above)
                        for back in range(2, degree - k + 1):
                            j = degree - back
                            above = load(found, (j, 0)) + ((above << width) & top)
                            store(found, (j, 0), above)
                value = load(found, (0, 0))
                change = load(logical, (0, 0)) - value
                if g == 0:
                    value += load(rounding, (i,))
                    factor = load(linear, (0, phase))
                    carried = (factor << (bits - linear_shift)) & top
                    value += carried - factor * (r >> linear_shift)
                    change -= carried
                else:
                    value += load(constant, (i - start,))
                store(constant, (i - start,), value)
                drawn = load(taken, (beside, i))
                store(out, (beside, i), (change >> zeros[beside]) - drawn)
                for j in range(1, degree):
                    value, line = load(found, (j, 0)), index + j - 1
                    own = load(coeffs, (g, j, phase))
                    drawn = load(taken, (line, i))
                    store(out, (line, i), ((value - own) >> zeros[line]) - drawn)
                    line = beside + j
                    change = load(logical, (j, 0)) - value
                    drawn = load(taken, (line, i))
                    store(out, (line, i), (change >> zeros[line]) - drawn)
                phase += LANES
                if phase >= period:
                    phase -= period
            index = beside + degree
        for i in range(start, stop, LANES):
            value = load(constant, (i - start,)) >> zeros[0]
            store(out, (0, i), value - load(taken, (0, i)))


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
    polynomial, JACM 1974), for the logical shift; those for the arithmetic one from
    them likewise, where multiplying by the difference is a shift.

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
        out: (V, n) contiguous, what this party gets; the low 64 - zeros[j] bits of
            word j count. May be `taken` itself.
    """
    groups, n = len(degrees), len(rounding)
    require(
        masks.shape == (groups, n)
        and rounding.ndim == 1
        and same_ring(masks)
        and same_ring(out, taken, linear, rounding, shifts, degrees, zeros)
        and out.dtype == np.int64
        and shifts.shape == degrees.shape == (groups,)
        and groups > 0
        and _are_coefficients(coeffs, degrees)
        and linear.shape == (coeffs.shape[2],)
        and taken.shape == out.shape == (words_of(degrees), n)
        and zeros.shape == (len(out),)
        and within(0, zeros, 64)
        and out.flags.c_contiguous
        and 1 <= bits < 64
        and within(0, shifts, bits)
        and 0 <= linear_shift < bits,
        "deal_polynomial",
        masks,
        taken,
        coeffs,
        linear,
        out,
    )
    masks, rounding, taken = map(np.ascontiguousarray, (masks, rounding, taken))
    rows, first, whole = repeated(coeffs), repeated(linear[None]), n - n % LANES
    options = bits, shifts, degrees, rows, first, linear_shift, zeros
    if whole:
        _deal_polynomial(masks, *options, 0, rounding, taken, out)
    if whole < n:
        last = padded(taken, whole)
        coins, phase = padded(rounding, whole), whole % len(linear)
        _deal_polynomial(padded(masks, whole), *options, phase, coins, last, last)
        out[:, whole:] = last[:, : n - whole]


@heats
def _all_types() -> None:
    degrees, coeffs = np.array([2, 2]), np.zeros((2, 3, 2), np.int64)
    values, zeros = np.zeros((7, LANES), np.int64), np.zeros(7, np.int64)
    half = np.zeros(LANES, np.int64)
    for dtype in (np.int32, np.int64):
        openings = np.zeros((2, LANES), dtype)
        polynomial_share(
            openings,
            values,
            widths=np.array([20, 18]),
            degrees=degrees,
            zeros=zeros,
            public=coeffs,
            step=0,
            out=half,
        )
        deal_polynomial(
            openings,
            half,
            values,
            bits=20,
            shifts=np.array([0, 2]),
            degrees=degrees,
            coeffs=coeffs,
            linear=coeffs[0, 1],
            linear_shift=0,
            zeros=zeros,
            out=values,
        )
