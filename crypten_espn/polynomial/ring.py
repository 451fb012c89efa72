"""A polynomial as integers modulo 2**64, with its error bound and its headroom."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from .interval import max_abs

if TYPE_CHECKING:
    from .value import Polynomial

# Magnitude bits of a ring element that must stay free: |y| * 2**F < 2**62.
RING_BITS = 62


@dataclass(frozen=True)
class RingForm:
    """A polynomial in integers: Y = c_0 + c_1 X + sum_{k>=2} c_k P**k modulo 2**64.

    X is the input at scale 2**frac_bits; P = X * factor >> shift is the same input at
    the coarser `power_scale`; Y is the result at scale 2**out_bits. Intermediate values
    may wrap; only the result has to fit.

    Error: with |P / power_scale - x| <= 1 / power_scale, the result differs from p(x)
    by at most `error_bound` for x in the interval.
    """

    polynomial: Polynomial
    frac_bits: int
    factor: int
    shift: int
    out_bits: int

    @property
    def power_scale(self) -> Fraction:
        """S, the scale of P: 2**frac_bits * factor / 2**shift."""
        return Fraction(self.factor << self.frac_bits, 1 << self.shift)

    @cached_property
    def coeffs(self) -> tuple[int, ...]:
        """c_k, constant first: p's coefficients at the scale each term needs."""
        p, unit = self.polynomial, 1 << self.out_bits
        return tuple(
            round(p.coefficient(k) * unit / self._scale(k)) for k in range(p.degree + 1)
        )

    def _scale(self, k: int) -> Fraction:
        """The scale of what c_k multiplies."""
        return Fraction(1 << (k * self.frac_bits)) if k < 2 else self.power_scale**k

    @property
    def degree(self) -> int:
        """The degree n; n - 1 products suffice in the one-round protocol."""
        return len(self.coeffs) - 1

    @property
    def headroom_bits(self) -> float:
        """log2 of what the largest |Y| on the interval leaves below 2**62."""
        magnitude = max(self.polynomial.max_abs(*self.polynomial.interval), 2.0**-30)
        return RING_BITS - self.out_bits - math.log2(magnitude)

    @cached_property
    def error_bound(self) -> float:
        """Largest |Y / 2**out_bits - p(x)| for x in the interval.

        1. The powers see an input that is off by at most 1 / power_scale: the mean
           value theorem bounds the effect by the largest slope of the terms of degree
           >= 2.
        2. Each integer coefficient is off by what its rounding left.
        """
        p = self.polynomial
        low, high = p.interval
        step = float(1 / self.power_scale) if self.shift else 0.0
        low, high = low - step, high + step
        error = step * _top_slope(p, low, high)
        reach = max(abs(low), abs(high))
        for k, c in enumerate(self.coeffs):
            rest = c * self._scale(k) / (1 << self.out_bits) - p.coefficient(k)
            error += abs(float(rest)) * reach**k
        return error

    def linear_share(self, x: torch.Tensor, rank: int) -> torch.Tensor:
        """A party's share of c_0 + c_1 X from its share of X; party 0 adds c_0."""
        result = x * as_int64(self.coeffs[1]) if self.degree else torch.zeros_like(x)
        return result + as_int64(self.coeffs[0]) if rank == 0 else result

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        """P of a public X: int64 of the same shape, rounded down."""
        return x * self.factor >> self.shift

    def evaluate(self, x: torch.Tensor, powers_input: torch.Tensor) -> torch.Tensor:
        """Y modulo 2**64 for public ring elements.

        Args:
            x: int64, any shape, the input at scale 2**frac_bits.
            powers_input: int64, same shape, P at scale power_scale; the parties' P is
                the sum of their truncated shares, one off floor(x) at times.

        Returns:
            int64 of the same shape at scale 2**out_bits. Exact modulo 2**64.
        """
        result = torch.zeros_like(x)
        for c in reversed(self.coeffs[2:]):
            result = (result + as_int64(c)) * powers_input
        result = result * powers_input
        if self.degree >= 1:
            result = result + x * as_int64(self.coeffs[1])
        return result + as_int64(self.coeffs[0])


def as_int64(value: int) -> int:
    """The int64 congruent to an integer modulo 2**64."""
    return (value + 2**63) % 2**64 - 2**63


@functools.lru_cache(maxsize=256)
def best_form(polynomial: Polynomial, frac_bits: int, out_bits: int) -> RingForm:
    """The form whose powers' scale gives the least error bound.

    Factors have at most twelve bits: the input's truncation on shares fails a little
    more often for a larger one.
    """
    exact = RingForm(polynomial, frac_bits, 1, 0, out_bits)
    n = polynomial.degree
    if n < 2 or exact.error_bound == 0:
        return exact
    factors, shifts = np.meshgrid(np.arange(2048, 4096), np.arange(1, frac_bits + 12))
    scales = factors * 2.0 ** (frac_bits - shifts)
    low, high = polynomial.interval
    # Truncation moves an input by far less than this.
    beyond = min(1.0, max(abs(low), abs(high)) / 5)
    bounds = _top_slope(polynomial, low - beyond, high + beyond) / scales
    for k, c in enumerate(polynomial.coeffs[2:], start=2):
        wanted = c * 2.0**out_bits / scales**k
        reach = max(abs(low), abs(high)) ** k
        bounds += np.abs(np.rint(wanted) - wanted) * scales**k * 2.0**-out_bits * reach
    best = np.unravel_index(np.argmin(bounds), bounds.shape)
    factor, shift = int(factors[best]), int(shifts[best])
    while factor % 2 == 0 and shift:
        factor, shift = factor // 2, shift - 1
    coarse = RingForm(polynomial, frac_bits, factor, shift, out_bits)
    return min(exact, coarse, key=lambda form: form.error_bound)


def _top_slope(polynomial: Polynomial, low: float, high: float) -> float:
    """The largest slope on [low, high] of the terms of degree two and above."""
    slope = [k * c for k, c in enumerate(polynomial.coeffs)][2:]
    return max_abs([0.0, *slope], low, high) if slope else 0.0
