"""Least squares for many channels at once, each by its own weights."""

from __future__ import annotations

import math

import numpy as np
from numpy.polynomial import chebyshev

from ..errors import PolynomialError
from .channels import ChannelPolynomials
from .value import FRAC_BITS, MAX_DEGREE, Polynomial

# At this scale rounding the real solution adds 5e-10 of the squared error that an
# exact closest vector leaves, in a thousandth of the time (degree 10, ReLU).
_BITS = FRAC_BITS[-1]
# Channels whose equations are held in memory together.
_TOGETHER = 128


def cells(count: int) -> np.ndarray:
    """The middles of `count` equal cells of [-1, 1], float64."""
    return (np.arange(count) + 0.5) * (2.0 / count) - 1.0


def fit_channels(
    values: np.ndarray, weights: np.ndarray, radii: np.ndarray, degree: int
) -> ChannelPolynomials:
    """For each channel the polynomial of least weighted squared error on [-R, R].

    1. Solve in Chebyshev polynomials of x / R, by QR: well conditioned to degree 10.
    2. Write it in powers of x / U, U the power of two from R on, and round each
       coefficient to 20 bits: |p| moves by at most (degree + 1) / 2**21 of U.

    Args:
        values: (channels, cells) float64, the function at R times `cells`.
        weights: the same shape, not negative: what an error counts.
        radii: (channels,) float64, every R.
        degree: 1 to 10.

    Returns:
        Row c has the interval [-R, R], 20 fractional bits and the exponent of its U.

    Raises:
        PolynomialError: a degree or radius out of range, or values not finite.
    """
    if type(degree) is not int or not 1 <= degree <= MAX_DEGREE:
        raise PolynomialError(
            f"degree={degree!r}: an int from 1 to {MAX_DEGREE} is needed"
        )
    if not bool(np.isfinite(values).all()):
        raise PolynomialError("the function to fit is not finite on a channel's range")
    points = cells(values.shape[1])
    basis = chebyshev.chebvander(points, degree)
    to_powers = np.zeros((degree + 1, degree + 1))
    for k in range(degree + 1):
        powers = chebyshev.cheb2poly(np.eye(degree + 1)[k][: k + 1])
        to_powers[: len(powers), k] = powers
    rows: list[Polynomial] = []
    for start in range(0, len(radii), _TOGETHER):
        part = slice(start, start + _TOGETHER)
        root = np.sqrt(weights[part])
        target = values[part] / radii[part, None]
        q, r = np.linalg.qr(root[:, :, None] * basis)
        right = np.einsum("cnk,cn->ck", q, root * target)
        found = np.linalg.solve(r, right[:, :, None])[:, :, 0] @ to_powers.T
        rows += [
            _rounded(coeffs, float(radius), degree)
            for coeffs, radius in zip(found, radii[part], strict=True)
        ]
    return ChannelPolynomials(tuple(rows))


def _rounded(coeffs: np.ndarray, radius: float, degree: int) -> Polynomial:
    """R * sum c_k (x / R)**k with its coefficients rounded, in units of U."""
    exponent = math.ceil(math.log2(radius))
    ratio = 2.0**exponent / radius
    numerators = tuple(
        round(math.ldexp(float(c) * ratio ** (k - 1), _BITS))
        for k, c in enumerate(coeffs)
    )
    return Polynomial(numerators, _BITS, (-radius, radius), degree, exponent)
