"""Average pools with whole windows; others are weighted sums."""

from __future__ import annotations

import numpy as np

from ..network import NetworkGraph
from .mixes import mixed
from .pads import padded
from .weights import window


def uniform_pools(graph: NetworkGraph) -> None:
    """Average pools pad with zeros and divide by their whole window.

    Where windows at the border count fewer elements, a pool is the weighted sums of
    rows and columns that it is.
    """
    for node in graph.each("AveragePool"):
        known = graph.shapes.keys() >= {node.output, *node.inputs}
        kernel = list(node.attributes["kernel_shape"])
        if not known or len(kernel) != 2:
            continue
        geometry = window(graph, node, kernel)
        strides, pads = geometry["strides"], geometry["pads"]
        include = bool(node.attributes.get("count_include_pad", 0))
        size = graph.shapes[node.inputs[0]][2:]
        out = graph.shapes[node.output][2:]
        # torch drops a last window that starts beyond the image; ONNX keeps it.
        if any((out[i] - 1) * strides[i] >= size[i] + pads[i] for i in range(2)):
            node.problem = (
                "its last window begins beyond the image; use ceil_mode=False"
            )
            continue
        # What ceil_mode adds beyond the declared pads never counts.
        reach = [(out[i] - 1) * strides[i] + kernel[i] for i in range(2)]
        extra = [max(reach[i] - size[i] - pads[i] - pads[2 + i], 0) for i in range(2)]
        counts = [
            _counts(
                size[i], kernel[i], strides[i], (pads[i], pads[2 + i]), out[i], include
            )
            for i in range(2)
        ]
        if all((counts[i] == kernel[i]).all() for i in range(2)):
            sides = [*pads[:2], *(pads[2 + i] + extra[i] for i in range(2))]
            if any(sides):
                node.inputs[0] = padded(graph, node, node.inputs[0], sides)
            node.attributes = {"kernel_shape": kernel, "strides": strides}
            continue
        matrices = []
        for i in range(2):
            first = (np.arange(out[i]) * strides[i] - pads[i])[:, None]
            place = np.arange(size[i])
            inside = (first <= place) & (place < first + kernel[i])
            matrices.append(inside / counts[i][:, None])
        mixed(node, *matrices)


def _counts(
    size: int, kernel: int, stride: int, pads: tuple[int, int], out: int, include: bool
) -> np.ndarray:
    """How many elements each window counts along one axis."""
    low, high = pads
    first, last = (-low, size + high) if include else (0, size)
    starts = np.arange(out) * stride - low
    return np.minimum(starts + kernel, last) - np.maximum(starts, first)
