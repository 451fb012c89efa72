"""Elements of values at public places: slices, transposes, shuffles, concatenations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from crypten.nn import module as crypten_nn

from .. import nn
from ..graph import IndexMap, Node
from .arithmetic import Arithmetic, V
from .kind import Kind


@dataclass(frozen=True)
class Move(Kind):
    """What a public index map makes of values; nothing is sent, nothing is rounded."""

    op = "Move"
    moves = True
    map: IndexMap

    @classmethod
    def read(cls, node: Node) -> Move:
        return cls(node.attributes["map"])

    def apply(self, a: Arithmetic[V], inputs: Sequence[V]) -> V:
        return a.move(inputs, self.map)

    def module(self) -> crypten_nn.Module:
        return nn.Move(self.map)
