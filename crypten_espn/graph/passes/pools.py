"""Average pools with whole windows."""

from __future__ import annotations

import math

import numpy as np

from ..network import NetworkGraph, Node


def uniform_pools(graph: NetworkGraph) -> None:
    """Average pools with whole windows; borders that count fewer get a Scale node."""
    for node in list(graph.nodes):
        known = graph.shapes.keys() >= {node.output, *node.inputs}
        if node.op != "AveragePool" or "uniform" in node.attributes or not known:
            continue
        a = node.attributes
        kernel = list(a["kernel_shape"])
        strides = list(a.get("strides", [1] * len(kernel)))
        pads = list(a.get("pads", [0] * 2 * len(kernel)))
        include = bool(a.get("count_include_pad", 0))
        size = graph.shapes[node.inputs[0]][2:]
        out = graph.shapes[node.output][2:]
        half = len(kernel)
        # What ceil_mode adds beyond the declared pads never counts.
        extra = [
            max(
                (out[i] - 1) * strides[i]
                + kernel[i]
                - size[i]
                - pads[i]
                - pads[half + i],
                0,
            )
            for i in range(half)
        ]
        # torch drops a last window that starts beyond the image; ONNX keeps it.
        if any((out[i] - 1) * strides[i] >= size[i] + pads[i] for i in range(half)):
            continue
        counts = _window_counts(size, kernel, strides, pads, out, include)
        sides = [
            p
            for i in reversed(range(half))
            for p in (pads[i], pads[half + i] + extra[i])
        ]
        node.attributes = {"kernel_shape": kernel, "strides": strides, "uniform": 1}
        index = graph.nodes.index(node)
        if any(sides):
            padded = node.output + "_padded"
            graph.shapes[padded] = graph.shapes[node.inputs[0]][:2] + tuple(
                s + pads[i] + pads[half + i] + extra[i] for i, s in enumerate(size)
            )
            graph.nodes.insert(
                index, Node("Pad", [node.inputs[0]], padded, {"pads": sides}, node.name)
            )
            node.inputs[0] = padded
            index += 1
        full = math.prod(kernel)
        if np.any(counts != full):
            pooled = node.output + "_pooled"
            graph.shapes[pooled] = graph.shapes[node.output]
            scale = Node(
                "Scale",
                [pooled],
                node.output,
                {"factor": (full / counts).tolist()},
                node.name,
            )
            node.output = pooled
            graph.nodes.insert(index + 1, scale)


def _window_counts(
    size: tuple[int, ...],
    kernel: list[int],
    strides: list[int],
    pads: list[int],
    out: tuple[int, ...],
    include: bool,
) -> np.ndarray:
    """How many elements each output position of an average pool divides by."""
    counts = np.ones(())
    half = len(kernel)
    for i in range(half):
        low, high = (-pads[i], size[i] + pads[half + i]) if include else (0, size[i])
        starts = np.arange(out[i]) * strides[i] - pads[i]
        inside = np.minimum(starts + kernel[i], high) - np.maximum(starts, low)
        counts = np.multiply.outer(counts, inside)
    return counts
