"""The parts of a plan: linear parts with their rings, what follows them, input, output.

Every type is strict: decoding accepts exactly its fields and their types, and bounds
each number. What the numbers have to do with each other is `checks`' business.

A polynomial's numbers stand by channel, the last axis of a step's result: one for all
channels, or one for each.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from functools import reduce
from operator import or_
from typing import Annotated

import msgspec
from msgspec import Meta

from ..pillar.guard import InputGuard
from .kernels import words_of
from .linear import Expression, Pair, Shape
from .products import Factors

VALUE_RING = 64
RING_LIMITS = (20, 56)
# Bits of a second opening that the client sends below those that reach the next layer.
# The client knows what it drops, and that stays in x: with 16, the rest is worth 2**-16
# of a unit, and averaging it out takes 2**32 times as many queries.
KEPT_BITS = 16

Int64 = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Ring = Annotated[int, Meta(ge=RING_LIMITS[0], le=RING_LIMITS[1])]
Bits = Annotated[int, Meta(ge=0, le=62)]
Size = Annotated[int, Meta(ge=1, le=1 << 26)]
# By channel; as many as a text of the largest plan could hold.
Integers = Annotated[tuple[Int64, ...], Meta(min_length=1, max_length=1 << 22)]
Row = Annotated[tuple[Int64, ...], Meta(min_length=3, max_length=17)]
Rows = Annotated[tuple[Row, ...], Meta(min_length=1, max_length=1 << 22)]
Bounds = Annotated[tuple[float, ...], Meta(min_length=1, max_length=1 << 12)]


def _twos(number: int) -> int:
    """How often 2 divides it; of 0 as often as of any number of 64 bits."""
    return (number & -number).bit_length() - 1 if number else 63


class Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Part of a plan: decoding accepts exactly its fields and their types."""


class Linear(Strict, frozen=True):
    """The power 1 of a polynomial: coefficient * (z >> shift), at the server alone.

    Args:
        shift: bits dropped.
        coefficient: integers by channel.
    """

    shift: Bits
    coefficient: Integers


class Group(Strict, frozen=True):
    """Powers of x that share one truncation: x_k = z >> shift, up to one unit.

    Args:
        shift: bits dropped, in every channel.
        coeffs: integers by channel; coeffs[c][k] multiplies x_k**k, and the first is 0.
    """

    shift: Bits
    coeffs: Rows

    @property
    def degree(self) -> int:
        """The highest power, of every channel alike."""
        return len(self.coeffs[0]) - 1

    @property
    def twos(self) -> list[int]:
        """By power j below the degree, the factors 2 of p's Taylor terms above it.

        Of a_k * binomial(k, j) for every k > j, in all channels.
        """
        own = [_twos(reduce(or_, column)) for column in zip(*self.coeffs, strict=True)]
        return [
            min(own[k] + _twos(math.comb(k, j)) for k in range(j + 1, len(own)))
            for j in range(self.degree)
        ]


class Truncated(Strict, frozen=True):
    """What a second opening truncates to the next source.

    Args:
        drop: s = F - f, bits dropped by the second opening.
        frac_bits: f, of the resulting source.
    """

    drop: Annotated[
        int, Meta(ge=VALUE_RING - RING_LIMITS[1], le=VALUE_RING - RING_LIMITS[0])
    ]
    frac_bits: Bits

    @property
    def value_frac_bits(self) -> int:
        """F, fractional bits of the value before."""
        return self.frac_bits + self.drop

    @property
    def ring(self) -> int:
        """Bits of the ring in which the resulting source lives."""
        return VALUE_RING - self.drop

    @property
    def kept(self) -> int:
        """Low bits that the client sends though they are dropped in the end."""
        return min(KEPT_BITS, self.drop)

    @property
    def unsent(self) -> int:
        """Low bits of the client's half of the second opening that it keeps."""
        return self.drop - self.kept

    @property
    def sent_bits(self) -> int:
        """Bits of the client's half of the second opening."""
        return self.ring + self.kept


