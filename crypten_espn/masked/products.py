"""Two factors of a product, which one linear part opens beside each other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..errors import PlanError
from .linear import Expression, Operation, Shape


class Factors(Operation, frozen=True, tag="factors"):
    """Two values as one row, each counted through: what a product opens.

    The second is a gate: along an axis it has the first one's size, or one element that
    serves all of them. An element of it is opened once, under one mask.

    Args:
        first: of the product's shape.
        second: of as many axes.
    """

    first: Expression
    second: Expression

    @property
    def inputs(self) -> tuple[Expression, ...]:
        return (self.first, self.second)

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        first, second = inputs
        if len(first) != len(second) or any(
            b not in (1, a) for a, b in zip(first, second, strict=True)
        ):
            raise PlanError(
                f"A product of shape {'x'.join(map(str, first))} with a factor of "
                f"{'x'.join(map(str, second))}."
            )
        return (math.prod(first) + math.prod(second),)

    def add_to(self, out: np.ndarray, inputs: Sequence[np.ndarray]) -> None:
        first, second = (value.reshape(len(out), -1) for value in inputs)
        out[:, : first.shape[1]] += first
        out[:, first.shape[1] :] += second


def dealt_words(first: Shape, second: Shape) -> int:
    """Words of the dealer for one input of a product: see `kernels.product`.

    Six for each element of the first factor, two for each of the second.
    """
    return 6 * math.prod(first) + 2 * math.prod(second)


def places(first: Shape, second: Shape) -> np.ndarray:
    """Which element of the second factor each of the first is multiplied by."""
    counted = np.arange(math.prod(second), dtype=np.int64).reshape(second)
    return np.broadcast_to(counted, first).reshape(-1)
