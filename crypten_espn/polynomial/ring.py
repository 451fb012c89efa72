"""A polynomial as integers modulo 2**64, with its error bound and its headroom."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import PolynomialError
from .interval import max_abs

if TYPE_CHECKING:
    from .value import Polynomial

# Magnitude bits of a ring element that must stay free: |y| * 2**F < 2**62.
RING_BITS = 62
# Of the input, before powers are taken: twelve bits.
_FACTORS = range(2048, 4096)


class Form(ABC):
    """A polynomial in integers: Y = c_0 + c_1 X + sum_{k>=2} c_k P**k modulo 2**64.

    X is the input at scale 2**frac_bits; P = X * factor >> shift is the same input at a
    coarser scale; Y is the result at scale 2**out_bits. Intermediate values may wrap;
    only the result has to fit. Where channels have polynomials of their own, so are
    factor and coefficients theirs, and the shift is one for all.

    Attributes:
        degree: n; n - 1 products suffice in the one-round protocol.
        error_bound: the largest |Y / 2**out_bits - p(x)| for x in the interval, if P is
            off by at most one unit.
        headroom_bits: log2 of what the largest |Y| on the interval leaves below 2**62.
    """

    frac_bits: int
    shift: int
    out_bits: int

    @property
    @abstractmethod
    def degree(self) -> int: ...

    @property
    @abstractmethod
    def error_bound(self) -> float: ...

    @property
    @abstractmethod
    def headroom_bits(self) -> float: ...

    @abstractmethod
    def factors(self, like: torch.Tensor) -> int | torch.Tensor:
        """The factor of X, or int64 factors, one a channel, that broadcast over it."""

    @abstractmethod
    def multiple(
        self, k: int, times: int, like: torch.Tensor
    ) -> int | torch.Tensor | None:
        """c_k times a whole number, modulo 2**64; None if c_k is 0.

        An int64, or one a channel as a tensor that broadcasts over `like`.
        """

    @abstractmethod
    def real(self, k: int, like: torch.Tensor) -> float | torch.Tensor:
        """c_k outside any ring: a float, or float64, one a channel."""

    @abstractmethod
    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse a shape, batch first, that it does not apply to.

        Raises:
            PolynomialError: it has another number of channels.
        """

    def linear_share(self, x: torch.Tensor, rank: int) -> torch.Tensor:
        """A party's share of c_0 + c_1 X from its share of X; party 0 adds c_0."""
        slope = self.multiple(1, 1, x)
        result = torch.zeros_like(x) if slope is None else x * slope
        constant = self.multiple(0, 1, x)
        return result if constant is None or rank != 0 else result + constant

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        """X times its factor, of X or a share of it: what is shifted to P."""
        return x * self.factors(x)

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        """P of a public X: int64 of the same shape, rounded down."""
        return self.scaled(x) >> self.shift

    def evaluate(self, x: torch.Tensor, powers_input: torch.Tensor) -> torch.Tensor:
        """Y modulo 2**64 for public ring elements.

        Args:
            x: int64, the input at scale 2**frac_bits; any shape, or (batch, channels,
                ...) where channels have polynomials of their own.
            powers_input: int64, same shape, P; the parties' P is the sum of their
                truncated shares, one off floor(x) at times.

        Returns:
            int64 of the same shape at scale 2**out_bits. Exact modulo 2**64.
        """
        result = torch.zeros_like(x)
        for k in range(self.degree, 1, -1):
            c = self.multiple(k, 1, x)
            result = (result if c is None else result + c) * powers_input
        return result * powers_input + self.linear_share(x, 0)


@dataclass(frozen=True)
class RingForm(Form):
    """The form of one polynomial for all elements; `power_scale` is that of P.

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
        """The polynomial's effective degree."""
        return self.polynomial.degree

    @property
    def headroom_bits(self) -> float:
        """log2 of what the largest |Y| on the interval leaves below 2**62."""
        magnitude = max(self.polynomial.largest, 2.0**-30)
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

    def factors(self, like: torch.Tensor) -> int:
        return self.factor

    def multiple(self, k: int, times: int, like: torch.Tensor) -> int | None:
        c = self.coeffs[k] if k <= self.degree else 0
        return as_int64(c * times) if c else None

    def real(self, k: int, like: torch.Tensor) -> float:
        return float(self.coeffs[k])

    def check(self, shape: tuple[int, ...]) -> None:
        return


