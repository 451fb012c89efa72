"""A network's layers as CrypTen computes them: an interpreter that holds both shares.

Truncation works on shares, so it rounds as the parties' does; given the same draws, the
result is theirs, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from crypten.encoder import FixedPointEncoder

from ..errors import ConversionError
from ..layers.arithmetic import Arithmetic, Function
from ..polynomial import RING_BITS, AnyPolynomial, Form
from ..protocols import Settings
from .words import Fault, Unit, fault_at

# Inputs at once; bounds memory, not results.
CHUNK = 32


class Draws(Protocol):
    """Where the simulated shares come from; `randomness.Keystream` is one."""

    def ring(self, size: Sequence[int]) -> torch.Tensor:
        """Uniform int64 ring elements of this shape."""
        ...


@dataclass
class Shared:
    """A value modulo 2**64 and rank 0's share of it; the rest is rank 1's."""

    total: torch.Tensor
    first: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.total.shape


class Shares(Arithmetic[Shared]):
    """The network as two CrypTen parties hold it.

    Attributes:
        headroom_bits, failures: of what was computed since `start`.
        overflow, failure: the first of each since `start`; the layer is not set.
    """

    def __init__(
        self, encoder: FixedPointEncoder, chosen: Settings, draws: Draws
    ) -> None:
        self.encoder = encoder
        self.bits = int(encoder._precision_bits)
        self.chosen = chosen
        self.draws = draws
        self.start()

    def start(self) -> None:
        self.headroom_bits = math.inf
        self.failures = 0.0
        self.overflow: Fault | None = None
        self.failure: Fault | None = None

    def share(self, values: torch.Tensor) -> Shared:
        return Shared(values, self.draws.ring(values.shape))

    def product(self, function: Function, x: Shared, weight: Shared) -> Shared:
        total = function(x.total, weight.total)
        wide = function(x.total.double(), weight.total.double())
        return self._divide(self.share(total), self.encoder.scale, wide)

    def add(self, x: Shared, y: Shared) -> Shared:
        total, first = x.total + y.total, x.first + y.first
        self._room(total, x.total.double() + y.total.double(), 2.0**-self.bits, 63)
        return Shared(total, first)

    def local(self, function: Function, *values: Shared) -> Shared:
        """A sum of values, which each party computes on its shares."""
        return Shared(
            function(*[value.total for value in values]),
            function(*[value.first for value in values]),
        )

    def scaled(self, x: Shared, factor: float) -> Shared:
        encoded = self.encoder.encode(factor)
        wide = x.total.double() * encoded.double()
        value = Shared(x.total * encoded, x.first * encoded)
        return self._divide(value, self.encoder.scale, wide)

    def weighed(self, function: Function, x: Shared, matrix: torch.Tensor) -> Shared:
        # The module holds factors in float32; each sum is truncated once.
        encoded = self.encoder.encode(matrix.float())
        value = Shared(function(x.total, encoded), function(x.first, encoded))
        wide = function(x.total.double(), encoded.double())
        return self._divide(value, self.encoder.scale, wide)

    def divided(self, x: Shared, count: int) -> Shared:
        return self._divide(x, count, x.total.double())

    def compared(self, function: Function, x: Shared) -> Shared:
        """Comparisons are exact, and their result is shared afresh."""
        return self.share(function(x.total))

    def approximated(self, function: Function, x: Shared) -> Shared:
        raise ConversionError(
            "CrypTen's approximations, of sigmoid, softmax and bounds, are not "
            "explained. Put polynomials in their place, or run the network."
        )

    def polynomial(self, polynomial: AnyPolynomial, x: Shared) -> Shared:
        form = self.chosen.form(polynomial, self.bits, 2)
        form.check(tuple(x.shape))
        powers = Shared(form.scaled(x.total), form.scaled(x.first))
        if form.shift:
            factors = form.factors(x.total)
            wide = x.total.double() * factors
            powers = self._shift(powers, form.shift, wide, 2.0**-self.bits / factors)
        total = form.evaluate(x.total, powers.total)
        if form.degree < 2:
            y = Shared(total, form.linear_share(x.first, 0))
        else:
            y = self.share(total)
        shift = form.out_bits - self.bits
        wide = _evaluate(form, x.total.double(), powers.total.double())
        unit = 2.0**-form.out_bits
        if self.chosen.exact(2):
            return self._shift_exactly(y, shift, wide, unit)
        return self._shift(y, shift, wide, unit)

    # -- truncation; `wide` is the value without a ring

    def _divide(self, value: Shared, divisor: int, wide: torch.Tensor) -> Shared:
        """CrypTen's: each party divides its share, rounding toward zero."""
        unit = 2.0**-self.bits / divisor
        self._room(value.total, wide, unit, 63)
        second = value.total - value.first
        first = value.first.div(divisor, rounding_mode="trunc")
        total = first + second.div(divisor, rounding_mode="trunc")
        self._failed(total, wide, divisor, unit)
        return Shared(total, first)

    def _shift(
        self, value: Shared, shift: int, wide: torch.Tensor, unit: Unit
    ) -> Shared:
        """`protocols.truncation.local`."""
        self._room(value.total, wide, unit, 63)
        if shift == 0:
            return value
        second = value.total - value.first
        first = (value.first >> shift) + 1
        total = first + (second >> shift)
        self._failed(total, wide, 1 << shift, unit)
        return Shared(total, first)

    def _shift_exactly(
        self, value: Shared, shift: int, wide: torch.Tensor, unit: Unit
    ) -> Shared:
        """`protocols.truncation.exact`: the mask's low bits decide the rounding."""
        self._room(value.total, wide, unit, RING_BITS)
        if shift == 0:
            return value
        mask = self.draws.ring(value.total.shape)
        opened = value.total + mask + 2**RING_BITS
        logical = (mask >> shift) & ((1 << (64 - shift)) - 1)
        total = (opened >> shift) & ((1 << (64 - shift)) - 1)
        total = total - torch.where(opened < 0, logical, mask >> shift)
        return self.share(total - 2 ** (RING_BITS - shift))

    def _room(
        self, total: torch.Tensor, wide: torch.Tensor, unit: Unit, limit: int
    ) -> None:
        """Note the headroom below 2**limit, and the first value beyond it."""
        magnitude = wide.abs()
        largest = float(magnitude.max()) if magnitude.numel() else 0.0
        room = limit - math.log2(max(largest, 1.0))
        self.headroom_bits = min(self.headroom_bits, room)
        if room <= 0 and self.overflow is None:
            at = int((magnitude >= 2.0**limit).flatten().int().argmax())
            self.overflow = fault_at("wraps", wide, at, unit, limit)

    def _failed(
        self, total: torch.Tensor, wide: torch.Tensor, divisor: int, unit: Unit
    ) -> None:
        """Count on |value| / 2**64 failures, and note the first that came."""
        magnitude = wide.abs()
        self.failures += float(magnitude.clamp(max=2.0**64).sum()) / 2.0**64
        if self.failure is None:
            tolerance = 2 + magnitude.max() / divisor * 2.0**-40
            wrong = (total.double() - wide / divisor).abs() > tolerance
            wrong &= magnitude < 2.0**63
            if bool(wrong.any()):
                at = int(wrong.flatten().int().argmax())
                self.failure = fault_at("truncation failed", wide, at, unit, 63)


def _evaluate(form: Form, x: torch.Tensor, powers: torch.Tensor) -> torch.Tensor:
    """`Form.evaluate` in float64, without a ring."""
    result = torch.zeros_like(x)
    for k in range(form.degree, 1, -1):
        result = (result + form.real(k, x)) * powers
    result = result * powers
    if form.degree >= 1:
        result = result + x * form.real(1, x)
    return result + form.real(0, x)
