"""Products of two private values: gates, attention over channels."""

from __future__ import annotations

import math
from collections.abc import Sequence

from crypten.nn import module as crypten_nn

from .arithmetic import Arithmetic, V
from .kind import Kind


class Product(Kind):
    """A product of two values, element by element.

    One of them has the product's shape; along an axis the other has the same size, or
    one element that serves all, as the gate of a channel does.
    """

    op = "Mul"

    def apply(self, a: Arithmetic[V], inputs: Sequence[V]) -> V:
        x, y = inputs
        if math.prod(x.shape[1:]) < math.prod(y.shape[1:]):
            x, y = y, x
        return a.multiply(x, y)

    def module(self) -> crypten_nn.Module:
        return crypten_nn.Mul()
