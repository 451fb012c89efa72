"""Public weighted sums of an image's rows, and of its columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from crypten.nn import module as crypten_nn

from .. import nn
from ..graph import Node
from .arithmetic import Arithmetic, V
from .kind import Kind

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Mix(Kind):
    """rows @ image @ columns.T of each channel: resizes, sums, adaptive pools."""

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


def _tensor(matrix: Matrix) -> torch.Tensor:
    return torch.tensor(matrix, dtype=torch.float64)
