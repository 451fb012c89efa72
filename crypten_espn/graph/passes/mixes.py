"""Weighted sums of an image's rows, then of its columns, with public weights."""

from __future__ import annotations

import numpy as np

from ..network import Node


def mixed(node: Node, rows: np.ndarray, columns: np.ndarray) -> None:
    """Make a node of an image rows @ image @ columns.T of each channel."""
    node.op, node.inputs = "Mix", node.inputs[:1]
    matrices = (tuple(map(tuple, m.tolist())) for m in (rows, columns))
    node.attributes = dict(zip(("rows", "columns"), matrices, strict=True))


def means(size: int, out: int) -> np.ndarray:
    """What torch's adaptive average pool does to one axis, (out, size)."""
    matrix = np.zeros((out, size))
    for i in range(out):
        first, last = i * size // out, -(-(i + 1) * size // out)
        matrix[i, first:last] = 1 / (last - first)
    return matrix
