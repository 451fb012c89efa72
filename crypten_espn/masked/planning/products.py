"""Products of two values as the planner sees them: factors, then what is made of them.

A product becomes two layers: its factors as one row, channels last, which ends a linear
part, and their product. So every part has one end, one scale and one ring.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ...layers.arithmetic import Arithmetic, V
from .forms import Form
from .layers import FACTORS, Layer
from .precision import measured_effect

Shapes = tuple[tuple[int, ...], tuple[int, ...]]
# What dropping a factor's bits may add to the result's own rounding, by factor.
_HARDLY = 16


class Row:
    """Both factors beside each other, each channels last."""

    def apply(self, a: Arithmetic[V], inputs: Sequence[V]) -> V:
        return a.local(
            lambda *factors: torch.cat(
                [factor.movedim(1, -1).flatten(1) for factor in factors], 1
            ),
            *inputs,
        )


@dataclass(frozen=True)
class OfRow:
    """The product of both factors of a row.

    Args:
        shapes: of the factors, channels first.
    """

    shapes: Shapes

    def split(self, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors."""
        first, second = (
            half.reshape(len(half), *shape[1:], shape[0]).movedim(-1, 1)
            for half, shape in zip(
                row.split([math.prod(shape) for shape in self.shapes], 1),
                self.shapes,
                strict=True,
            )
        )
        return first, second

    def apply(self, a: Arithmetic[V], inputs: Sequence[V]) -> V:
        return a.local(lambda row: torch.mul(*self.split(row)), inputs[0])


def as_layers(name: str, form: Form, inputs: list[str]) -> tuple[Layer, Layer]:
    """A product's row of factors, and what is made of it."""
    assert form.factors is not None
    size = sum(math.prod(shape) for shape in form.factors)
    factors = Layer(name + FACTORS, Row(), inputs, Form(torch.empty(0, size)))
    return factors, Layer(name, OfRow(form.factors), [factors.name], form)


@dataclass(frozen=True)
class Dropped:
    """Low bits dropped from both factors, and what that does to the outputs.

    Args:
        bits: of the first factor and of the second.
        by_coins: the outputs' mean square error; it differs from run to run.
        by_coefficients: no coefficient is rounded.
    """

    bits: tuple[int, int]
    by_coins: float
    by_coefficients: float = 0.0


def choose_dropped(
    layer: Layer, *, ring: int, frac_bits: int, result_bits: int, value_frac_bits: int
) -> Dropped | None:
    """How many bits of each factor are dropped: the most that hardly move the output.

    The factors keep at most F fractional bits together. A truncation that drops bits
    goes to one of two neighbours at random: its mean square error is a sixth of a
    unit's square. Of what moves the outputs no more than a sixteenth of what the
    result's own truncation does, or no more than it must, what saves most bytes.

    Args:
        layer: the product, with its effects.
        ring, frac_bits: m of both factors, and g.
        result_bits: f, of the result.
        value_frac_bits: F.

    Returns: None if more would have to be dropped than an opening can.
    """
    assert layer.form.factors is not None
    each = np.arange(ring - 2)  # an opening drops at most all but three
    units = np.where(each > 0, 4.0 ** (each - frac_bits) / 6, 0.0)
    first, second = layer.factor_effects
    moved = first * units[:, None] + second * units
    moved[np.add.outer(each, each) < 2 * frac_bits - value_frac_bits] = math.inf
    if not np.isfinite(moved).any():
        return None
    room = layer.effect.rounding * 4.0**-result_bits / 6 / _HARDLY
    sizes = [math.prod(shape) for shape in layer.form.factors]
    saved = np.add.outer(sizes[0] * each, sizes[1] * each)
    saved[moved > max(room, float(moved.min()))] = -1
    a, b = np.unravel_index(int(saved.argmax()), saved.shape)
    return Dropped((int(a), int(b)), float(moved[a, b]))


def effects_of(
    row: torch.Tensor, gradients: Sequence[torch.Tensor], shapes: Shapes
) -> tuple[float, float]:
    """What errors of each factor's elements do to the outputs, their signs random."""
    sizes = [math.prod(shape) for shape in shapes]
    halves = zip(
        row.split(sizes, 1), *(g.split(sizes, 1) for g in gradients), strict=True
    )
    first, second = (
        measured_effect(z, moved, degree=1, radii=np.ones(1)).rounding
        for z, *moved in halves
    )
    return first, second
