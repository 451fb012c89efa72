"""Products with and sums of public constants, batch-norm among them.

Each becomes x * factor + offset, joins its like, and goes into the linear layer before
or after it; where there is none it becomes a depthwise layer of its own.
"""

from __future__ import annotations

import math

import numpy as np

from ..index_map import counted
from ..network import NetworkGraph, Node
from .moves import move_after, moved
from .past_moves import along, before_move, past_move, smallest, weighted
from .weights import set_weights

# What a plan allows as groups of a convolution.
_MOST_CONSTANTS = 1 << 16


def fold_affine(graph: NetworkGraph) -> None:
    """Turn constants' arithmetic into Affine nodes; fold these, or make them layers."""
    for node in graph.each("Sub"):
        _difference(graph, node)
    for node in graph.each("Add", "Sub", "Mul", "Div", "Neg", "BatchNormalization"):
        _to_affine(graph, node)
    folded = _fold(graph)
    alone = _make_layers(graph)
    for kind in ("batch-norms", "constants"):
        where = "the layer before" if kind == "batch-norms" else "the layers beside"
        if folded[kind]:
            graph.changes.append(f"{folded[kind]} {kind} folded into {where}")
        if alone[kind]:
            graph.changes.append(f"{alone[kind]} {kind} turned into depthwise layers")


def _fold(graph: NetworkGraph) -> dict[str, int]:
    """Fold until nothing moves any more; how many of each kind went into a layer."""
    folded = {"batch-norms": 0, "constants": 0}
    changed = True
    while changed:
        changed = False
        for node in graph.each("Affine"):
            kind = node.attributes.get("kind", "constants")
            if _into_layer_before(graph, node):
                folded[kind] += 1
            elif _drop(graph, node) or _into_affine(graph, node):
                pass
            elif _into_layer_after(graph, node):
                folded[kind] += 1
            elif not (
                before_move(graph, node) or past_move(graph, node) or _past(graph, node)
            ):
                continue
            changed = True
    return folded


def _make_layers(graph: NetworkGraph) -> dict[str, int]:
    """Make layers of the Affine nodes that are left; how many of each kind."""
    alone = {"batch-norms": 0, "constants": 0}
    for node in graph.each("Affine"):
        alone[node.attributes.get("kind", "constants")] += 1
        written = node.attributes.get("written", node.op)
        _to_layer(graph, node)
        if node.problem:
            node.op = written
    return alone


# From operations to factor and offset, whose axes are the value's without the batch.


def _difference(graph: NetworkGraph, node: Node) -> None:
    """A difference of two values is a sum with the second one's negative."""
    if any(name in graph.constants for name in node.inputs):
        return
    negative = graph.fresh(node.output + "_negative")
    shape = graph.shapes[negative] = graph.shapes[node.inputs[1]]
    one = np.ones((1,) * (len(shape) - 1))
    affine = Node("Affine", [node.inputs[1]], negative, {}, node.name)
    affine.attributes = {"factor": -one, "offset": 0 * one}
    graph.insert_before(node, affine)
    node.op, node.inputs = "Add", [node.inputs[0], negative]


def _to_affine(graph: NetworkGraph, node: Node) -> None:
    values = [name for name in node.inputs if name not in graph.constants]
    if len(values) != 1 or (node.op == "Div" and values[0] != node.inputs[0]):
        return
    shape = graph.shapes.get(values[0])
    if shape is None or len(shape) < 2:
        node.problem = "the shape of its input is not known"
        return
    one = np.ones((1,) * (len(shape) - 1))
    factor, offset, kind = one, 0 * one, "constants"
    if node.op == "BatchNormalization":
        factor, offset = _norm(graph, node, len(shape))
        kind = "batch-norms"
    elif node.op == "Neg":
        factor = -one
    else:
        constant = next(name for name in node.inputs if name in graph.constants)
        array, node.problem = _without_batch(graph.constants[constant], shape)
        if node.problem:
            return
        if node.op == "Mul":
            factor = array
        elif node.op == "Div":
            with np.errstate(divide="ignore"):
                factor = 1 / array
        elif node.op == "Add":
            offset = array
        else:
            first = values[0] == node.inputs[0]
            factor, offset = (one, -array) if first else (-one, array)
    if not (np.all(np.isfinite(factor)) and np.all(np.isfinite(offset))):
        node.problem = "its constants are infinite, not a number, or divide by zero"
        return
    written, node.op, node.inputs = node.op, "Affine", values
    node.attributes = {
        "factor": smallest(factor),
        "offset": smallest(offset),
        "kind": kind,
        "written": written,
    }


