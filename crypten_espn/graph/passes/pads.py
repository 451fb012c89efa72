"""Pads of every kind, and constants beside values in a concatenation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..index_map import NOTHING, IndexMap, counted
from ..network import NetworkGraph, Node

# ONNX's modes that repeat values of the image, as numpy calls them.
_REPEATING = {b"reflect": "reflect", b"edge": "edge", b"wrap": "wrap"}


def torch_order(pads: list[int]) -> list[int]:
    """ONNX's pads, all before and then all after, as torch's, last axis first."""
    half = len(pads) // 2
    return [p for i in reversed(range(half)) for p in (pads[i], pads[half + i])]


def pads_and_constants(graph: NetworkGraph) -> None:
    """Pad images with zeros by a Pad, anything else by a Move; constants are added."""
    for node in graph.each("Pad"):
        _pad(graph, node)
    for node in graph.each("Concat"):
        _concat(graph, node)


def explicit_pads(graph: NetworkGraph) -> None:
    """Pads of a convolution that differ between the two sides become a Pad node."""
    for node in graph.each("Conv"):
        pads = node.attributes.get("pads", [])
        half = len(pads) // 2
        if pads[:half] != pads[half:]:
            node.inputs[0] = padded(graph, node, node.inputs[0], pads)
            node.attributes["pads"] = [0] * 2 * half


def padded(graph: NetworkGraph, node: Node, source: str, pads: list[int]) -> str:
    """A value with zeros around its image, by a Pad before the node."""
    half = len(pads) // 2
    shape = graph.shapes[source]
    name = graph.fresh(source + "_padded")
    graph.shapes[name] = shape[:2] + tuple(
        size + pads[i] + pads[half + i] for i, size in enumerate(shape[2:])
    )
    pad = Node("Pad", [source], name, {"pads": torch_order(pads)}, node.name)
    graph.insert_before(node, pad)
    return name


def around(
    index: np.ndarray, before: Sequence[int], after: Sequence[int], mode: str = ""
) -> np.ndarray:
    """Numbers of elements with pads around; negative pads cut.

    Args:
        mode: numpy's, of what the pads repeat; zeros if empty.
    """
    kept = tuple(
        slice(max(-b, 0), size - max(-a, 0))
        for size, b, a in zip(index.shape, before, after, strict=True)
    )
    widths = [(max(b, 0), max(a, 0)) for b, a in zip(before, after, strict=True)]
    if mode:
        return np.pad(index[kept], widths, mode)  # type: ignore[call-overload, no-any-return]
    return np.pad(index[kept], widths, constant_values=NOTHING)


def _constant_list(
    graph: NetworkGraph, node: Node, place: int, attribute: str, default: list[int]
) -> list[int]:
    """A list that older operations have as an attribute and newer as an input."""
    if attribute in node.attributes:
        return [int(v) for v in node.attributes[attribute]]
    if len(node.inputs) > place and node.inputs[place]:
        return [int(v) for v in graph.constants[node.inputs[place]]]
    return default


def _pad(graph: NetworkGraph, node: Node) -> None:
    if any(name and name not in graph.constants for name in node.inputs[1:]):
        node.problem = "its pads are computed at run time; give numbers"
        return
    source = node.inputs[0]
    shape = graph.shapes[source]
    given = _constant_list(graph, node, 1, "pads", [])
    axes = _constant_list(graph, node, 3, "axes", list(range(len(given) // 2)))
    value = node.attributes.get("value", 0.0)
    if len(node.inputs) > 2 and node.inputs[2]:
        value = float(graph.constants[node.inputs[2]].reshape(()))
    before, after = [0] * len(shape), [0] * len(shape)
    for i, axis in enumerate(axes):
        before[axis % len(shape)] = given[i]
        after[axis % len(shape)] = given[len(axes) + i]
    mode = _REPEATING.get(node.attributes.get("mode", b"constant"), "")
    if before[0] or after[0]:
        node.problem = "it pads the batch; pad channels, rows or columns"
    elif not np.isfinite(value):
        node.problem = "only finite values can be padded"
    elif (
        not mode
        and len(shape) == 4
        and min(before + after) >= 0
        and not (value or before[1] or after[1])
    ):
        node.inputs = [source]
        node.attributes = {"pads": torch_order(before[2:] + after[2:])}
    else:
        index = around(counted(shape[1:]), before[1:], after[1:], mode)
        _move(graph, node, [source], index, np.full(index.shape, value))


def _move(
    graph: NetworkGraph,
    node: Node,
    sources: list[str],
    index: np.ndarray,
    constants: np.ndarray,
) -> None:
    """Make a node a Move, with constants where it has zeros."""
    whole = IndexMap(index)
    node.op, node.inputs, node.attributes = "Move", sources, {"map": whole}
    constants = np.where(index == NOTHING, constants, 0.0)
    if not constants.any():
        return
    output, node.output = node.output, graph.fresh(f"{node.output}_moved")
    graph.shapes[node.output] = graph.shapes[output]
    affine = Node("Affine", [node.output], output, {}, node.name)
    affine.attributes = {
        "factor": np.ones((1,) * constants.ndim),
        "offset": constants,
    }
    place = next(i for i, other in enumerate(graph.nodes) if other is node)
    graph.nodes.insert(place + 1, affine)


def _concat(graph: NetworkGraph, node: Node) -> None:
    """Constants are added where nothing stands beside the values."""
    values = [name for name in node.inputs if name not in graph.constants]
    if len(values) == len(node.inputs):
        return
    batch, *shape = graph.shapes[node.output]
    axis = node.attributes["axis"] % (1 + len(shape)) - 1
    if axis < 0:
        node.problem = "the batch cannot be concatenated; concatenate channels (dim=1)"
        return
    parts, constants, count = [], [], 0
    for name in node.inputs:
        if name in graph.constants:
            array = graph.constants[name].astype(np.float64)
            if np.any(array != array[:1]):
                node.problem = "a constant in it differs between inputs of the batch"
                return
            parts.append(np.full(array.shape[1:], NOTHING))
            constants.append(array[0])
        else:
            own = graph.shapes[name][1:]
            parts.append(count + counted(own))
            constants.append(np.zeros(own))
            count += parts[-1].size
    index = np.concatenate(parts, axis)
    if (
        list(index.shape) != shape
        or not np.isfinite(np.concatenate(constants, axis)).all()
    ):
        node.problem = f"its constants do not fit {batch} inputs of shape {shape}"
        return
    _move(graph, node, values, index, np.concatenate(constants, axis))
