"""How far rounding moves a network's outputs, and the truncations that move them least.

An error of an activation's result reaches the outputs through their derivatives. Taken
on the calibration inputs, these say what a bit is worth: in a weight, in an activation,
in a power of a polynomial.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ...polynomial import (
    AnyPolynomial,
    ChannelPolynomials,
    Polynomial,
)
from ..steps import VALUE_RING, Group, Linear

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

    def of_pairs(self, count: int) -> np.ndarray:
        """[c, j, k]: what e_j e_k counts of an error without random signs.

        Channels err independently; of the first `count` powers.
        """
        sums = self.sums[:, :, :count].transpose(1, 2, 0)
        order = np.add.outer(np.arange(count), np.arange(count))
        pairs: np.ndarray = sums @ sums.transpose(0, 2, 1) / len(self.sums)
        pairs += self.elsewhere[:, order]
        return pairs

    def of_factor(self, error: Error) -> float:
        """What such an error counts that is one in all channels."""
        moved = np.zeros(self.sums.shape[:2])
        for k, e in error.items():
            moved += e * self.sums[:, :, k]
        beside = np.maximum(squares(error, self.elsewhere), 0.0)
        return float(np.square(moved.sum(1)).mean() + beside.sum())


def squares(error: Error, weights: np.ndarray) -> np.ndarray:
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
    effect: Effect,
    room: float = 0.0,
) -> Truncations | None:
    """Which truncation serves which powers of a polynomial.

    1. The square has a truncation of its own; from the third power on, an odd one and
       the even one above it share theirs. From degree 7 on, neighbours are put together
       where that moves the output less: high powers have large coefficients that nearly
       cancel, and errors of one truncated x cancel with them. At any degree they are
       where so few truncations leave errors within the room: each is a mask, an
       opening and dealer words of its own.
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
        result_bits: f, of the result; F is what a ring of so many bits leaves it.
        effect: of errors of the result, by the same channels.
        room: the outputs' mean square error that truncated powers may bring, if fewer
            truncations do not.

    Returns: None if too little is left of a coefficient or of z, whatever is kept.
    """
    real = columns_of(rows)
    least = max(0, frac_bits - (ring - 3))
    value_bits = result_bits + VALUE_RING - ring
    kept = _Choice(
        real, radii_of(rows), least, frac_bits, result_bits, value_bits, effect
    )
    buckets = _shared(k for k in range(2, len(real)) if real[k].any())
    parts = kept.parts(buckets, room)
    if parts is None:
        return None
    groups: list[Group] = []
    terms: list[tuple[int, np.ndarray]] = []
    for powers, (_, bits, _, _) in parts:
        own = np.zeros((powers[-1] + 1, real.shape[1]))
        own[powers] = real[powers]
        table = kept.integers(own, bits).astype(np.int64).T.tolist()
        groups.append(Group(frac_bits - bits, tuple(map(tuple, table))))
        terms.append((frac_bits - bits, own))
    found = [best for _, best in parts]
    linear = None
    if real[1].any() or not groups:
        # It drops no more than its mask hides.
        best = kept.best([1], frac_bits - groups[0].shift if groups else least)
        if best is None:
            return None
        found.append(best)
        own = np.stack([np.zeros_like(real[1]), real[1]])
        factors = kept.integers(own, best[1])[1].astype(np.int64)
        linear = Linear(frac_bits - best[1], tuple(factors.tolist()))
        terms.insert(0, (frac_bits - best[1], own))
    constant = kept.integers(real[:1], 0)[0]
    if float(np.abs(constant).max()) >= _LARGEST:
        return None
    return Truncations(
        linear,
        tuple(groups),
        tuple(constant.astype(np.int64).tolist()),
        ((0, real[:1]), *terms),
        sum(by_coins for _, _, by_coins, _ in found),
        sum(by_coefficients for *_, by_coefficients in found),
    )


def _shared(powers: Iterable[int]) -> list[list[int]]:
    """Powers from the square on, those together that are never parted."""
    buckets: list[list[int]] = []
    for k in powers:
        first = buckets[-1][0] if buckets else 0
        if first >= 3 and first % 2 == 1 and k == first + 1:
            buckets[-1].append(k)
        else:
            buckets.append([k])
    return buckets


# The degree from which on truncations are put together.
_FIRST_JOINED = 7
# The sum of the errors, the fractional bits, and the errors by coins and coefficients.
_Best = tuple[float, int, float, float]
# The sum of the errors, and the parts: powers with what serves them.
_Way = tuple[float, list[tuple[list[int], _Best]]]


@dataclass(frozen=True)
class _Choice:
    """How many bits powers of z keep, and which keep the same.

    Args:
        real: (powers, channels) the coefficients.
        radii: (channels,) of the intervals.
        least: the fewest fractional bits.
        frac_bits, result_bits, value_frac_bits, effect: as of `choose_truncations`; F.
    """

    real: np.ndarray
    radii: np.ndarray
    least: int
    frac_bits: int
    result_bits: int
    value_frac_bits: int
    effect: Effect

    def integers(self, real: np.ndarray, bits: int) -> np.ndarray:
        """Coefficients by power as whole numbers, of a z that keeps `bits`."""
        scaled: np.ndarray = np.ldexp(real, self._exponents(len(real), bits))
        return _rounded(scaled)

    def _exponents(self, powers: int, bits: int) -> np.ndarray:
        return self.value_frac_bits - bits * np.arange(powers)[:, None]

    def parts(
        self, buckets: Sequence[list[int]], room: float
    ) -> list[tuple[list[int], _Best]] | None:
        """The buckets, neighbours put together.

        So that fewest are left whose error the room holds; where it holds none, so that
        the output is moved least.
        """
        joins = room > 0 or len(self.real) > _FIRST_JOINED
        # Of the first n buckets, by how many parts they make: the error, and the parts.
        ways: list[dict[int, _Way]] = [{0: (0.0, [])}]
        for end in range(1, len(buckets) + 1):
            found: dict[int, _Way] = {}
            for start in range(end) if joins else (end - 1,):
                powers = [k for bucket in buckets[start:end] for k in bucket]
                best = self.best(powers, self.least) if ways[start] else None
                if best is None:
                    continue
                for count, (error, parts) in ways[start].items():
                    way = error + best[0], [*parts, (powers, best)]
                    known = found.get(count + 1)
                    if known is None or way[0] < known[0]:
                        found[count + 1] = way
            ways.append(found)
        held = [count for count, (error, _) in ways[-1].items() if error <= room]
        if room > 0 and held:
            return ways[-1][min(held)][1]
        # Of ways as good as each other the one with more parts: what a plan of
        # weights that are all zero says of bytes is then the most that others have.
        return min(
            ways[-1].values(), key=lambda way: (way[0], -len(way[1])), default=(0, None)
        )[1]

    def best(self, powers: Sequence[int], least: int) -> _Best | None:
        """The fractional bits at which a truncation moves the output least.

        Args:
            powers: those that share it, in rising order.
            least: the fewest bits that it may keep.
        """
        block = np.ix_(powers, powers)
        by_order = [float(curved[block].sum()) for curved in self._by_order]
        found: list[_Best] = []
        for bits in range(least, self.frac_bits + 1):
            usable, rounded = self._rounding[bits - self.least]
            if not usable[powers].all():
                continue
            by_x = 0.0
            if bits < self.frac_bits:
                first, *more = (
                    max(e, 0.0) * 4.0 ** (-j * bits) for j, e in enumerate(by_order, 1)
                )
                if sum(more) > _MOST_CURVED * first:
                    continue
                by_x = first + sum(more)
            by_coefficient = max(float(rounded[block].sum()), 0.0)
            found.append((by_x + by_coefficient, bits, by_x, by_coefficient))
        return min(found, default=None)

    @cached_property
    def _by_order(self) -> list[np.ndarray]:
        """By derivative and pairs of powers, what a truncation that drops bits moves.

        It goes to one of two neighbours at random: its error to the power 2j is on
        average 2 / ((2j + 1) (2j + 2)), in units to that power.
        """
        count = len(self.real)
        found = []
        for j in range(1, count):
            times = np.array([[math.comb(k, j)] for k in range(count)])
            order = np.maximum(np.add.outer(*2 * [np.arange(count) - j]), 0)
            curved = _pairs(times * self.real, self.effect.independent[:, order])
            found.append(curved * (2 / ((2 * j + 1) * (2 * j + 2))))
        return found

    @cached_property
    def _rounding(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """By bits from `least` on: usable powers, and what rounding coefficients moves.

        The second by pairs of powers; coefficients are off alike everywhere.
        """
        count = len(self.real)
        weights = self.effect.of_pairs(count)
        reach = self.radii ** np.arange(count)[:, None]
        found = []
        for bits in range(self.least, self.frac_bits + 1):
            integers = self.integers(self.real, bits)
            off = np.ldexp(integers, -self._exponents(count, bits)) - self.real
            # Too little is left of a coefficient that counts.
            counts = np.abs(off) * reach >= 2.0**-self.result_bits
            lost = counts & (np.abs(off) > np.abs(self.real) / 4)
            usable = ~lost.any(1) & (np.abs(integers).max(1) < _LARGEST)
            found.append((usable, _pairs(np.where(usable[:, None], off, 0), weights)))
        return found


def _pairs(columns: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(powers, powers) of (powers, channels), each pair's products weighed."""
    found: np.ndarray = np.einsum("jc,kc,cjk->jk", columns, columns, weights)
    return found


_LARGEST = 2.0**62  # of a coefficient's integer


def _rounded(values: np.ndarray) -> np.ndarray:
    """To nearest, half up, exact at any size."""
    below: np.ndarray = np.floor(values)
    return np.where(values - below >= 0.5, below + 1, below)
