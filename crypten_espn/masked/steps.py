"""The parts of a plan: linear parts with their rings, polynomials, input and output.

Every type is strict: decoding accepts exactly its fields and their types, and bounds
each number. What the numbers have to do with each other is `checks`' business.

A polynomial's numbers stand by channel, the last axis of a step's result: one for all
channels, or one for each.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from ..pillar.guard import InputGuard
from .linear import Expression

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


class Activation(Strict, frozen=True):
    """A polynomial between two openings.

    Every group has a mask of its own. The linear term and the constant go with the
    first group's; where there is no group, with a mask that serves them alone.

    Args:
        linear: the power 1, or None.
        groups: the higher powers, each at its own truncation.
        constant: integer constant terms at F bits, by channel.
        drop: s = F - f, bits dropped by the second opening.
        frac_bits: f, of the resulting source.
    """

    linear: Linear | None
    groups: Annotated[tuple[Group, ...], Meta(max_length=8)]
    constant: Integers
    drop: Annotated[
        int, Meta(ge=VALUE_RING - RING_LIMITS[1], le=VALUE_RING - RING_LIMITS[0])
    ]
    frac_bits: Bits

    @property
    def columns(self) -> tuple[int, ...]:
        """How many channels each of its parts tells apart."""
        linear = () if self.linear is None else (len(self.linear.coefficient),)
        groups = (len(group.coeffs) for group in self.groups)
        return (len(self.constant), *linear, *groups)

    @property
    def value_frac_bits(self) -> int:
        """F, fractional bits of the polynomial's value."""
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
    def sent_bits(self) -> int:
        """Bits of the client's half of the second opening."""
        return self.ring + self.kept

    @property
    def masks(self) -> int:
        """Masks of the first opening."""
        return max(1, len(self.groups))

    @property
    def values(self) -> int:
        """Dealer values per element for each of a mask's two cases."""
        return sum(group.degree for group in self.groups) or 1

    def shifts(self, ring: int) -> tuple[int, ...]:
        """Low bits of each mask's opening that the client does not receive.

        A rounding coin is known to who knows the bits below a group's shift. Without
        any group the client needs the top bit alone, to choose its constant.
        """
        return tuple(group.shift for group in self.groups) or (ring - 1,)


@dataclass(frozen=True)
class PolynomialTables:
    """A step's activation as the kernels take it, its C columns by channel.

    Args:
        shifts, widths, degrees: (masks,) of each opening.
        coeffs: (masks, K + 1, C) of each mask's powers; the constant is the first's.
        leading: (masks, C) of each mask's highest power.
        linear, linear_shift: (C,) the power 1, and bits dropped from it.
    """

    shifts: np.ndarray
    widths: np.ndarray
    degrees: np.ndarray
    coeffs: np.ndarray
    leading: np.ndarray
    linear: np.ndarray
    linear_shift: int


class Step(Strict, frozen=True, dict=True):
    """One linear part of the network and the activation after it.

    Args:
        root: the expression to compute.
        ring: bits m of the linear ring.
        frac_bits: g, of its result.
        activation: what follows.
    """

    root: Expression
    ring: Ring
    frac_bits: Bits
    activation: Activation

    @property
    def opened_bits(self) -> tuple[int, ...]:
        """Bits an element of each part of the server's message."""
        return tuple(self.ring - s for s in self.activation.shifts(self.ring))

    @cached_property
    def tables(self) -> PolynomialTables:
        act = self.activation
        shifts = np.array(act.shifts(self.ring), dtype=np.int64)
        degrees = np.array([group.degree for group in act.groups] or [1])
        shape = act.masks, int(degrees.max()) + 1, max(act.columns)
        coeffs = np.zeros(shape, dtype=np.int64)
        for g, group in enumerate(act.groups):
            rows = np.array(group.coeffs, dtype=np.int64)
            coeffs[g, : group.degree + 1] = rows.T
        coeffs[0, 0] = act.constant
        linear = np.zeros(shape[2], dtype=np.int64)
        if act.linear is not None:
            linear[:] = act.linear.coefficient
        return PolynomialTables(
            shifts,
            self.ring - shifts,
            degrees,
            coeffs,
            coeffs[np.arange(act.masks), degrees],
            linear,
            0 if act.linear is None else act.linear.shift,
        )


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
