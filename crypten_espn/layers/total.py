"""The sum of any number of values, as Caffe2 and MXNet export a residual."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from crypten import CrypTensor
from crypten.nn import module as crypten_nn

from ..graph import Node
from .arithmetic import Arithmetic, V
from .kind import Kind


class Sum(Kind):
    """A sum of one value or more; nothing is sent, nothing is rounded."""

    op = "Sum"

    @classmethod
    def read(cls, node: Node) -> Sum | None:
        return None if node.attributes else cls()

    def apply(self, a: Arithmetic[V], inputs: Sequence[V]) -> V:
        return functools.reduce(a.add, inputs)

    def module(self) -> crypten_nn.Module:
        return SumOfValues()


class SumOfValues(crypten_nn.Module):
    """CrypTen's own Add takes two values."""

    def forward(self, given: CrypTensor | Sequence[CrypTensor]) -> CrypTensor:
        """The sum of a list of values; a value alone is its own."""
        values = given if isinstance(given, (list, tuple)) else [given]
        return functools.reduce(lambda x, y: x.add(y), values)