def _norm(graph: NetworkGraph, node: Node, rank: int) -> tuple[np.ndarray, np.ndarray]:
    gamma, beta, mean, variance = (
        graph.constants[name].astype(np.float64) for name in node.inputs[1:5]
    )
    factor = gamma / np.sqrt(variance + node.attributes.get("epsilon", 1e-5))
    shape = (-1,) + (1,) * (rank - 2)
    return factor.reshape(shape), (beta - mean * factor).reshape(shape)


def _without_batch(array: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, str]:
    """A constant beside one input's axes; or why there is none."""
    array = array.astype(np.float64)
    try:
        fits = np.broadcast_shapes(array.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        return array, (
            f"its constant of shape {array.shape} would enlarge its input of shape "
            f"{shape}; give both the same shape"
        )
    array = array.reshape((1,) * (len(shape) - array.ndim) + array.shape)
    if np.any(array != array[:1]):
        return array, "its constant differs between the inputs of a batch"
    return array[0], ""


def _parts(node: Node, axis: int) -> tuple[np.ndarray, np.ndarray] | None:
    factor = along(node.attributes["factor"], axis)
    offset = along(node.attributes["offset"], axis)
    return None if factor is None or offset is None else (factor, offset)


# Folding.


def _drop(graph: NetworkGraph, node: Node) -> bool:
    if np.any(node.attributes["factor"] != 1) or np.any(node.attributes["offset"]):
        return False
    graph.remove(node)
    graph.replace_value(node.output, node.inputs[0])
    return True


def _into_affine(graph: NetworkGraph, node: Node) -> bool:
    after = graph.sole_user(node.output, "Affine")
    if after is None:
        return False
    first, second = node.attributes, after.attributes
    after.attributes = {
        **second,
        "factor": smallest(first["factor"] * second["factor"]),
        "offset": smallest(first["offset"] * second["factor"] + second["offset"]),
    }
    after.inputs = node.inputs
    graph.remove(node)
    return True


def _into_layer_before(graph: NetworkGraph, node: Node) -> bool:
    before = graph.producer(node.inputs[0])
    if not weighted(graph, before) or graph.sole_user(node.inputs[0], "Affine") is None:
        return False
    assert before is not None
    parts = _parts(node, 0 if before.op == "Conv" else -1)
    if parts is None:
        return False
    factor, offset = parts
    weight, bias = _weights(graph, before)
    outputs = len(weight)
    shape = (outputs,) + (1,) * (weight.ndim - 1)
    factor = np.broadcast_to(factor, (outputs,))
    node.op, node.attributes = before.op, before.attributes
    node.inputs, node.name = before.inputs[:1], before.name
    set_weights(graph, node, weight * factor.reshape(shape), bias * factor + offset)
    graph.remove(before)
    return True


def _into_layer_after(graph: NetworkGraph, node: Node) -> bool:
    after = graph.sole_user(node.output, "Conv", "Gemm")
    if not weighted(graph, after):
        return False
    assert after is not None
    parts = _parts(node, 0 if after.op == "Conv" else -1)
    if parts is None or after.inputs[0] != node.output:
        return False
    factor, offset = parts
    weight, bias = _weights(graph, after)
    if after.op == "Gemm":
        factor, offset = (np.broadcast_to(v, weight.shape[1:]) for v in parts)
        new, shift = weight * factor, weight @ offset
    else:
        # Zeros around the image stay zeros under a factor, but not under an offset.
        if np.any(offset) and any(after.attributes["pads"]):
            return False
        groups = after.attributes["group"]
        inputs = (groups, 1, weight.shape[1])
        factor, offset = (
            np.broadcast_to(
                np.broadcast_to(v, (groups * inputs[2],)).reshape(inputs),
                (groups, len(weight) // groups, inputs[2]),
            ).reshape(weight.shape[:2])
            for v in parts
        )
        new = weight * factor.reshape(factor.shape + (1,) * (weight.ndim - 2))
        shift = (weight.reshape(*weight.shape[:2], -1).sum(2) * offset).sum(1)
    after.inputs = node.inputs
    set_weights(graph, after, new, bias + shift)
    graph.remove(node)
    return True


def _weights(graph: NetworkGraph, node: Node) -> tuple[np.ndarray, np.ndarray]:
    weight, bias = (graph.constants[n].astype(np.float64) for n in node.inputs[1:3])
    return weight, bias


def _past(graph: NetworkGraph, node: Node) -> bool:
    """Move beyond a mean, or a Flatten that a linear layer reads: the layer takes it.

    A mean over windows that lie inside the image keeps factors and offsets.
    """
    after = graph.sole_user(node.output, "Flatten", "GlobalAveragePool", "AveragePool")
    if after is None:
        return False
    shape = graph.shapes[node.inputs[0]]
    attributes = dict(node.attributes)
    if after.op == "Flatten":
        reader = graph.sole_user(after.output, "Gemm", "Affine")
        if reader is None or len(graph.shapes.get(after.output, ())) != 2:
            return False
        for name in ("factor", "offset"):
            full = np.broadcast_to(attributes[name], shape[1:])
            attributes[name] = smallest(full.reshape(-1))
    elif _parts(node, 0) is None:
        return False
    source, output = node.inputs[0], after.output
    moved = graph.fresh(output + "_before")
    graph.shapes[moved] = graph.shapes[output]
    after.inputs, after.output = [source], moved
    affine = Node("Affine", [moved], output, attributes, node.name)
    index = next(i for i, other in enumerate(graph.nodes) if other is after)
    graph.nodes.insert(index + 1, affine)
    graph.remove(node)
    return True


def _to_layer(graph: NetworkGraph, node: Node) -> None:
    """A depthwise convolution, of an image whose channels are what differs."""
    shape = graph.shapes[node.inputs[0]][1:]
    factor, offset = (node.attributes[name] for name in ("factor", "offset"))
    image = len(shape) == 3 and _parts(node, 0) is not None
    varying = [
        axis
        for axis in range(len(shape))
        if (axis == 0 if image else max(factor.shape[axis], offset.shape[axis]) > 1)
    ]
    size = math.prod(shape[axis] for axis in varying)
    if size > _MOST_CONSTANTS:
        node.problem = (
            f"{size} constants that differ, with no layer beside them that takes them; "
            f"{_MOST_CONSTANTS} are the most. Give one a channel, or put a "
            "torch.nn.Linear next to it"
        )
        return
    rest = [axis for axis in range(len(shape)) if axis not in varying]
    order = [*varying, *rest]
    vectors = [
        np.broadcast_to(v, shape).transpose(order).reshape(size, -1)[:, 0]
        for v in (factor, offset)
    ]
    node.op = "Conv"
    node.attributes = {
        "strides": [1, 1],
        "dilations": [1, 1],
        "pads": [0, 0, 0, 0],
        "group": size,
    }
    if not image:
        pixels = math.prod(shape) // size
        index = counted(shape).transpose(order).reshape(size, pixels, 1)
        node.inputs = [moved(graph, node, node.inputs[0], index)]
        back = counted((size, pixels)).reshape([shape[a] for a in order])
        move_after(graph, node, (size, pixels, 1), back.transpose(np.argsort(order)))
    set_weights(graph, node, vectors[0].reshape(size, 1, 1, 1), vectors[1])
