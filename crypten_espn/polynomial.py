"""Polynomials with integer coefficients: fit, evaluate in float and in the ring.

A `Polynomial` has coefficients ``numerators[k] / 2**frac_bits``, constant included.
`Polynomial.fit` finds the integers of least squared error to a function, exactly.
A `RingForm` holds the same polynomial as the integers that two parties multiply with
shares modulo 2**64, together with the derived error bound and the headroom.
"""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
import torch

from .errors import DegreeCollapsedWarning, HeadroomError, PolynomialError

MAX_DEGREE = 10
FRAC_BITS = range(6, 21)
# The paper's grid: step 0.01 on [-5, 5]. The same number of points on any interval.
GRID_POINTS = 1001
# What an error counts far from where inputs crowd, against 1 there.
FLOOR = 0.02
# Magnitude bits of a ring element that must stay free: |y| * 2**F < 2**62.
RING_BITS = 62
# Bits kept free above the largest value on the interval, for inputs that leave it.
SPARE_BITS = 3


@dataclass(frozen=True)
class Polynomial:
    """sum_k numerators[k] / 2**frac_bits * x**k, meant for x in `interval`.

    Args:
        numerators: integer numerators, constant term first; trailing zeros are dropped.
        frac_bits: fractional bits q of every coefficient.
        interval: (low, high), where the polynomial stands for its function.
        requested_degree: the degree that was asked for; `degree` is the effective one.

    Raises:
        PolynomialError: non-integer or missing coefficients, a bad interval or scale.
    """

    numerators: tuple[int, ...]
    frac_bits: int
    interval: tuple[float, float]
    requested_degree: int = -1

    def __post_init__(self) -> None:
        numerators = tuple(self.numerators)
        if not numerators or any(type(c) is not int for c in numerators):
            raise PolynomialError(
                f"numerators={self.numerators!r}: at least one Python int is needed, "
                "constant term first; Polynomial.from_coeffs rounds real coefficients"
            )
        while len(numerators) > 1 and numerators[-1] == 0:
            numerators = numerators[:-1]
        object.__setattr__(self, "numerators", numerators)
        object.__setattr__(self, "interval", _checked_interval(self.interval))
        if not 0 <= self.frac_bits <= 40:
            raise PolynomialError(
                f"frac_bits={self.frac_bits}: a coefficient has 0 to 40 fractional bits"
            )
        if self.degree > MAX_DEGREE:
            raise PolynomialError(
                f"degree {self.degree}: at most {MAX_DEGREE}; higher powers do not fit "
                "the ring at a useful precision"
            )
        if self.requested_degree < self.degree:
            object.__setattr__(self, "requested_degree", self.degree)

    @classmethod
    def fit(
        cls,
        function: Callable[[torch.Tensor], torch.Tensor],
        *,
        degree: int,
        interval: tuple[float, float] = (-5.0, 5.0),
        frac_bits: int = 10,
        spread: float | None = None,
    ) -> Polynomial:
        """Integer coefficients of least squared error to a scalar function.

        1. Sample the function on 1,001 evenly spaced points of the interval; an error
           counts by its density, see `spread`.
        2. Solve min_c |V c / 2**frac_bits - y|**2 over integer c to optimality: the
           closest vector of the lattice spanned by the monomials (LLL reduction, then
           Schnorr-Euchner enumeration). Rounding the real solution is not optimal.
        3. Drop top coefficients that became zero and warn when the degree collapsed.

        Args:
            function: maps a float64 tensor of shape (n,) to one of the same shape.
            degree: 1 to 10.
            interval: (low, high), finite.
            frac_bits: 6 to 20.
            spread: standard deviation of the inputs to come. Squared errors count by
                the normal density exp(-(x / spread)**2 / 2) + 0.02; evenly if None, as
                in the paper. Inputs crowd around zero, where ReLU bends: a spread of a
                fifth of the interval's radius is worth about two degrees there, and
                costs accuracy and tameness at the ends.

        Returns:
            A Polynomial whose `degree` is the effective degree.

        Raises:
            PolynomialError: an argument out of its range, or a function whose values
                are not finite on the interval.

        Source: the quantisation-aware fit of Diaa et al., USENIX Security 2024, there
        by a mixed-integer solver and with coefficients limited to 1/2 in magnitude. The
        limit is not needed here: headroom is checked where the ring is chosen.
        """
        if type(degree) is not int or not 1 <= degree <= MAX_DEGREE:
            raise PolynomialError(
                f"degree={degree!r}: an int from 1 to {MAX_DEGREE} is needed"
            )
        if frac_bits not in FRAC_BITS:
            raise PolynomialError(
                f"frac_bits={frac_bits!r}: from {FRAC_BITS[0]} to {FRAC_BITS[-1]}"
            )
        low, high = _checked_interval(interval)
        if spread is not None and not 0 < spread < math.inf:
            raise PolynomialError(
                f"spread={spread}: a positive number is needed, or None to weigh evenly"
            )
        points, values = _sample(function, low, high)
        basis = points[:, None] ** np.arange(degree + 1) / 2.0**frac_bits
        if spread is not None:
            weight = np.sqrt(np.exp(-((points / spread) ** 2) / 2) + FLOOR)
            basis, values = basis * weight[:, None], values * weight
        numerators = _closest_integers(basis, values)
        result = cls(tuple(numerators), frac_bits, (low, high), degree)
        if result.collapsed:
            warnings.warn(
                f"degree {degree} was asked for, but at {frac_bits} fractional bits "
                f"the best fit has degree {result.degree}; raise frac_bits for a true "
                f"degree {degree}",
                DegreeCollapsedWarning,
                stacklevel=2,
            )
        return result

    @classmethod
    def from_coeffs(
        cls,
        coeffs: Sequence[float],
        *,
        frac_bits: int = 10,
        interval: tuple[float, float] = (-5.0, 5.0),
    ) -> Polynomial:
        """Round given real coefficients (constant first) to `frac_bits`.

        Raises:
            PolynomialError: no coefficients, or one that is not finite.
        """
        values = [float(c) for c in coeffs]
        if not values or not all(math.isfinite(c) for c in values):
            raise PolynomialError(
                f"coeffs={values}: at least one finite number is needed, constant first"
            )
        numerators = tuple(round(c * 2**frac_bits) for c in values)
        return cls(numerators, frac_bits, interval, len(values) - 1)

    @property
    def degree(self) -> int:
        """Effective degree: the highest power whose coefficient is not zero."""
        return len(self.numerators) - 1

    @property
    def collapsed(self) -> bool:
        """Whether top coefficients vanished, so that `degree < requested_degree`."""
        return self.degree < self.requested_degree

    @property
    def coeffs(self) -> tuple[float, ...]:
        """Coefficients as floats; ``coeffs[k]`` multiplies ``x**k``."""
        return tuple(c / 2.0**self.frac_bits for c in self.numerators)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Evaluate in floating point (Horner); differentiable, shape of x."""
        result = torch.full_like(x, self.coeffs[-1])
        for c in reversed(self.coeffs[:-1]):
            result = result * x + c
        return result

    def derivative(self) -> Polynomial:
        """The exact derivative, at the same scale and on the same interval."""
        numerators = tuple(k * c for k, c in enumerate(self.numerators))[1:] or (0,)
        return Polynomial(numerators, self.frac_bits, self.interval)

    def max_abs(self, low: float, high: float) -> float:
        """max |p(x)| over [low, high], from the critical points."""
        return _max_abs(self.coeffs, low, high)

    def rmse(self, function: Callable[[torch.Tensor], torch.Tensor]) -> float:
        """Root mean squared error to a function on the fit's grid."""
        points, values = _sample(function, *self.interval)
        approximate = self(torch.from_numpy(points)).numpy()
        return float(np.sqrt(np.mean((approximate - values) ** 2)))

    def ring_form(self, *, frac_bits: int, out_bits: int) -> RingForm:
        """The integers that two parties evaluate, for one input and output scale.

        1. Powers of two and above see the input at a coarser scale S. A finer S makes
           its rounding smaller and the top coefficients' larger: S need not be a power
           of two, so take the one of least error bound.
        2. Round every coefficient to the scale its term needs.

        Args:
            frac_bits: f, the input's fractional bits.
            out_bits: F, the result's fractional bits before its truncation.

        Returns:
            A RingForm, checked for headroom.

        Raises:
            HeadroomError: the result's values on the interval do not fit the ring, or
                F is below f.
        """
        if not 0 <= frac_bits <= out_bits:
            raise HeadroomError(
                f"frac_bits={frac_bits}, out_bits={out_bits}: the result's scale must "
                "be at least the input's, so 0 <= frac_bits <= out_bits"
            )
        form = _best_form(self, frac_bits, out_bits)
        if form.headroom_bits < 0:
            raise HeadroomError(
                f"|p| reaches {self.max_abs(*self.interval):.3g} on {self.interval}: "
                f"out_bits={out_bits} needs {-form.headroom_bits:.1f} bits more than "
                f"the ring's {RING_BITS}; lower out_bits or the coefficients"
            )
        return form

    def widest_out_bits(self, frac_bits: int) -> int:
        """The largest F at which |p| on the interval leaves `SPARE_BITS` in the ring.

        Raises:
            HeadroomError: even F = frac_bits does not fit.
        """
        magnitude = max(self.max_abs(*self.interval), 2.0**-8)
        bits = RING_BITS - SPARE_BITS - math.ceil(math.log2(magnitude))
        if bits < frac_bits:
            raise HeadroomError(
                f"|p| reaches {magnitude:.3g} on {self.interval}: no output scale of "
                f"at least {frac_bits} bits fits the ring; scale the coefficients down"
            )
        return bits

    def to_json(self) -> str:
        """A JSON object with the four fields."""
        return json.dumps(
            {
                "numerators": list(self.numerators),
                "frac_bits": self.frac_bits,
                "interval": list(self.interval),
                "requested_degree": self.requested_degree,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Polynomial:
        """The inverse of `to_json`.

        Raises:
            PolynomialError: not a JSON object of the expected fields and types.
        """
        try:
            fields = json.loads(text)
            return cls(
                tuple(fields["numerators"]),
                int(fields["frac_bits"]),
                tuple(fields["interval"]),
                int(fields["requested_degree"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise PolynomialError(
                f"{text[:80]!r} is not a stored polynomial ({error}); "
                "Polynomial.to_json writes one"
            ) from error

    def __str__(self) -> str:
        asked = f" (degree {self.requested_degree} asked)" if self.collapsed else ""
        return (
            f"{list(self.numerators)} / {2**self.frac_bits} on "
            f"[{self.interval[0]:g}, {self.interval[1]:g}], degree {self.degree}{asked}"
        )


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
        numerators = self.polynomial.numerators
        unit = Fraction(1 << self.out_bits, 1 << self.polynomial.frac_bits)
        return tuple(round(c * unit / self._scale(k)) for k, c in enumerate(numerators))

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
        for k, (c, numerator) in enumerate(zip(self.coeffs, p.numerators, strict=True)):
            stands_for = c * self._scale(k) / (1 << self.out_bits)
            rest = stands_for - Fraction(numerator, 1 << p.frac_bits)
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
def _best_form(polynomial: Polynomial, frac_bits: int, out_bits: int) -> RingForm:
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
    bounds = _top_slope(polynomial, low - 1, high + 1) / scales
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
    return _max_abs([0.0, *slope], low, high) if slope else 0.0


def _checked_interval(interval: tuple[float, float]) -> tuple[float, float]:
    values = tuple(interval)
    if len(values) != 2 or not all(
        isinstance(v, (int, float)) and math.isfinite(v) for v in values
    ):
        raise PolynomialError(f"interval={interval!r}: two finite numbers are needed")
    low, high = float(values[0]), float(values[1])
    if not low < high:
        raise PolynomialError(
            f"interval={interval!r}: the low end must be below the high"
        )
    return low, high


def _sample(
    function: Callable[[torch.Tensor], torch.Tensor], low: float, high: float
) -> tuple[np.ndarray, np.ndarray]:
    points = np.linspace(low, high, GRID_POINTS)
    values = torch.as_tensor(function(torch.from_numpy(points)))
    if values.shape != (GRID_POINTS,) or not bool(torch.isfinite(values).all()):
        raise PolynomialError(
            f"the function gave shape {tuple(values.shape)} or non-finite values on "
            f"[{low:g}, {high:g}]; it must map a tensor element by element to finite "
            "numbers there"
        )
    return points, values.detach().to(torch.float64).numpy()


def _max_abs(coeffs: Sequence[float], low: float, high: float) -> float:
    polynomial = np.polynomial.Polynomial(np.asarray(coeffs, dtype=np.float64))
    roots = np.asarray(polynomial.deriv().roots(), dtype=np.complex128)
    real = roots.real[np.abs(roots.imag) < 1e-9]
    critical = real[(low < real) & (real < high)].tolist()
    return float(np.max(np.abs(polynomial(np.array([low, high, *critical])))))


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
