"""How far rounding moves a network's outputs, and the truncations that move them least.

An error of an activation's result reaches the outputs through their derivatives. Taken
on the calibration inputs, these say what a bit is worth: in a weight, in an activation,
in a power of a polynomial.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ...polynomial import (
    AnyPolynomial,
    ChannelPolynomials,
    Polynomial,
)
from ..steps import Group, Linear

# By power, real numbers by channel: one for all, or one for each.
Error = Mapping[int, np.ndarray]


def by_channel(polynomial: AnyPolynomial) -> tuple[Polynomial, ...]:
    """One polynomial for all channels, or one for each."""
    first, *others = polynomial.rows
    return polynomial.rows if any(row != first for row in others) else (first,)


def columns_of(rows: Sequence[Polynomial]) -> np.ndarray:
    """(degree + 1, channels) float64, the degree at least 1."""
    if len(rows) > 1:
        table = ChannelPolynomials(tuple(rows)).coeffs.T
    else:
        table = np.array(rows[0].coeffs)[:, None]
    return table if len(table) > 1 else np.vstack([table, np.zeros_like(table)])


def radii_of(rows: Sequence[Polynomial]) -> np.ndarray:
    """(channels,), of each one's interval."""
    return np.array([max(map(abs, row.interval)) for row in rows])


@dataclass(frozen=True)
class Effect:
    """How far errors of y = p(z) move a network's outputs.

    All are mean squares, summed over the outputs, for an image of the calibration
    inputs; the error of an element of y is a polynomial e of that element of z, each
    channel's with coefficients of its own.

    Args:
        independent: [c, n]: when elements err by random signs. e = sum_k e_k z**k
            counts sum_jk e_j e_k independent[c, j + k].
        sums: [i, c, k]: when no sign is random. In sample i the outputs move by
            sum_k e_k sums[i, c, k].
        elsewhere: [c, n]: what counts beside the samples, as `independent`.
    """

    independent: np.ndarray
    sums: np.ndarray
    elsewhere: np.ndarray

    @property
    def rounding(self) -> float:
        """When every element errs by 1, its sign random."""
        return float(self.independent[:, 0].sum())

    def of_signs(self, error: Error) -> float:
        """What an error of random sign counts, given by its powers' coefficients."""
        return float(np.maximum(_squares(error, self.independent), 0.0).sum())

    def of_bias(self, error: Error) -> float:
        """What an error without random signs counts; channels err independently."""
        return self._of_sums(error, np.square(self._moved(error)).sum(1))

    def of_factor(self, error: Error) -> float:
        """What such an error counts that is one in all channels."""
        return self._of_sums(error, np.square(self._moved(error).sum(1)))

    def _moved(self, error: Error) -> np.ndarray:
        """(samples, channels)."""
        moved = np.zeros(self.sums.shape[:2])
        for k, e in error.items():
            moved += e * self.sums[:, :, k]
        return moved

    def _of_sums(self, error: Error, squares: np.ndarray) -> float:
        beside = np.maximum(_squares(error, self.elsewhere), 0.0)
        return float(squares.mean() + beside.sum())


def _squares(error: Error, weights: np.ndarray) -> np.ndarray:
    """By channel, sum_jk e_j e_k weights[c, j + k]."""
    total = np.zeros(len(weights))
    for j, a in error.items():
        for k, b in error.items():
            total += a * b * weights[:, j + k]
    return total


NO_EFFECT = Effect(np.zeros((1, 1)), np.zeros((1, 1, 1)), np.zeros((1, 1)))
_ELSEWHERE = 1e-4
# What higher derivatives may add to the first's error. Beyond, a unit is no longer
# small beside what a channel sees, and no estimate holds.
_MOST_CURVED = 0.25