@dataclass(frozen=True)
class ChannelForm(Form):
    """The forms of the channels' polynomials, row c for channel c, with one shift."""

    rows: tuple[RingForm, ...]

    @property
    def frac_bits(self) -> int:  # type: ignore[override]
        """Of the input."""
        return self.rows[0].frac_bits

    @property
    def shift(self) -> int:  # type: ignore[override]
        """Bits that P drops."""
        return self.rows[0].shift

    @property
    def out_bits(self) -> int:  # type: ignore[override]
        """Of the result."""
        return self.rows[0].out_bits

    @cached_property
    def degree(self) -> int:
        """The largest of the channels'."""
        return max(row.degree for row in self.rows)

    @cached_property
    def error_bound(self) -> float:
        """The largest of the channels'."""
        return max(row.error_bound for row in self.rows)

    @cached_property
    def headroom_bits(self) -> float:
        """The least of the channels'."""
        return min(row.headroom_bits for row in self.rows)

    @cached_property
    def _factors(self) -> torch.Tensor:
        return torch.tensor([row.factor for row in self.rows])

    @cached_property
    def _coeffs(self) -> tuple[list[int], ...]:
        """c_k of every channel, by k."""
        return tuple(
            [row.coeffs[k] if k <= row.degree else 0 for row in self.rows]
            for k in range(self.degree + 1)
        )

    @cached_property
    def _integers(self) -> tuple[torch.Tensor | None, ...]:
        """c_k modulo 2**64 by k, int64 (channels,); None where all are 0."""
        return tuple(
            torch.tensor([as_int64(c) for c in column]) if any(column) else None
            for column in self._coeffs
        )

    def factors(self, like: torch.Tensor) -> torch.Tensor:
        return across(self._factors, like)

    def multiple(self, k: int, times: int, like: torch.Tensor) -> torch.Tensor | None:
        integers = self._integers[k] if k <= self.degree else None
        return None if integers is None else across(integers * times, like)

    def real(self, k: int, like: torch.Tensor) -> torch.Tensor:
        values = [float(c) for c in self._coeffs[k]]
        return across(torch.tensor(values, dtype=torch.float64), like)

    def check(self, shape: tuple[int, ...]) -> None:
        check_channels(shape, len(self.rows))


def check_channels(shape: tuple[int, ...], channels: int) -> None:
    """Refuse a shape, batch first, whose second axis is not so many channels.

    Raises:
        PolynomialError: it names both numbers.
    """
    if len(shape) < 2 or shape[1] != channels:
        raise PolynomialError(
            f"an input of shape {tuple(shape)} for polynomials of {channels} "
            "channels; channels are the second axis, after the batch"
        )


def across(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """One value a channel, so that it broadcasts over a tensor."""
    return values.to(like.device).reshape(-1, *(1,) * (like.dim() - 2))


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
    factors, shifts = np.meshgrid(np.array(_FACTORS), np.arange(1, frac_bits + 12))
    bounds = _bounds(polynomial, out_bits, factors * 2.0 ** (frac_bits - shifts))
    best = np.unravel_index(np.argmin(bounds), bounds.shape)
    factor, shift = int(factors[best]), int(shifts[best])
    while factor % 2 == 0 and shift:
        factor, shift = factor // 2, shift - 1
    coarse = RingForm(polynomial, frac_bits, factor, shift, out_bits)
    return min(exact, coarse, key=lambda form: form.error_bound)


@functools.lru_cache(maxsize=256)
def best_channel_form(
    polynomials: tuple[Polynomial, ...], frac_bits: int, out_bits: int
) -> ChannelForm:
    """The channels' forms of least error bound that share a shift.

    1. For each channel find the scale of P where its errors balance, as if roundings
       left a half of every coefficient's unit.
    2. Shift by as many bits as keep |X * factor| of every channel near what a factor of
       twelve bits makes of the largest radius: inputs' truncation on shares fails no
       more often than for one polynomial of that radius.
    3. From half to eight times that scale take each channel's factor of least bound,
       roundings known.
    """
    exact = ChannelForm(
        tuple(RingForm(p, frac_bits, 1, 0, out_bits) for p in polynomials)
    )
    if exact.degree < 2 or exact.error_bound == 0:
        return exact
    grid = 2.0 ** np.arange(0, frac_bits + 0.125, 0.125)
    balanced = np.array(
        [grid[_bounds(p, out_bits, grid, known=False).argmin()] for p in polynomials]
    )
    radii = np.array([max(map(abs, p.interval)) for p in polynomials])
    widest = _FACTORS.stop * radii.max() / radii
    room = np.log2(widest / balanced).min()
    shift = max(1, min(frac_bits + math.floor(room), RING_BITS - 1))
    rows = []
    for p, scale, limit in zip(polynomials, balanced, widest, strict=True):
        factors = np.geomspace(scale / 2, scale * 8, 2048) * 2.0 ** (shift - frac_bits)
        factors = np.rint(factors).clip(1, max(1.0, limit))
        bounds = _bounds(p, out_bits, factors * 2.0 ** (frac_bits - shift))
        factor = int(factors[bounds.argmin()])
        rows.append(RingForm(p, frac_bits, factor, shift, out_bits))
    coarse = ChannelForm(tuple(rows))
    return min(exact, coarse, key=lambda form: form.error_bound)


def _bounds(
    polynomial: Polynomial, out_bits: int, scales: np.ndarray, *, known: bool = True
) -> np.ndarray:
    """The error bound at scales of P, nearly; roundings a half each if not known."""
    low, high = polynomial.interval
    reach = max(abs(low), abs(high))
    beyond = min(1.0, reach / 5)  # truncation moves an input by far less
    bounds = _top_slope(polynomial, low - beyond, high + beyond) / scales
    for k, c in enumerate(polynomial.coeffs[2:], start=2):
        wanted = c * 2.0**out_bits / scales**k
        off = np.abs(np.rint(wanted) - wanted) if known else (c != 0) / 2
        bounds += off * scales**k * 2.0**-out_bits * reach**k
    return bounds


def _top_slope(polynomial: Polynomial, low: float, high: float) -> float:
    """The largest slope on [low, high] of the terms of degree two and above."""
    slope = [k * c for k, c in enumerate(polynomial.coeffs)][2:]
    return max_abs([0.0, *slope], low, high) if slope else 0.0
