"""What CrypTen computes by comparisons and approximations, right to a hundredth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from crypten.nn import module as crypten_nn

from ..graph import NetworkGraph, Node
from .arithmetic import Arithmetic, V
from .kind import Kind, shape_of


class ReLU6(Kind):
    """The nearest of 0 to 6."""

    op = "ReLU6"
    compares = True

    def apply(self, a: Arithmetic[V], inputs: Sequence[V]) -> V:
        return a.approximated(lambda x: x.clamp(0, 6), inputs[0])

    def module(self) -> crypten_nn.Module:
        return crypten_nn.ReLU6()


class Hardtanh(Kind):
    """The nearest of -1 to 1."""

    op = "Hardtanh"
    compares = True

    def apply(self, a: Arithmetic[V], inputs: Sequence[V]) -> V:
        return a.approximated(lambda x: x.clamp(-1, 1), inputs[0])

    def module(self) -> crypten_nn.Module:
        return crypten_nn.Hardtanh()


class Sigmoid(Kind):
    """1 / (1 + exp(-x)), for |x| below 512."""

    op = "Sigmoid"
    compares = True

    def apply(self, a: Arithmetic[V], inputs: Sequence[V]) -> V:
        return a.approximated(torch.sigmoid, inputs[0])

    def module(self) -> crypten_nn.Module:
        return crypten_nn.Sigmoid()


@dataclass(frozen=True)
class Softmax(Kind):
    """exp(x) divided by its sum along an axis, for values less than 512 apart."""

    op = "Softmax"
    compares = True
    axis: int

    @classmethod
    def read(cls, node: Node) -> Softmax:
        return cls(_axis(node))

    @classmethod
    def problem(cls, node: Node, graph: NetworkGraph) -> str:
        return _of_batch(node, graph) or super().problem(node, graph)

    def apply(self, a: Arithmetic[V], inputs: Sequence[V]) -> V:
        return a.approximated(lambda x: x.softmax(self.axis), inputs[0])

    def module(self) -> crypten_nn.Module:
        return crypten_nn.Softmax(self.axis)


@dataclass(frozen=True)
class LogSoftmax(Kind):
    """The logarithm of softmax."""

    op = "LogSoftmax"
    compares = True
    axis: int

    @classmethod
    def read(cls, node: Node) -> LogSoftmax:
        return cls(_axis(node))

    @classmethod
    def problem(cls, node: Node, graph: NetworkGraph) -> str:
        return _of_batch(node, graph) or super().problem(node, graph)

    def apply(self, a: Arithmetic[V], inputs: Sequence[V]) -> V:
        return a.approximated(lambda x: x.log_softmax(self.axis), inputs[0])

    def module(self) -> crypten_nn.Module:
        return crypten_nn.LogSoftmax(self.axis)


def _axis(node: Node) -> int:
    return int(node.attributes.get("axis", -1))


def _of_batch(node: Node, graph: NetworkGraph) -> str:
    rank = len(shape_of(node, graph))
    if rank and _axis(node) % rank == 0:
        return "it takes all inputs of a batch together; give it another axis"
    return ""
