"""Pads that differ between the two sides become a node of their own."""

from __future__ import annotations

import numpy as np

from ..network import NetworkGraph, Node


def explicit_pads(graph: NetworkGraph) -> None:
    """Pads that differ between the two sides become a Pad node in torch's order."""
    for node in list(graph.nodes):
        if node.op == "Pad":
            _normalise_pad(graph, node)
        elif node.op == "Conv":
            pads = node.attributes["pads"]
            half = len(pads) // 2
            if pads[:half] == pads[half:]:
                continue
            shape = graph.shapes[node.inputs[0]]
            padded = node.output + "_padded"
            graph.shapes[padded] = shape[:2] + tuple(
                s + pads[i] + pads[half + i] for i, s in enumerate(shape[2:])
            )
            sides = [
                p for i in reversed(range(half)) for p in (pads[i], pads[half + i])
            ]
            index = graph.nodes.index(node)
            graph.nodes.insert(
                index, Node("Pad", [node.inputs[0]], padded, {"pads": sides}, node.name)
            )
            node.inputs[0] = padded
            node.attributes["pads"] = [0] * 2 * half


def _normalise_pad(graph: NetworkGraph, node: Node) -> None:
    if "pads" in node.attributes and len(node.inputs) == 1:
        pads = [int(p) for p in node.attributes["pads"]]
    elif all(name in graph.constants for name in node.inputs[1:]):
        pads = [int(p) for p in graph.constants[node.inputs[1]]]
    else:
        return
    value = graph.constants[node.inputs[2]] if len(node.inputs) > 2 else 0
    if node.attributes.get("mode", b"constant") != b"constant" or np.any(value):
        return
    half = len(pads) // 2
    sides = [p for i in reversed(range(half)) for p in (pads[i], pads[half + i])]
    while len(sides) >= 2 and sides[-2:] == [0, 0]:
        sides = sides[:-2]
    node.inputs, node.attributes = node.inputs[:1], {"pads": sides}