def measured_effect(
    z: torch.Tensor,
    gradients: Sequence[torch.Tensor],
    *,
    degree: int,
    radii: np.ndarray,
) -> Effect:
    """The effect of errors of a polynomial of z, from the outputs' derivatives.

    Calibration inputs are few, and may all be alike: one element in ten thousand is
    taken to lie anywhere in the interval. What no output depends on counts like what
    each does.

    Args:
        z: (batch, channels, ...), the activation's input.
        gradients: of the outputs' sums, signs at random, by y; each shaped like z.
        degree: of the polynomials that errors are.
        radii: of the intervals, one for all channels or one for each.
    """
    if not any(bool(gradient.any()) for gradient in gradients):
        gradients = [torch.ones_like(z)]
    shape = len(z), len(radii), -1
    z = z.reshape(shape)
    independent = np.zeros((len(radii), 2 * degree + 1))
    sums = []
    for gradient in gradients:
        gradient = gradient.reshape(shape)
        power = torch.ones_like(z)
        for n in range(2 * degree + 1):
            independent[:, n] += (gradient.square() * power).sum((0, 2)).numpy()
            if n <= degree:
                sums.append((gradient * power).sum(2).numpy())
            power = power * z
    count = len(z) * len(gradients)
    order = np.arange(2 * degree + 1)
    even = np.where(order % 2 == 0, radii[:, None] ** order / (order + 1.0), 0.0)
    elsewhere = _ELSEWHERE * independent[:, :1] / count * even
    # (gradients * powers, batch, channels) to (gradients * batch, channels, powers)
    by_power = np.array(sums).reshape(len(gradients), degree + 1, len(z), len(radii))
    samples = by_power.transpose(0, 2, 3, 1).reshape(count, len(radii), degree + 1)
    return Effect(independent / count + elsewhere, samples, elsewhere)


@dataclass(frozen=True)
class Truncations:
    """A polynomial's powers at their truncations, and what rounding does then.

    Args:
        linear, groups, constant: as the plan holds them.
        terms: of the constant, the linear term and each group, the bits dropped and
            the real coefficients that its integers stand for, by power and channel.
        by_coins: the outputs' mean square error by truncated x; it differs from run to
            run.
        by_coefficients: by rounded coefficients; the same in every run.
    """

    linear: Linear | None
    groups: tuple[Group, ...]
    constant: tuple[int, ...]
    terms: tuple[tuple[int, np.ndarray], ...]
    by_coins: float
    by_coefficients: float


