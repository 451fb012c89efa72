"""Linear layers and convolutions with everything explicit."""

from __future__ import annotations

import math

import numpy as np

from ..network import NetworkGraph, Node


def linear_layers(graph: NetworkGraph) -> None:
    """MatMul and Gemm with constant weights become Gemm(x, W, b), W of (out, in)."""
    for node in list(graph.nodes):
        if node.op == "MatMul" and node.inputs[1] in graph.constants:
            weight = graph.constants[node.inputs[1]].T
            bias = np.zeros(len(weight), weight.dtype)
            adds = graph.users(node.output)
            other = [name for add in adds for name in add.inputs if name != node.output]
            if (
                len(adds) == 1
                and adds[0].op == "Add"
                and other[0] in graph.constants
                and graph.constants[other[0]].shape == bias.shape
                and node.output != graph.output
            ):
                bias = graph.constants[other[0]]
                graph.nodes.remove(adds[0])
                node.output = adds[0].output
        elif node.op == "Gemm" and node.inputs[1] in graph.constants:
            a = node.attributes
            weight = graph.constants[node.inputs[1]] * a.get("alpha", 1.0)
            weight = weight if a.get("transB", 0) else weight.T
            bias = np.zeros(len(weight), weight.dtype)
            if len(node.inputs) == 3:
                bias = bias + graph.constants[node.inputs[2]] * a.get("beta", 1.0)
        else:
            continue
        names = (
            graph.constant(node.output + "_weight", weight),
            graph.constant(node.output + "_bias", bias),
        )
        node.op, node.inputs = "Gemm", [node.inputs[0], *names]
        node.attributes = {"transB": 1}


def convolutions(graph: NetworkGraph) -> None:
    """Every convolution gets a bias, explicit strides, dilations, groups and pads."""
    for node in graph.nodes:
        if node.op != "Conv" or node.inputs[1] not in graph.constants:
            continue
        weight = graph.constants[node.inputs[1]]
        dims = weight.ndim - 2
        a = node.attributes
        strides = list(a.get("strides", [1] * dims))
        dilations = list(a.get("dilations", [1] * dims))
        pads = list(a.get("pads", [0] * 2 * dims))
        auto = a.get("auto_pad", b"NOTSET")
        if auto in (b"SAME_UPPER", b"SAME_LOWER"):
            pads = _same_pads(graph, node, weight, strides, dilations, auto)
        node.attributes = {
            "strides": strides,
            "dilations": dilations,
            "pads": pads,
            "group": a.get("group", 1),
        }
        if len(node.inputs) == 2:
            bias = np.zeros(len(weight), weight.dtype)
            node.inputs.append(graph.constant(node.output + "_bias", bias))


def _same_pads(
    graph: NetworkGraph,
    node: Node,
    weight: np.ndarray,
    strides: list[int],
    dilations: list[int],
    auto: bytes,
) -> list[int]:
    before, after = [], []
    for i, size in enumerate(graph.shapes[node.inputs[0]][2:]):
        reach = dilations[i] * (weight.shape[2 + i] - 1) + 1
        total = max((math.ceil(size / strides[i]) - 1) * strides[i] + reach - size, 0)
        small, large = total // 2, total - total // 2
        before.append(small if auto == b"SAME_UPPER" else large)
        after.append(large if auto == b"SAME_UPPER" else small)
    return before + after
