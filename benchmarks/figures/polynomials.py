"""Polynomials that stand for ReLU: fitted to integers, or real ones cut to bits."""

from __future__ import annotations

import functools
import math
import warnings

import numpy as np
import torch

from crypten_espn.errors import DegreeCollapsedWarning
from crypten_espn.polynomial import GRID_POINTS, Polynomial

REAL_BITS = 40  # of coefficients that stand for real numbers


def real_fit(degree: int, radius: float) -> list[float]:
    """Real coefficients of least squared error to ReLU on [-radius, radius]."""
    points = np.linspace(-radius, radius, GRID_POINTS)
    fit = np.polynomial.Polynomial.fit(points, np.maximum(points, 0), degree)
    return [float(c) for c in fit.convert().coef]


@functools.lru_cache(maxsize=256)
def polynomial(fit: str, degree: int, bits: int, radius: float) -> Polynomial:
    """A polynomial that stands for ReLU on [-radius, radius].

    Args:
        fit: "aware" (least squared error over integer coefficients), "rounded" or
            "truncated" (the real-valued fit's coefficients, to the nearest or towards
            zero), or "real" (to 40 bits, whatever `bits`).
        degree: what is asked for; top coefficients may become zero.
        bits: fractional bits.
        radius: the interval's.
    """
    interval = (-radius, radius)
    if fit == "aware":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DegreeCollapsedWarning)
            return Polynomial.fit(
                torch.relu, degree=degree, interval=interval, frac_bits=bits
            )
    coeffs = real_fit(degree, radius)
    if fit == "truncated":
        cut = tuple(math.trunc(c * 2**bits) for c in coeffs)
        return Polynomial(cut, bits, interval, degree)
    bits = REAL_BITS if fit == "real" else bits
    return Polynomial.from_coeffs(coeffs, frac_bits=bits, interval=interval)
