"""How far rounding moves a network's outputs, and the truncations that move them least.

An error of an activation's result reaches the outputs through their derivatives. Taken
on the calibration inputs, these say what a bit is worth: in a weight, in an activation,
in a power of a polynomial.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ...polynomial import Polynomial
from ..steps import Group, Linear


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


@dataclass(frozen=True)
class Truncations:
    """A polynomial's powers at their truncations, and what rounding does then.

    Args:
        linear, groups: as the plan holds them.
        by_coins: the outputs' mean square error by truncated x; it differs from run to
            run.
        by_coefficients: by rounded coefficients; the same in every run.
    """

    linear: Linear | None
    groups: tuple[Group, ...]
    by_coins: float
    by_coefficients: float


def choose_truncations(
    polynomial: Polynomial,
    *,
    ring: int,
    frac_bits: int,
    result_bits: int,
    value_frac_bits: int,
    effect: Effect,
) -> Truncations | None:
    """Which truncation serves which powers of a polynomial.

    1. The square has a truncation of its own; from the third power on, an odd one and
       the even one above it share theirs.
    2. A truncation keeps as many bits as its powers' coefficients allow: the rounding
       of x against the rounding of the coefficient at F - k f_k bits.
    3. The linear term keeps all bits, or as many as serve its coefficient; it costs no
       dealer value and uses the first group's mask, so it drops no more than that.
    4. No coefficient rounds to 0, or by more than a quarter, unless that moves the
       result by less than a unit on the whole interval.

    Args:
        polynomial: public.
        ring: bits of z; an opening drops at most all but three.
        frac_bits: g, of the opened z.
        result_bits: f, of the result.
        value_frac_bits: F.
        effect: of errors of the result.

    Returns: None if too little is left of a coefficient however z is truncated.
    """
    numerators = polynomial.numerators
    groups = []
    by_coins = by_coefficients = 0.0
    least = max(0, frac_bits - (ring - 3))
    kept = _Choice(polynomial, frac_bits, result_bits, value_frac_bits, effect)
    for powers in _shared(k for k in range(2, len(numerators)) if numerators[k]):
        best = kept.best(powers, range(least, frac_bits + 1))
        if best is None:
            return None
        bits, coin, coefficient = best
        coeffs = [0] * (powers[-1] + 1)
        for k in powers:
            coeffs[k] = polynomial.integer(k, value_frac_bits - k * bits)
        groups.append(Group(frac_bits - bits, tuple(coeffs)))
        by_coins += coin
        by_coefficients += coefficient
    linear = None
    if (len(numerators) > 1 and numerators[1]) or not groups:
        if groups:
            least = frac_bits - groups[0].shift
        best = kept.best([1], range(least, frac_bits + 1))
        if best is None:
            return None
        bits, coin, coefficient = best
        factor = polynomial.integer(1, value_frac_bits - bits)
        linear = Linear(frac_bits - bits, factor)
        by_coins += coin
        by_coefficients += coefficient
    return Truncations(linear, tuple(groups), by_coins, by_coefficients)


def _shared(powers: Iterable[int]) -> list[list[int]]:
    """Powers from the square on, those together that share a truncation."""
    buckets: list[list[int]] = []
    for k in powers:
        first = buckets[-1][0] if buckets else 0
        if first >= 3 and first % 2 == 1 and k == first + 1:
            buckets[-1].append(k)
        else:
            buckets.append([k])
    return buckets


@dataclass(frozen=True)
class _Choice:
    """How many bits powers of z keep; fields as `choose_truncations` takes them."""

    polynomial: Polynomial
    frac_bits: int
    result_bits: int
    value_frac_bits: int
    effect: Effect

    def best(
        self, powers: Sequence[int], choices: Iterable[int]
    ) -> tuple[int, float, float] | None:
        """The fractional bits that move the output least, and both errors then.

        A truncation that drops bits goes to one of two neighbours at random, on average
        a sixth of a squared unit away; a coefficient is off in the same way everywhere.
        """
        coeffs = (*self.polynomial.coeffs, 0.0)
        by_unit = self.effect.of_signs({k - 1: k * coeffs[k] for k in powers}) / 6
        found = []
        for bits in choices:
            off = {}
            for k in powers:
                at = self.value_frac_bits - k * bits
                off[k] = math.ldexp(self.polynomial.integer(k, at), -at)
                off[k] -= coeffs[k]
            if any(self._lost(k, coeffs[k], error) for k, error in off.items()):
                continue
            by_x = by_unit * 2.0 ** (-2 * bits) if bits < self.frac_bits else 0.0
            by_coefficient = self.effect.of_bias(off)
            found.append((by_x + by_coefficient, bits, by_x, by_coefficient))
        if not found:
            return None
        _, bits, by_x, by_coefficient = min(found, key=lambda entry: entry[0])
        return bits, by_x, by_coefficient

    def _lost(self, k: int, coefficient: float, off: float) -> bool:
        """Whether too little is left of a coefficient that counts."""
        radius = max(map(abs, self.polynomial.interval))
        counts = abs(off) * radius**k >= 2.0**-self.result_bits
        return counts and abs(off) > abs(coefficient) / 4
