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

# Of a `Polynomial`: bits, shifts, degrees, coeffs, linear, linear_shift, zeros; what
# stands by channel is repeated.
_Tables = tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray, int, np.ndarray]


def words_of(degrees: Sequence[int] | np.ndarray) -> int:
    """The dealer's words for one element, the groups' degrees given."""
    return 1 + sum(2 * int(degree) - 1 for degree in degrees)


# ---------------------------------------------------------------- both parties


@compiled
def _polynomial_share(
    opened: np.ndarray,
    values: np.ndarray,
    c: np.ndarray,
    phase: int,
    tables: _Tables,
    step: int,
    out: np.ndarray,
) -> None:
    bits, shifts, degrees, coeffs, linear, linear_shift, zeros = tables
    own, period = c.shape[0] > 0, coeffs.shape[2] - LANES
    groups, vectors = opened.shape[0], out.shape[0] - LANES + 1
    for start in range(0, vectors, BLOCK):
        stop = min(start + BLOCK, vectors)
        first = phase
        index = 1
        for g in range(groups):
            width, degree = bits - shifts[g], degrees[g]
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
                if own and g == 0:
                    d = (load(c, (i,)) & ((np.int64(1) << bits) - 1)) >> linear_shift
                    d = d - (np.int64(1) << (bits - 2 - linear_shift))
                    result += load(linear, (0, phase)) * d
                if degree > 1:
                    d = u - offset
                    # Horner in the opened value; the leading coefficient is public.
                    j = degree - 1
                    acc = load(values, (beside - 1, i)) << zeros[beside - 1]
                    acc += (load(values, (beside + j, i)) << zeros[beside + j]) & top
                    if own:
                        acc += load(coeffs, (g, degree, phase)) * d
                        acc += load(coeffs, (g, j, phase))
                    for back in range(2, degree):
                        j, base = degree - back, beside - back
                        other = beside + j
                        acc = acc * d
                        acc += load(values, (base, i)) << zeros[base]
                        acc += (load(values, (other, i)) << zeros[other]) & top
                        if own:
                            acc += load(coeffs, (g, j, phase))
                    result += acc * d
                store(out, (i,), result >> drop)
                phase += LANES
                if phase >= period:
                    phase -= period
            index = beside + degree


# ---------------------------------------------------------------- the dealer


@compiled
def _deal_polynomial(
    masks: np.ndarray,
    rounding: np.ndarray,
    taken: np.ndarray,
    phase: int,
    tables: _Tables,
    out: np.ndarray,
) -> None:
    bits, shifts, degrees, coeffs, linear, linear_shift, zeros = tables
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


# ---------------------------------------------------------------- a polynomial