class Activation(Truncated, frozen=True, kw_only=True, tag="polynomial"):
    """A polynomial between two openings.

    Every group has a mask of its own. The linear term and the constant go with the
    first group's; where there is no group, with a mask that serves them alone.

    Args:
        linear: the power 1, or None.
        groups: the higher powers, each at its own truncation.
        constant: integer constant terms at F bits, by channel.
        pool: height and width of windows that cover an image side by side; the result
            is the values' sums over them. None for the values themselves.
    """

    linear: Linear | None
    groups: Annotated[tuple[Group, ...], Meta(max_length=8)]
    constant: Integers
    pool: Pair | None = None

    def pooled(self, shape: Shape) -> Shape:
        """The result's shape, of values of this shape, channels last."""
        if self.pool is None:
            return shape
        height, width, channels = shape
        return (height // self.pool[0], width // self.pool[1], channels)

    @property
    def columns(self) -> tuple[int, ...]:
        """How many channels each of its parts tells apart."""
        linear = () if self.linear is None else (len(self.linear.coefficient),)
        groups = (len(group.coeffs) for group in self.groups)
        return (len(self.constant), *linear, *groups)

    @property
    def masks(self) -> int:
        """Masks of the first opening."""
        return max(1, len(self.groups))

    @property
    def words(self) -> int:
        """Words of the dealer for one element."""
        return words_of([group.degree for group in self.groups] or [1])

    def zeros(self, ring: int) -> tuple[int, ...]:
        """Low bits that each of the dealer's words is without, in the kernels' order.

        Word and change of power j are multiples of what binomials and coefficients of
        the powers above have in common, a change also of 2**(m-s). What else is left
        out weighs less in the result than what the client does not send of its share.
        """
        if not self.groups:
            shift = 0 if self.linear is None else self.linear.shift
            return self.unsent, max(self.unsent, ring - shift)
        found = [self.unsent]
        for group, shift in zip(self.groups, self.shifts(ring), strict=True):
            width = ring - shift
            common = group.twos
            # With a linear term the first one's constant is a multiple of less.
            common[0] = 0
            spare = [self.unsent - power * width for power in range(group.degree)]
            pairs = list(zip(common, spare, strict=True))
            kept = [max(pair) for pair in pairs[1:]]
            kept += [max(width + bits, low) for bits, low in pairs]
            found += [min(bits, 63) for bits in kept]
        return tuple(found)

    def shifts(self, ring: int) -> tuple[int, ...]:
        """Low bits of each mask's opening that the client does not receive.

        A rounding coin is known to who knows the bits below a group's shift. Without
        any group the client needs the top bit alone, to choose its constant.
        """
        return tuple(group.shift for group in self.groups) or (ring - 1,)


class Product(Truncated, frozen=True, kw_only=True, tag="product"):
    """A product of two values between two openings; the step's root is `Factors`.

    Args:
        dropped: low bits of the first factor and of the second that neither is
            multiplied by nor sent.
    """

    dropped: tuple[Bits, Bits]

    @property
    def linear(self) -> None:
        """No power 1."""
        return None

    @property
    def groups(self) -> tuple[Group, ...]:
        """No powers."""
        return ()

    @property
    def pool(self) -> None:
        """Nothing is summed."""
        return None

    @property
    def masks(self) -> int:
        """Masks of each element of both factors."""
        return 1

    def shifts(self, ring: int) -> tuple[int, ...]:
        """Low bits of each factor's opening that the client does not receive."""
        del ring
        return self.dropped

    def lift(self, frac_bits: int) -> int:
        """Bits by which a product of factors is lifted to F; the factors have g."""
        return self.value_frac_bits - (2 * frac_bits - sum(self.dropped))


class Step(Strict, frozen=True):
    """One linear part of the network and the activation or product after it.

    Args:
        root: the expression to compute; two beside each other for a product.
        ring: bits m of the linear ring.
        frac_bits: g, of its result.
        activation: what follows.
    """

    root: Expression | Factors
    ring: Ring
    frac_bits: Bits
    activation: Activation | Product

    @property
    def opened_bits(self) -> tuple[int, ...]:
        """Bits an element of each part of the server's message."""
        return tuple(self.ring - s for s in self.activation.shifts(self.ring))


class Output(Strict, frozen=True):
    """The network's last linear part: the logits.

    Args:
        root: the expression to compute.
        ring: bits m of the linear ring.
        frac_bits: of the logits.
        noise_bits: d; the server adds noise uniform below 2**d to its share, since
            answers to one input differ by rows of the last layer's weights.
    """

    root: Expression
    ring: Ring
    frac_bits: Bits
    noise_bits: Bits


class Guard(Strict, frozen=True):
    """The bounds of an `InputGuard` as they stand in a plan; public like all of it.

    Args:
        depth, height, energy, roughness, mean, std: by channel, as `InputGuard`'s.
    """

    depth: Bounds
    height: Bounds
    energy: Bounds
    roughness: Bounds
    mean: Bounds
    std: Bounds

    @staticmethod
    def of(guard: InputGuard) -> Guard:
        """The bounds of a guard."""
        return Guard(**asdict(guard))

    def read(self) -> InputGuard:
        """The guard itself.

        Raises:
            DataError: these are no bounds of a guard.
        """
        return InputGuard(**msgspec.structs.asdict(self))


class Input(Strict, frozen=True):
    """The network's input.

    Args:
        shape: (channels, height, width), (channels, length) or (features,), without the
            batch.
        ring: x = D + t holds modulo 2**ring.
        frac_bits: of its integers.
        bound: largest |input| that fits.
        guard: what the client checks of an input before it sends it; None if nothing.
    """

    shape: Annotated[tuple[Size, ...], Meta(min_length=1, max_length=3)]
    ring: Ring
    frac_bits: Bits
    bound: Annotated[float, Meta(gt=0, le=2.0**60)]
    guard: Guard | None = None
