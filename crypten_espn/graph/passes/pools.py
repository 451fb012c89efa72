"""Average pools with whole windows."""

from __future__ import annotations

import math
from itertools import pairwise, product

import numpy as np

from ..network import NetworkGraph, Node
from .pads import padded
from .selections import as_convolution
from .weights import window

Run = tuple[int, int, int]


def uniform_pools(graph: NetworkGraph) -> None:
    """Average pools pad with zeros and divide by their whole window, or are refused.

    Where windows at the border count fewer elements, each part of the image that
    divides by one number is a depthwise convolution of its own, and they are added.
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
        runs = [
            _runs(size[i], kernel[i], strides[i], pads[i], pads[2 + i], out[i], include)
            for i in range(2)
        ]
        sides = [*pads[:2], *(pads[2 + i] + extra[i] for i in range(2))]
        if any(sides):
            node.inputs[0] = padded(graph, node, node.inputs[0], sides)
        if all(len(r) == 1 and r[0][2] == k for r, k in zip(runs, kernel, strict=True)):
            node.attributes = {"kernel_shape": kernel, "strides": strides}
        else:
            _by_parts(graph, node, runs, kernel, strides)


def _runs(
    size: int, kernel: int, stride: int, low: int, high: int, out: int, include: bool
) -> list[Run]:
    """Stretches (start, stop, count) of windows that count alike along one axis."""
    first, last = (-low, size + high) if include else (0, size)
    starts = np.arange(out) * stride - low
    counts = np.minimum(starts + kernel, last) - np.maximum(starts, first)
    cuts = [0, *(np.flatnonzero(np.diff(counts)) + 1).tolist(), out]
    return [(a, b, int(counts[a])) for a, b in pairwise(cuts)]


def _by_parts(
    graph: NetworkGraph,
    node: Node,
    runs: list[list[Run]],
    kernel: list[int],
    strides: list[int],
) -> None:
    shape = graph.shapes[node.inputs[0]]
    out = graph.shapes[node.output]
    parts = []
    for index, rectangle in enumerate(product(*runs)):
        weight = np.zeros((shape[1], 1, *_reach(shape, rectangle, strides, kernel)))
        (top, bottom, _), (left, right, _) = rectangle
        row, column = top * strides[0], left * strides[1]
        count = math.prod(run[2] for run in rectangle)
        weight[:, :, row : row + kernel[0], column : column + kernel[1]] = 1 / count
        name = graph.fresh(f"{node.output}_part{index}")
        graph.shapes[name] = (*out[:2], bottom - top, right - left)
        part = Node("Conv", node.inputs[:1], name, {}, node.name)
        as_convolution(graph, part, weight, np.zeros(shape[1]), strides, shape[1])
        graph.insert_before(node, part)
        around = [top, left, out[2] - bottom, out[3] - right]
        if any(around):
            name = padded(graph, node, name, around)
        parts.append(name)
    while len(parts) > 2:
        first, second, *parts = parts
        total = graph.fresh(f"{node.output}_sum{len(parts)}")
        graph.shapes[total] = out
        graph.insert_before(node, Node("Add", [first, second], total, {}, node.name))
        parts.append(total)
    if len(parts) == 1:
        # One part is the whole image, and counts less than its window everywhere.
        graph.remove(node)
        graph.replace_value(node.output, parts[0])
    else:
        node.op, node.inputs, node.attributes = "Add", parts, {}


def _reach(
    shape: tuple[int, ...],
    rectangle: tuple[Run, ...],
    strides: list[int],
    kernel: list[int],
) -> list[int]:
    """The smallest window that fits exactly as often as the rectangle is large.

    It begins with the image, so that the rectangle's own window is placed inside it.
    """
    return [
        max(
            start * strides[i] + kernel[i],
            shape[2 + i] - (stop - start) * strides[i] + 1,
        )
        for i, (start, stop, _) in enumerate(rectangle)
    ]
