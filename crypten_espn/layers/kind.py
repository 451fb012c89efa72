"""What every kind of layer says of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from crypten.nn import module as crypten_nn

from ..graph import NetworkGraph, Node
from .arithmetic import Arithmetic, V


class Kind(ABC):
    """A layer of a network; a subclass is a kind, its fields what a node says.

    Attributes:
        op: the ONNX operation.
        compares: whether CrypTen evaluates it with comparisons, several rounds each.
        moves: whether it only moves values, and so computes nothing of its own.
    """

    op: ClassVar[str]
    compares: ClassVar[bool] = False
    moves: ClassVar[bool] = False

    @classmethod
    def read(cls, node: Node) -> Kind | None:
        """The layer that a node is; None if the node says more than is computed here.

        Nodes before the passes are read too: they may say what only ONNX computes.
        """
        del node
        return cls()

    @classmethod
    def problem(cls, node: Node, graph: NetworkGraph) -> str:
        """Why a simplified node cannot be converted, with the cure; "" if it can."""
        if any(name in graph.constants for name in node.inputs):
            return (
                "one of its inputs is a constant; only in Add, Sub, Mul, Div and Concat"
            )
        return ""

    @abstractmethod
    def apply(self, a: Arithmetic[V], inputs: Sequence[V]) -> V:
        """What it computes.

        Args:
            inputs: values and parameters in the order of the node's, batch first.
        """

    @abstractmethod
    def module(self) -> crypten_nn.Module:
        """The CrypTen module that computes it."""


def shape_of(node: Node, graph: NetworkGraph) -> tuple[int, ...]:
    """The shape of a node's first input, batch first; () if it is not known."""
    return graph.shapes.get(node.inputs[0], ()) if node.inputs else ()


def pair(values: Sequence[int]) -> tuple[int, int]:
    """Two whole numbers, (rows, columns), of an ONNX attribute."""
    first, second = values
    return int(first), int(second)
