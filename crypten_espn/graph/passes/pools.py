"""Average pools with whole windows."""

from __future__ import annotations

import math

import numpy as np

from ..network import NetworkGraph, Node
from .pads import padded
from .weights import window


def uniform_pools(graph: NetworkGraph) -> None:
    """Average pools pad with zeros and divide by their whole window, or are refused.

    Where windows at the border count fewer elements, a Scale makes up for it: public
    factors by position, for which nothing is sent.
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
        before_after = (pads[0], pads[2]), (pads[1], pads[3])
        counts = np.outer(
            *(
                _counts(
                    size[i], kernel[i], strides[i], before_after[i], out[i], include
                )
                for i in range(2)
            )
        )
        sides = [*pads[:2], *(pads[2 + i] + extra[i] for i in range(2))]
        if any(sides):
            node.inputs[0] = padded(graph, node, node.inputs[0], sides)
        node.attributes = {"kernel_shape": kernel, "strides": strides}
        full = math.prod(kernel)
        if np.any(counts != full):
            pooled = graph.fresh(f"{node.output}_pooled")
            graph.shapes[pooled] = graph.shapes[node.output]
            factor = {"factor": (full / counts).tolist()}
            scale = Node("Scale", [pooled], node.output, factor, node.name)
            node.output = pooled
            graph.nodes.insert(graph.nodes.index(node) + 1, scale)


def _counts(
    size: int, kernel: int, stride: int, pads: tuple[int, int], out: int, include: bool
) -> np.ndarray:
    """How many elements each window counts along one axis."""
    low, high = pads
    first, last = (-low, size + high) if include else (0, size)
    starts = np.arange(out) * stride - low
    return np.minimum(starts + kernel, last) - np.maximum(starts, first)