def choose_truncations(
    rows: Sequence[Polynomial],
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
       of x against the rounding of the coefficient at F - k f_k bits, over all
       channels.
    3. The linear term keeps all bits, or as many as serve its coefficient; it costs no
       dealer value and uses the first group's mask, so it drops no more than that.
    4. No coefficient rounds to 0, or by more than a quarter, unless that moves the
       result by less than a unit on the whole interval; and no unit is so large that
       the first derivative does not say how far it moves the result.

    Args:
        rows: public; one for all channels, or one for each.
        ring: bits of z; an opening drops at most all but three.
        frac_bits: g, of the opened z.
        result_bits: f, of the result.
        value_frac_bits: F.
        effect: of errors of the result, by the same channels.

    Returns: None if too little is left of a coefficient or of z, whatever is kept.
    """
    left = columns_of(rows).copy()
    kept = _Choice(radii_of(rows), frac_bits, result_bits, value_frac_bits, effect)
    least = max(0, frac_bits - (ring - 3))
    choices: Iterable[int] = range(least, frac_bits + 1)
    groups: list[Group] = []
    terms: list[tuple[int, np.ndarray]] = []
    by_coins = by_coefficients = 0.0
    used = [k for k in range(2, len(left)) if left[k].any()]
    for powers in reversed(_shared(used)):
        own = np.zeros((powers[-1] + 1, left.shape[1]))
        own[powers] = left[powers]
        best = kept.best(own, powers, choices)
        if best is None:
            return None
        bits, coin, coefficient = best
        integers = kept.integers(own, bits)
        table = integers.astype(np.int64).T.tolist()
        groups.insert(0, Group(frac_bits - bits, tuple(map(tuple, table))))
        terms.insert(0, (frac_bits - bits, own))
        by_coins += coin
        by_coefficients += coefficient
    linear = None
    if left[1].any() or not groups:
        if groups:
            choices = range(frac_bits - groups[0].shift, frac_bits + 1)
        own = np.stack([np.zeros_like(left[1]), left[1]])
        best = kept.best(own, [1], choices)
        if best is None:
            return None
        bits, coin, coefficient = best
        factors = kept.integers(own, bits)[1].astype(np.int64)
        linear = Linear(frac_bits - bits, tuple(factors.tolist()))
        terms.insert(0, (frac_bits - bits, own))
        by_coins += coin
        by_coefficients += coefficient
    constant = kept.integers(left[:1], 0)[0]
    if float(np.abs(constant).max()) >= _LARGEST:
        return None
    return Truncations(
        linear,
        tuple(groups),
        tuple(constant.astype(np.int64).tolist()),
        ((0, left[:1]), *terms),
        by_coins,
        by_coefficients,
    )


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
    """How many bits powers of z keep.

    Args:
        radii: (channels,) of the intervals.
        frac_bits, result_bits, value_frac_bits, effect: as of `choose_truncations`.
    """

    radii: np.ndarray
    frac_bits: int
    result_bits: int
    value_frac_bits: int
    effect: Effect

    def integers(self, real: np.ndarray, bits: int) -> np.ndarray:
        """Coefficients by power as whole numbers, of a z that keeps `bits`."""
        scaled: np.ndarray = np.ldexp(real, self._exponents(len(real), bits))
        return _rounded(scaled)

    def reals(self, integers: np.ndarray, bits: int) -> np.ndarray:
        """What they stand for."""
        real: np.ndarray = np.ldexp(integers, -self._exponents(len(integers), bits))
        return real

    def _exponents(self, powers: int, bits: int) -> np.ndarray:
        return self.value_frac_bits - bits * np.arange(powers)[:, None]

    def best(
        self,
        real: np.ndarray,
        powers: Sequence[int],
        choices: Iterable[int],
    ) -> tuple[int, float, float] | None:
        """The fractional bits that move the output least, and both errors then.

        A truncation that drops bits goes to one of two neighbours at random: its error
        to the power 2j is on average 2 / ((2j + 1) (2j + 2)), in units to that power. A
        coefficient is off in the same way everywhere.

        Args:
            real: coefficients by power and channel.
            powers: those that are not 0.
            choices: of fractional bits.
        """
        # By the order of the derivative: the first alone, unless a unit is large beside
        # what a channel sees.
        by_order = [
            self.effect.of_signs({k - j: math.comb(k, j) * real[k] for k in later})
            * (2 / ((2 * j + 1) * (2 * j + 2)))
            for j in range(1, powers[-1] + 1)
            if (later := [k for k in powers if k >= j])
        ]
        found = []
        for bits in choices:
            integers = self.integers(real, bits)
            if float(np.abs(integers).max()) >= _LARGEST:
                continue
            error = self.reals(integers, bits) - real
            off = {k: error[k] for k in powers}
            if any(self._lost(k, real[k], e) for k, e in off.items()):
                continue
            by_x = 0.0
            if bits < self.frac_bits:
                first, *more = (
                    e * 4.0 ** (-j * bits) for j, e in enumerate(by_order, 1)
                )
                if sum(more) > _MOST_CURVED * first:
                    continue
                by_x = first + sum(more)
            by_coefficient = self.effect.of_bias(off)
            found.append((by_x + by_coefficient, bits, by_x, by_coefficient))
        if not found:
            return None
        _, bits, by_x, by_coefficient = min(found, key=lambda entry: entry[0])
        return bits, by_x, by_coefficient

    def _lost(self, k: int, real: np.ndarray, off: np.ndarray) -> bool:
        """Whether too little is left of a coefficient that counts."""
        counts = np.abs(off) * self.radii**k >= 2.0**-self.result_bits
        return bool((counts & (np.abs(off) > np.abs(real) / 4)).any())


_LARGEST = 2.0**62  # of a coefficient's integer


def _rounded(values: np.ndarray) -> np.ndarray:
    """To nearest, half up, exact at any size."""
    below: np.ndarray = np.floor(values)
    return np.where(values - below >= 0.5, below + 1, below)
