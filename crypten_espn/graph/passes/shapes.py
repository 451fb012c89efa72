"""What only moves values: identities, reshapes, and means over the image."""

from __future__ import annotations

from ..network import NetworkGraph, Node


def drop_identities(graph: NetworkGraph) -> None:
    """Remove what does nothing in inference."""
    for node in list(graph.nodes):
        alone = node.op == "Concat" and len(node.inputs) == 1
        if alone or node.op in ("Identity", "Dropout", "Cast"):
            graph.nodes.remove(node)
            graph.replace_value(node.output, node.inputs[0])


def flatten_reshapes(graph: NetworkGraph) -> None:
    """Reshapes and squeezes that keep the batch become Flatten, for any batch."""
    for node in graph.nodes:
        if node.op in ("Reshape", "Squeeze"):
            before = graph.shapes.get(node.inputs[0], ())
            after = graph.shapes.get(node.output, ())
            if len(after) == 2 and before[:1] == after[:1]:
                node.op, node.inputs = "Flatten", node.inputs[:1]
                node.attributes = {"axis": 1}


def means_to_pools(graph: NetworkGraph) -> None:
    """A mean over both image axes is a global average pool."""
    for node in list(graph.nodes):
        if node.op != "ReduceMean" or len(graph.shapes.get(node.inputs[0], ())) != 4:
            continue
        axes = node.attributes.get("axes")
        if axes is None and len(node.inputs) > 1:
            axes = graph.constants[node.inputs[1]].tolist()
        if sorted(a % 4 for a in axes or []) != [2, 3]:
            continue
        keep = node.attributes.get("keepdims", 1)
        node.op, node.inputs, node.attributes = (
            "GlobalAveragePool",
            node.inputs[:1],
            {},
        )
        if not keep:
            batch, channels = graph.shapes[node.inputs[0]][:2]
            pooled = node.output + "_pooled"
            flatten = Node("Flatten", [pooled], node.output, {"axis": 1}, node.name)
            graph.shapes[pooled] = (batch, channels, 1, 1)
            node.output = pooled
            graph.nodes.insert(graph.nodes.index(node) + 1, flatten)
