"""The activation: a public polynomial of every element, or one for each channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from crypten.nn import module as crypten_nn

from ..graph import POLYNOMIAL_OP, NetworkGraph, Node
from ..nn import PolynomialActivation
from ..polynomial import AnyPolynomial, ChannelPolynomials
from .arithmetic import Arithmetic, V
from .kind import Kind


@dataclass(frozen=True)
class Activation(Kind):
    """A polynomial of every element, the same or its channel's."""

    op = POLYNOMIAL_OP
    polynomial: AnyPolynomial

    @classmethod
    def read(cls, node: Node) -> Activation:
        return cls(PolynomialActivation.from_onnx(node.attributes).polynomial)

    @classmethod
    def problem(cls, node: Node, graph: NetworkGraph) -> str:
        problem = super().problem(node, graph)
        if not problem:
            polynomial = cls.read(node).polynomial
            if isinstance(polynomial, ChannelPolynomials):
                if node.inputs[0] not in graph.shapes:
                    return "the shape of its input is not known"
                polynomial.check_channels(graph.shapes[node.inputs[0]])
        return problem

    def apply(self, a: Arithmetic[V], inputs: Sequence[V]) -> V:
        return a.polynomial(self.polynomial, inputs[0])

    def module(self) -> crypten_nn.Module:
        return PolynomialActivation(self.polynomial)