class Polynomial:
    """A polynomial of opened values as both passes read it, checked once.

    Args:
        bits: m of the opened values' ring.
        shifts, degrees: (groups,) int64; a group of degree 1 has its constant alone.
        coeffs: (groups, K + 1, C): coeffs[g, k] multiplies x**k; K is at least the
            largest degree, and the constants may all stand in the first group. Element
            i is of channel i % C.
        linear, linear_shift: (C,) the linear term's coefficient, and bits dropped from
            x; it goes with the first group's mask, and is the server's alone.
        zeros: (V,) int64, low bits that each of the dealer's words is without.

    Attributes:
        shifts: as given.
        words: V, of the dealer for one element.

    Raises: PlanError where these do not belong together.
    """

    def __init__(
        self,
        *,
        bits: int,
        shifts: np.ndarray,
        degrees: np.ndarray,
        coeffs: np.ndarray,
        linear: np.ndarray,
        linear_shift: int,
        zeros: np.ndarray,
    ) -> None:
        require(
            same_ring(coeffs, linear, shifts, degrees, zeros)
            and coeffs.dtype == np.int64
            and shifts.shape == degrees.shape == (len(coeffs),)
            and coeffs.ndim == 3
            and coeffs.size > 0
            and within(1, degrees, coeffs.shape[1])
            and linear.shape == (coeffs.shape[2],)
            and zeros.shape == (words_of(degrees),)
            and within(0, zeros, 64)
            and 2 <= bits < 64
            and within(0, shifts, bits)
            and 0 <= linear_shift <= bits - 2,
            "Polynomial",
            shifts,
            degrees,
            coeffs,
            linear,
            zeros,
        )
        self.shifts, self.words = shifts, len(zeros)
        own = repeated(linear[None])
        self._period = own.shape[1] - LANES
        self._narrow = within(1, bits - shifts, 33)
        columns = repeated(coeffs)
        self._tables = bits, shifts, degrees, columns, own, linear_shift, zeros

    def share(
        self,
        opened: np.ndarray,
        values: np.ndarray,
        *,
        c: np.ndarray | None,
        step: int,
        out: np.ndarray,
    ) -> None:
        """One party's share of p(x), each operand read once.

        With D_k = (c_k >> s_k) - 2**(m-2-s_k), the sum over groups and powers j of
        coeffs[k, j] * D_k**j from power 1 on and, for each power below the degree, its
        selected value; and the linear term. The client's share is the values alone.

        Args:
            opened: (groups, n), row k is c_k >> s_k modulo 2**(m-s_k). Of int32 where
                none has more than 32 bits, or of int64.
            values: (V, n) this party's shares of the dealer's words, in the module's
                order, word j without its zeros[j] low bits; what stands above
                64 - zeros[j] does not count.
            c: (n,) the opening modulo 2**m in opened's type; None for the client.
            step: low bits dropped from the share at the end.
            out: (n,) contiguous, the share modulo 2**64 without `step` low bits.

        Raises: PlanError where the shapes do not belong together.
        """
        n = len(out)
        require(
            opened.shape == (len(self.shifts), n)
            and out.ndim == 1
            and same_ring(opened)
            and same_ring(out, values)
            and out.dtype == np.int64
            and values.shape == (self.words, n)
            and (c is None or (c.shape == (n,) and c.dtype == opened.dtype))
            and out.flags.c_contiguous
            and 0 <= step < 64
            and (self._narrow or opened.dtype == np.int64),
            "Polynomial.share",
            opened,
            values,
            *(() if c is None else (c,)),
            out,
        )
        opened, values = map(np.ascontiguousarray, (opened, values))
        own = np.empty(0, opened.dtype) if c is None else np.ascontiguousarray(c)
        whole = n - n % LANES
        if whole:
            _polynomial_share(opened, values, own, 0, self._tables, step, out)
        if whole < n:
            last, phase = np.empty(LANES, dtype=np.int64), whole % self._period
            own = own if c is None else padded(own, whole)
            ends = padded(opened, whole), padded(values, whole), own, phase
            _polynomial_share(*ends, self._tables, step, last)
            out[whole:] = last[: n - whole]

    def deal(
        self,
        masks: np.ndarray,
        rounding: np.ndarray,
        taken: np.ndarray,
        *,
        out: np.ndarray,
    ) -> None:
        """The dealer's words, less the shares already taken.

        Coefficients in D of a group's polynomial of D + t are found by repeated
        synthetic division (Shaw and Traub, On the number of multiplications for the
        evaluation of a polynomial, JACM 1974), for the logical shift; those for the
        arithmetic one from them likewise, where multiplying by the difference is a
        shift.

        Args:
            masks: (groups, n) uniform masks r_k modulo 2**m.
            rounding: (n,) int64, added to the constant: the second opening's rounding
                coins.
            taken: (V, n) the other party's shares, uniform.
            out: (V, n) contiguous, what this party gets; the low 64 - zeros[j] bits of
                word j count. May be `taken` itself.

        Raises: PlanError where the shapes do not belong together.
        """
        n = len(rounding)
        require(
            masks.shape == (len(self.shifts), n)
            and rounding.ndim == 1
            and same_ring(masks)
            and same_ring(out, taken, rounding)
            and out.dtype == np.int64
            and taken.shape == out.shape == (self.words, n)
            and out.flags.c_contiguous,
            "Polynomial.deal",
            masks,
            rounding,
            taken,
            out,
        )
        masks, rounding, taken = map(np.ascontiguousarray, (masks, rounding, taken))
        whole = n - n % LANES
        if whole:
            _deal_polynomial(masks, rounding, taken, 0, self._tables, out)
        if whole < n:
            last, phase = padded(taken, whole), whole % self._period
            ends = padded(masks, whole), padded(rounding, whole), last, phase
            _deal_polynomial(*ends, self._tables, last)
            out[:, whole:] = last[:, : n - whole]


@heats
def _all_types() -> None:
    polynomial = Polynomial(
        bits=20,
        shifts=np.array([0, 2]),
        degrees=np.array([2, 2]),
        coeffs=np.zeros((2, 3, 2), np.int64),
        linear=np.zeros(2, np.int64),
        linear_shift=0,
        zeros=np.zeros(7, np.int64),
    )
    values, half = np.zeros((7, LANES), np.int64), np.zeros(LANES, np.int64)
    for dtype in (np.int32, np.int64):
        openings = np.zeros((2, LANES), dtype)
        for c in (openings[0], None):
            polynomial.share(openings, values, c=c, step=0, out=half)
        polynomial.deal(openings, half, values, out=values)
