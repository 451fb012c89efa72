"""A polynomial with integer coefficients, its one Horner in float, its JSON."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Annotated

import msgspec
import numpy as np
import torch

from ..errors import DegreeCollapsedWarning, HeadroomError, PolynomialError
from .fit import best_numerators
from .interval import checked_interval, max_abs, sample
from .ring import RING_BITS, RingForm, best_form

MAX_DEGREE = 10
FRAC_BITS = range(6, 21)
# Bits kept free above the largest value on the interval, for inputs that leave it.
SPARE_BITS = 3


class _Stored(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The fields of a stored polynomial, of exactly these types."""

    numerators: Annotated[tuple[int, ...], msgspec.Meta(max_length=1 << 10)]
    frac_bits: int
    interval: tuple[float, float]
    requested_degree: int
    exponent: int = 0


@dataclass(frozen=True)
class Polynomial:
    """U * sum_k numerators[k] / 2**frac_bits * (x / U)**k, for x in `interval`.

    The unit U = 2**exponent is 1 unless a fit to inputs far from 1 chose another: then
    the coefficients of all powers have the same number of bits.

    Args:
        numerators: integer numerators, constant term first; trailing zeros are dropped.
        frac_bits: fractional bits q of every coefficient.
        interval: (low, high), where the polynomial stands for its function.
        requested_degree: the degree that was asked for; `degree` is the effective one.
        exponent: of the unit, -40 to 40.

    Raises:
        PolynomialError: non-integer or missing coefficients, a bad interval or scale.
    """

    numerators: tuple[int, ...]
    frac_bits: int
    interval: tuple[float, float]
    requested_degree: int = -1
    exponent: int = 0

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
        object.__setattr__(self, "interval", checked_interval(self.interval))
        if not 0 <= self.frac_bits <= 40:
            raise PolynomialError(
                f"frac_bits={self.frac_bits}: a coefficient has 0 to 40 fractional bits"
            )
        if type(self.exponent) is not int or not -40 <= self.exponent <= 40:
            raise PolynomialError(
                f"exponent={self.exponent!r}: an int from -40 to 40 is needed"
            )
        if max(map(abs, numerators)) >> (RING_BITS - 1):
            raise PolynomialError(
                f"a numerator of {max(map(abs, numerators)).bit_length()} bits: the "
                f"ring has {RING_BITS}; scale the function, or lower frac_bits"
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
        low, high = checked_interval(interval)
        if spread is not None and not 0 < spread < math.inf:
            raise PolynomialError(
                f"spread={spread}: a positive number is needed, or None to weigh evenly"
            )
        points, values = sample(function, low, high)
        numerators = best_numerators(points, values, degree, frac_bits, spread)
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
    def rows(self) -> tuple[Polynomial, ...]:
        """Itself, where polynomials of channels have one a channel."""
        return (self,)

    def widened(self, factors: Sequence[float]) -> Polynomial:
        """The same polynomial, its interval `factors[0]` times as long, as centred.

        In evaluation nothing changes; training clips to the interval, and planners
        take it for the truth.
        """
        low, high = self.interval
        middle, half = (low + high) / 2, (high - low) / 2 * factors[0]
        return replace(self, interval=(middle - half, middle + half))

    @property
    def radii(self) -> np.ndarray:
        """(1,) float64, the largest |x| of the interval, as channels have theirs."""
        return np.array([max(map(abs, self.interval))])

    @property
    def collapsed(self) -> bool:
        """Whether top coefficients vanished, so that `degree < requested_degree`."""
        return self.degree < self.requested_degree

    @property
    def coeffs(self) -> tuple[float, ...]:
        """Coefficients as floats; ``coeffs[k]`` multiplies ``x**k``."""
        return tuple(
            math.ldexp(c, -self._bits(k)) for k, c in enumerate(self.numerators)
        )

    def _bits(self, k: int) -> int:
        """Fractional bits at which numerators[k] is the coefficient of x**k."""
        return self.frac_bits + (k - 1) * self.exponent

    def coefficient(self, k: int) -> Fraction:
        """The coefficient of x**k, exactly; 0 above the degree."""
        if k > self.degree:
            return Fraction(0)
        return Fraction(self.numerators[k]) / Fraction(2) ** self._bits(k)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Evaluate in floating point (Horner); differentiable, shape of x."""
        result = torch.full_like(x, self.coeffs[-1])
        for c in reversed(self.coeffs[:-1]):
            result = result * x + c
        return result

    def derivative(self) -> Polynomial:
        """The exact derivative, at the same scale and on the same interval."""
        numerators = tuple(k * c for k, c in enumerate(self.numerators))[1:] or (0,)
        # Without the unit before the sum, which so many fractional bits more undo.
        bits = self.frac_bits + self.exponent
        numerators = tuple(c << max(-bits, 0) for c in numerators)
        return Polynomial(
            numerators, max(bits, 0), self.interval, exponent=self.exponent
        )

    def scaled(self, inner: int, outer: int) -> Polynomial:
        """p(2**inner * x) / 2**outer, exactly, on the interval over 2**inner.

        Raises:
            PolynomialError: its scale, unit or numerators leave their bounds.
        """
        # The unit moves with x, and takes the result along.
        bits = self.frac_bits + outer - inner
        low, high = self.interval
        return Polynomial(
            tuple(c << max(-bits, 0) for c in self.numerators),
            max(bits, 0),
            (math.ldexp(low, -inner), math.ldexp(high, -inner)),
            self.requested_degree,
            self.exponent - inner,
        )

    def max_abs(self, low: float, high: float) -> float:
        """max |p(x)| over [low, high], from the critical points."""
        return max_abs(self.coeffs, low, high)

    @cached_property
    def largest(self) -> float:
        """max |p(x)| on its own interval; kept, as every evaluation asks for it."""
        return self.max_abs(*self.interval)

    def rmse(self, function: Callable[[torch.Tensor], torch.Tensor]) -> float:
        """Root mean squared error to a function on the fit's grid."""
        points, values = sample(function, *self.interval)
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
        check_scales(frac_bits, out_bits)
        form = best_form(self, frac_bits, out_bits)
        check_headroom(form)
        return form

    def widest_out_bits(self, frac_bits: int) -> int:
        """The largest F at which |p| on the interval leaves `SPARE_BITS` in the ring.

        Raises:
            HeadroomError: even F = frac_bits does not fit.
        """
        magnitude = max(self.largest, 2.0**-8)
        bits = RING_BITS - SPARE_BITS - math.ceil(math.log2(magnitude))
        if bits < frac_bits:
            raise HeadroomError(
                f"|p| reaches {magnitude:.3g} on {self.interval}: no output scale of "
                f"at least {frac_bits} bits fits the ring; scale the coefficients down"
            )
        return bits

    def to_json(self) -> str:
        """A JSON object with the fields; without the exponent where it is 0."""
        fields = asdict(self)
        if not self.exponent:
            del fields["exponent"]
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str) -> Polynomial:
        """The inverse of `to_json`.

        Raises:
            PolynomialError: not a JSON object of the expected fields and types.
        """
        try:
            fields = _DECODER.decode(text)
            return cls(
                fields.numerators,
                fields.frac_bits,
                fields.interval,
                fields.requested_degree,
                fields.exponent,
            )
        except (ValueError, msgspec.MsgspecError, RecursionError) as error:
            raise PolynomialError(
                f"{text[:80]!r} is not a stored polynomial ({error}); "
                "Polynomial.to_json writes one"
            ) from error

    def __str__(self) -> str:
        asked = f" (degree {self.requested_degree} asked)" if self.collapsed else ""
        unit = f" in units of 2**{self.exponent}" if self.exponent else ""
        return (
            f"{list(self.numerators)} / {2**self.frac_bits}{unit} on "
            f"[{self.interval[0]:g}, {self.interval[1]:g}], degree {self.degree}{asked}"
        )


def check_scales(frac_bits: int, out_bits: int) -> None:
    """Refuse scales of an input and a result that no form has.

    Raises:
        HeadroomError: the result's is below the input's.
    """
    if not 0 <= frac_bits <= out_bits:
        raise HeadroomError(
            f"frac_bits={frac_bits}, out_bits={out_bits}: the result's scale must "
            "be at least the input's, so 0 <= frac_bits <= out_bits"
        )


def check_headroom(form: RingForm, where: str = "") -> None:
    """Refuse a form whose results do not fit the ring.

    Raises:
        HeadroomError: |p| on the interval, and by how many bits it is too large.
    """
    if form.headroom_bits < 0:
        p = form.polynomial
        raise HeadroomError(
            f"{where}|p| reaches {p.largest:.3g} on {p.interval}: "
            f"out_bits={form.out_bits} needs {-form.headroom_bits:.1f} bits more than "
            f"the ring's {RING_BITS}; lower out_bits or the coefficients"
        )


# Made here once: two threads that decode a type for the first time crash msgspec.
_DECODER = msgspec.json.Decoder(_Stored)
