"""Pads that differ between the two sides become a node of their own."""

from __future__ import annotations

from ..network import NetworkGraph, Node


def torch_order(pads: list[int]) -> list[int]:
    """ONNX's pads, all before and then all after, as torch's, last axis first."""
    half = len(pads) // 2
    return [p for i in reversed(range(half)) for p in (pads[i], pads[half + i])]


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
