"""Sums and moves of values, for which nothing is sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from crypten.nn import module as crypten_nn

from ..graph import NetworkGraph, Node
from .arithmetic import Arithmetic, V
from .kind import Kind, shape_of


class Add(Kind):
    """A sum of two values."""

    op = "Add"

    def apply(self, a: Arithmetic[V], inputs: Sequence[V]) -> V:
        return a.add(inputs[0], inputs[1])

    def module(self) -> crypten_nn.Module:
        return crypten_nn.Add()


class Flatten(Kind):
    """Images as rows."""

    op = "Flatten"
    moves = True

    @classmethod
    def problem(cls, node: Node, graph: NetworkGraph) -> str:
        found = super().problem(node, graph)
        rank = len(shape_of(node, graph))
        if not found and node.attributes.get("axis", 1) % max(rank, 2) != 1:
            return "flatten must keep the batch: torch.flatten(x, 1)"
        return found

    def apply(self, a: Arithmetic[V], inputs: Sequence[V]) -> V:
        return a.flatten(inputs[0])

    def module(self) -> crypten_nn.Module:
        return crypten_nn.Flatten(1)


@dataclass(frozen=True)
class Concat(Kind):
    """Values beside each other along an axis, the batch counted."""

    op = "Concat"
    moves = True
    axis: int

    @classmethod
    def read(cls, node: Node) -> Concat:
        return cls(node.attributes["axis"])

    @classmethod
    def problem(cls, node: Node, graph: NetworkGraph) -> str:
        found = super().problem(node, graph)
        rank = len(shape_of(node, graph))
        if not found and (not rank or node.attributes.get("axis", 0) % rank == 0):
            return "the batch cannot be concatenated; concatenate channels (dim=1)"
        return found

    def apply(self, a: Arithmetic[V], inputs: Sequence[V]) -> V:
        return a.concat(inputs, self.axis)

    def module(self) -> crypten_nn.Module:
        return crypten_nn.Concat(self.axis)


@dataclass(frozen=True)
class Pad(Kind):
    """Zeros around an image; sides are left, right, top, bottom."""

    op = "Pad"
    moves = True
    sides: tuple[int, int, int, int]

    @classmethod
    def read(cls, node: Node) -> Pad | None:
        sides = node.attributes.get("pads", ())
        if len(node.inputs) != 1 or len(sides) != 4:
            return None
        left, right, top, bottom = sides
        return cls((left, right, top, bottom))

    @classmethod
    def problem(cls, node: Node, graph: NetworkGraph) -> str:
        found = super().problem(node, graph)
        if not found and (len(node.inputs) != 1 or len(shape_of(node, graph)) != 4):
            return "only images are padded, with constants; use torch.nn.ZeroPad2d"
        return found

    def apply(self, a: Arithmetic[V], inputs: Sequence[V]) -> V:
        return a.pad(inputs[0], self.sides)

    def module(self) -> crypten_nn.Module:
        return crypten_nn.ConstantPad2d(self.sides, 0)
