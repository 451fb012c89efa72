"""The activation: a public polynomial of every element."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from crypten.nn import module as crypten_nn

from ..graph import POLYNOMIAL_OP, Node
from ..nn import PolynomialActivation
from ..polynomial import Polynomial
from .arithmetic import Arithmetic, V
from .kind import Kind


@dataclass(frozen=True)
class Activation(Kind):
    """A polynomial of every element."""

    op = POLYNOMIAL_OP
    polynomial: Polynomial

    @classmethod
    def read(cls, node: Node) -> Activation:
        return cls(PolynomialActivation.from_onnx(node.attributes).polynomial)

    def apply(self, a: Arithmetic[V], inputs: Sequence[V]) -> V:
        return a.polynomial(self.polynomial, inputs[0])

    def module(self) -> crypten_nn.Module:
        return PolynomialActivation(self.polynomial)
