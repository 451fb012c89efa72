"""Constants go past what only moves values, to a layer that takes them."""

from __future__ import annotations

import numpy as np

from ..index_map import NOTHING
from ..network import NetworkGraph, Node


def before_move(graph: NetworkGraph, node: Node) -> bool:
    """Go before a Move whose value comes from a layer that can take the constants."""
    move = graph.producer(node.inputs[0])
    if (
        move is None
        or move.op != "Move"
        or len(move.inputs) != 1
        or graph.sole_user(move.output, "Affine") is not node
    ):
        return False
    source = move.inputs[0]
    before = graph.producer(source)
    if not weighted(graph, before) or graph.sole_user(source, "Move") is not move:
        return False
    assert before is not None
    axis = 0 if before.op == "Conv" else -1
    found = {}
    for name, nothing in (("factor", 1.0), ("offset", 0.0)):
        shape, index = graph.shapes[source][1:], move.attributes["map"].index
        values = np.broadcast_to(node.attributes[name], index.shape)
        if name == "offset" and values[index == NOTHING].any():
            return False
        places = np.unravel_index(index[index != NOTHING], shape)[axis]
        own = np.full(shape[axis], nothing)
        own[places] = values[index != NOTHING]
        if not np.array_equal(own[places], values[index != NOTHING]):
            return False
        found[name] = own.reshape(
            [-1 if a == axis % len(shape) else 1 for a in range(len(shape))]
        )
    taken = graph.fresh(f"{source}_before")
    graph.shapes[taken] = graph.shapes[source]
    graph.remove(node)
    graph.insert_before(move, node)
    node.inputs, move.inputs = [source], [taken]
    node.output, move.output = taken, node.output
    node.attributes = {**node.attributes, **found}
    return True


def past_move(graph: NetworkGraph, node: Node) -> bool:
    """Go beyond a Move that a layer reads, if the layer can take the constants."""
    move = graph.sole_user(node.output, "Move")
    if move is None or len(move.inputs) != 1:
        return False
    after = graph.sole_user(move.output, "Conv", "Gemm")
    if not weighted(graph, after):
        return False
    assert after is not None
    found = {}
    for name, nothing in (("factor", 1.0), ("offset", 0.0)):
        index = move.attributes["map"].index
        values = np.broadcast_to(
            node.attributes[name], graph.shapes[node.inputs[0]][1:]
        ).reshape(-1)
        values = np.where(index == NOTHING, nothing, values[index])
        found[name] = smallest(values)
        if along(found[name], 0 if after.op == "Conv" else -1) is None:
            return False
    if found["offset"].any() and any(after.attributes.get("pads", ())):
        return False
    passed = graph.fresh(f"{move.output}_passed")
    graph.shapes[passed] = graph.shapes[move.output]
    graph.remove(node)
    graph.insert_before(after, node)
    move.inputs = node.inputs
    node.inputs, node.output = [passed], move.output
    move.output = passed
    node.attributes = {**node.attributes, **found}
    return True


def weighted(graph: NetworkGraph, node: Node | None) -> bool:
    """Whether a node is a layer with constant weights and a bias."""
    return (
        node is not None
        and not node.problem
        and node.op in ("Conv", "Gemm")
        and len(node.inputs) == 3
        and all(name in graph.constants for name in node.inputs[1:])
    )


def along(array: np.ndarray, axis: int) -> np.ndarray | None:
    """A vector, if the array changes along this axis only."""
    if any(size > 1 for i, size in enumerate(array.shape) if i != axis % array.ndim):
        return None
    return array.reshape(-1)


def smallest(array: np.ndarray) -> np.ndarray:
    """The array with one element on every axis along which nothing changes."""
    for axis in range(array.ndim):
        first = np.take(array, [0], axis)
        if np.all(array == first):
            array = first
    return array
