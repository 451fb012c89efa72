"""A function on an interval: its ends checked, its samples, its largest magnitude."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from ..errors import PolynomialError

# The paper's grid: step 0.01 on [-5, 5]. The same number of points on any interval.
GRID_POINTS = 1001


def checked_interval(interval: tuple[float, float]) -> tuple[float, float]:
    """The ends as floats.

    Raises: PolynomialError unless they are finite and in order.
    """
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


def sample(
    function: Callable[[torch.Tensor], torch.Tensor], low: float, high: float
) -> tuple[np.ndarray, np.ndarray]:
    """Points all over the interval, and a function's values there, in float64.

    Raises: PolynomialError if the function gives another shape, NaN or infinity.
    """
    points = np.linspace(low, high, GRID_POINTS)
    values = torch.as_tensor(function(torch.from_numpy(points)))
    if values.shape != (GRID_POINTS,) or not bool(torch.isfinite(values).all()):
        raise PolynomialError(
            f"the function gave shape {tuple(values.shape)} or non-finite values on "
            f"[{low:g}, {high:g}]; it must map a tensor element by element to finite "
            "numbers there"
        )
    return points, values.detach().to(torch.float64).numpy()


def max_abs(coeffs: Sequence[float], low: float, high: float) -> float:
    """The largest absolute value on the interval: at an end, or where p' is 0."""
    polynomial = np.polynomial.Polynomial(np.asarray(coeffs, dtype=np.float64))
    roots = np.asarray(polynomial.deriv().roots(), dtype=np.complex128)
    real = roots.real[np.abs(roots.imag) < 1e-9]
    critical = real[(low < real) & (real < high)].tolist()
    return float(np.max(np.abs(polynomial(np.array([low, high, *critical])))))
