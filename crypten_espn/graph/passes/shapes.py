"""What does nothing, and reshapes to rows."""

from __future__ import annotations

import onnx

from ..network import FLOATS, NetworkGraph, Node


def drop_identities(graph: NetworkGraph) -> None:
    """Remove what does nothing in inference."""
    for node in graph.each("Identity", "Dropout", "DropoutNd", "Cast", "Concat"):
        if node.op == "Concat" and len(node.inputs) != 1:
            continue
        if node.op == "Cast":
            node.problem = _cast_problem(node, graph)
            if node.problem:
                continue
        graph.remove(node)
        graph.replace_value(node.output, node.inputs[0])


def _cast_problem(node: Node, graph: NetworkGraph) -> str:
    """Why a cast changes values; nothing if it only changes their precision."""
    to = node.attributes["to"]
    if to not in FLOATS:
        name = onnx.TensorProto.DataType.Name(to)
        return f"casting to {name} changes values; keep them real"
    if node.inputs[0] not in graph.types:
        return "it is not known what it casts from"
    return ""


def flatten_reshapes(graph: NetworkGraph) -> None:
    """Reshapes and squeezes that keep the batch become Flatten, for any batch."""
    for node in graph.each("Reshape", "Squeeze", "Flatten"):
        before = graph.shapes.get(node.inputs[0], ())
        after = graph.shapes.get(node.output, ())
        if not before or not after:
            continue
        if before == after:
            graph.remove(node)
            graph.replace_value(node.output, node.inputs[0])
        elif len(after) == 2 and before[:1] == after[:1]:
            node.op, node.inputs = "Flatten", node.inputs[:1]
            node.attributes = {"axis": 1}
