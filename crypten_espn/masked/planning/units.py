"""The units of public values, and where a linear part reads its sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .layers import Layer


@dataclass(frozen=True)
class Natural:
    """The unit of a public value whose sources are read by whole multipliers.

    Integers stand for real * ratio * 2**max(frac_bits[s] + offsets[s]).

    Args:
        ratio: odd; of pools whose windows are no powers of two.
        offsets: bits by source, of windows that are.
    """

    ratio: int
    offsets: dict[int, int]

    def bits(self, frac_bits: Sequence[int]) -> int:
        return max(frac_bits[s] + offset for s, offset in self.offsets.items())


@dataclass(frozen=True)
class Unit:
    """Integers stand for real * 2**bits * ratio."""

    bits: int
    ratio: float = 1.0

    @property
    def factor(self) -> float:
        return 2.0**self.bits * self.ratio


@dataclass(frozen=True)
class Weighing:
    """A layer with weights as a part reads it.

    Args:
        layer: which.
        part: the number of the part it belongs to.
        divisor: what pools above it divide by, up to the part's end.
        below: the unit of its input.
        largest: of its weights' magnitudes.
    """

    layer: Layer
    part: int
    divisor: int
    below: Natural
    largest: float


@dataclass(frozen=True)
class Public:
    """A source that reaches a part's end without a weight; divisor as above."""

    part: int
    divisor: int


@dataclass
class Readings:
    """Where a part reads sources: through weights, and without."""

    weighings: list[Weighing] = field(default_factory=list)
    public: dict[int, list[Public]] = field(default_factory=dict)
