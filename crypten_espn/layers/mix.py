"""Public weighted sums of an image's rows, and of its columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from crypten.nn import module as crypten_nn

from .. import nn
from ..graph import Node
from .arithmetic import Arithmetic, Pair, V
from .kind import Kind, pair

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Mix(Kind):
    """rows @ image @ columns.T of each channel, as bilinear resizes and sums are."""

    op = "Mix"
    rows: Matrix
    columns: Matrix

    @classmethod
    def read(cls, node: Node) -> Mix:
        return cls(node.attributes["rows"], node.attributes["columns"])

    def apply(self, a: Arithmetic[V], inputs: Sequence[V]) -> V:
        return a.mix(inputs[0], _tensor(self.rows), _tensor(self.columns))

    def module(self) -> crypten_nn.Module:
        return nn.Mix(_tensor(self.rows), _tensor(self.columns))


@dataclass(frozen=True)
class AdaptiveAveragePool(Kind):
    """Means over windows that overlap or differ, so that there are as many as wanted.

    Args:
        out: rows and columns of the result.
    """

    op = "AdaptiveAveragePool"
    out: Pair

    @classmethod
    def read(cls, node: Node) -> AdaptiveAveragePool | None:
        out = node.attributes["output_size"]
        return cls(pair(out)) if len(out) == 2 else None

    def apply(self, a: Arithmetic[V], inputs: Sequence[V]) -> V:
        height, width = inputs[0].shape[2:]
        rows, columns = nn.means(height, self.out[0]), nn.means(width, self.out[1])
        return a.mix(inputs[0], rows, columns)

    def module(self) -> crypten_nn.Module:
        return nn.AdaptiveAveragePool(self.out)


def _tensor(matrix: Matrix) -> torch.Tensor:
    return torch.tensor(matrix, dtype=torch.float64)
