"""How far rounding moves a network's outputs, and the truncations that move them least.

An error of an activation's result reaches the outputs through their derivatives. Taken
on the calibration inputs, these say what a bit is worth: in a weight, in an activation,
in a power of a polynomial.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ...polynomial import Polynomial
from ..plan import Group


@dataclass(frozen=True)
class Effect:
    """How far errors of y = p(z) move a network's outputs.

    Both are mean squares, summed over the outputs, for an image of the calibration
    inputs; the error of an element of y is a polynomial e of that element of z.

    Args:
        independent: [n]: when elements err by random signs. e = sum_k e_k z**k counts
            sum_jk e_j e_k independent[j + k].
        coherent: [j, k]: when no sign is random. It counts
            sum_jk e_j e_k coherent[j, k].
    """

    independent: np.ndarray
    coherent: np.ndarray

    @property
    def rounding(self) -> float:
        """When every element errs by 1, its sign random."""
        return float(self.independent[0])

    def of_signs(self, error: Mapping[int, float]) -> float:
        """What an error of random sign counts, given by its powers' coefficients."""
        return self._sum(error, lambda j, k: self.independent[j + k])

    def of_bias(self, error: Mapping[int, float]) -> float:
        """What an error without random signs counts."""
        return self._sum(error, lambda j, k: self.coherent[j, k])

    @staticmethod
    def _sum(
        error: Mapping[int, float], weight: Callable[[int, int], np.float64]
    ) -> float:
        total = sum(
            a * b * float(weight(j, k))
            for j, a in error.items()
            for k, b in error.items()
        )
        return max(total, 0.0)


NO_EFFECT = Effect(np.zeros(1), np.zeros((1, 1)))
_ELSEWHERE = 1e-4


def measured_effect(
    z: torch.Tensor, gradients: Sequence[torch.Tensor], *, degree: int, radius: float
) -> Effect:
    """The effect of errors of a polynomial of z, from the outputs' derivatives.

    Calibration inputs are few, and may all be alike: one element in ten thousand is
    taken to lie anywhere in the interval. What no output depends on counts like what
    each does.

    Args:
        z: (batch, ...), the activation's input.
        gradients: of the outputs' sums, signs at random, by y; each shaped like z.
        degree: of the polynomials that errors are.
        radius: of the interval.
    """
    if not any(bool(gradient.any()) for gradient in gradients):
        gradients = [torch.ones_like(z)]
    independent = np.zeros(2 * degree + 1)
    coherent = np.zeros((degree + 1, degree + 1))
    for gradient in gradients:
        power, sums = torch.ones_like(z), []
        for n in range(2 * degree + 1):
            independent[n] += float((gradient.square() * power).sum())
            if n <= degree:
                sums.append((gradient * power).flatten(1).sum(1).numpy())
            power = power * z
        coherent += np.array(sums) @ np.array(sums).T
    count = len(z) * len(gradients)
    order = np.arange(2 * degree + 1)
    even = np.where(order % 2 == 0, radius**order / (order + 1.0), 0.0)
    elsewhere = _ELSEWHERE * independent[0] / count * even
    pairs = order[: degree + 1]
    return Effect(
        independent / count + elsewhere,
        coherent / count + elsewhere[pairs[:, None] + pairs],
    )


def choose_groups(
    polynomial: Polynomial, *, scale: int, value_scale: int, effect: Effect
) -> tuple[Group, ...]:
    """Which truncation serves which powers of a polynomial.

    1. The linear term keeps every bit; it costs no dealer value.
    2. The square has a truncation of its own; from the third power on, an odd one and
       the even one above it share theirs.
    3. A truncation keeps as many bits as its powers' coefficients allow: the rounding
       of x against the rounding of the coefficient at scale F - k f_k.

    Args:
        polynomial: public.
        scale: fractional bits of the opened z.
        value_scale: F.
        effect: of errors of the result.
    """
    groups = []
    for powers, bits, _ in _truncations(polynomial, scale, value_scale, effect):
        coeffs = [0] * (powers[-1] + 1)
        for k in powers:
            coeffs[k] = _coefficient(polynomial, k, value_scale - k * bits)
        groups.append(Group(scale - bits, tuple(coeffs)))
    return tuple(groups)


def evaluation_error(
    polynomial: Polynomial, *, scale: int, value_scale: int, effect: Effect
) -> float:
    """The outputs' mean square error by what `choose_groups` truncates and rounds.

    Args: as for `choose_groups`.
    """
    found = _truncations(polynomial, scale, value_scale, effect)
    return sum(error for _, _, error in found)


def _truncations(
    polynomial: Polynomial, scale: int, value_scale: int, effect: Effect
) -> Iterator[tuple[list[int], int, float]]:
    """Powers that share a truncation, the fractional bits it leaves, the error then.

    A truncation that drops bits goes to one of two neighbours at random, on average a
    sixth of a squared unit away; a coefficient is off in the same way everywhere.
    """
    buckets: list[list[int]] = []
    numerators = polynomial.numerators
    for k in [k for k in range(1, len(numerators)) if numerators[k]] or [1]:
        first = buckets[-1][0] if buckets else 0
        if first >= 3 and first % 2 == 1 and k == first + 1:
            buckets[-1].append(k)
        else:
            buckets.append([k])
    for powers in buckets:
        slope = {k - 1: k * polynomial.coeffs[k] for k in powers}
        by_unit = effect.of_signs(slope) / 6
        errors = []
        for bits in range(scale + 1):
            off = {}
            for k in powers:
                at = value_scale - k * bits
                kept = math.ldexp(_coefficient(polynomial, k, at), -at)
                off[k] = kept - polynomial.coeffs[k]
            by_x = by_unit * 2.0 ** (-2 * bits) if bits < scale else 0.0
            errors.append(by_x + effect.of_bias(off))
        best = errors.index(min(errors))
        yield powers, best, errors[best]


def _coefficient(polynomial: Polynomial, k: int, bits: int) -> int:
    """The coefficient of x**k at that many fractional bits."""
    return shifted(polynomial.numerators[k], bits - polynomial.frac_bits)


def shifted(numerator: int, bits: int) -> int:
    """round(numerator * 2**bits), half up, exactly."""
    if bits >= 0:
        return numerator << bits
    return (numerator + (1 << (-bits - 1))) >> -bits
