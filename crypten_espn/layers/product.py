"""Products of two private values: gates, attention over channels."""

from __future__ import annotations

from collections.abc import Sequence

from crypten.nn import module as crypten_nn

from .arithmetic import Arithmetic, V
from .kind import Kind


class Product(Kind):
    """A product of two values, element by element.

    The first has the product's shape; along an axis the second has the same size, or
    one element that serves all, as the gate of a channel does. Passes see to it.
    """

    op = "Mul"

    def apply(self, a: Arithmetic[V], inputs: Sequence[V]) -> V:
        return a.multiply(inputs[0], inputs[1])

    def module(self) -> crypten_nn.Module:
        return crypten_nn.Mul()
