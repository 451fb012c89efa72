"""Linear layers and convolutions with everything explicit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..network import NetworkGraph, Node

_AUTO = (b"SAME_UPPER", b"SAME_LOWER")


def linear_layers(graph: NetworkGraph) -> None:
    """MatMul and Gemm with constant weights become Gemm(x, W, b), W of (out, in)."""
    for node in graph.each("MatMul", "Gemm"):
        weight = graph.constants.get(node.inputs[1])
        if node.inputs[0] in graph.constants or weight is None or weight.ndim != 2:
            continue
        a = node.attributes
        bias = np.zeros(1, weight.dtype)
        added = ""
        if node.op == "Gemm":
            weight = weight * a.get("alpha", 1.0)
            if len(node.inputs) == 3:
                bias, added = _bias(node, graph, a.get("beta", 1.0))
                if node.problem:
                    continue
        if node.op == "MatMul" or not a.get("transB", 0):
            weight = weight.T
        if added:
            # A bias that is computed is added to the product.
            product = graph.fresh(node.output + "_product")
            graph.shapes[product] = graph.shapes[node.output]
            gemm = Node("Gemm", node.inputs, product, {}, node.name)
            graph.insert_before(node, gemm)
            node.op, node.inputs, node.attributes = "Add", [product, added], {}
        else:
            node.op, gemm = "Gemm", node
        bias = np.broadcast_to(bias, (len(weight),))
        set_weights(graph, gemm, weight, bias)
        gemm.attributes = {"transB": 1}


def _bias(node: Node, graph: NetworkGraph, beta: float) -> tuple[np.ndarray, str]:
    """A Gemm's bias as one row, or the name of the value that stands for it."""
    name = node.inputs[2]
    if name not in graph.constants:
        if beta != 1 or graph.shapes.get(name) != graph.shapes[node.output]:
            node.problem = "its bias is computed, and scaled or broadcast; use Linear"
        return np.zeros(1), name
    bias = np.atleast_1d(graph.constants[name]) * beta
    if bias.ndim == 2:
        if np.any(bias != bias[:1]):
            node.problem = "its bias differs between the inputs of a batch; use Linear"
        bias = bias[0]
    return bias, ""


def set_weights(
    graph: NetworkGraph, node: Node, weight: np.ndarray, bias: np.ndarray
) -> None:
    """Give a Conv or Gemm these weights, as constants of its own."""
    node.inputs = [
        node.inputs[0],
        graph.constant(node.output + "_weight", weight.astype(np.float32)),
        graph.constant(node.output + "_bias", bias.astype(np.float32)),
    ]


def convolutions(graph: NetworkGraph) -> None:
    """Every convolution gets a bias, explicit strides, dilations, groups and pads."""
    for node in graph.each("Conv"):
        if any(name not in graph.constants for name in node.inputs[1:]):
            continue
        weight = graph.constants[node.inputs[1]]
        kernel = list(weight.shape[2:])
        if list(node.attributes.get("kernel_shape", kernel)) != kernel:
            node.problem = f"kernel_shape differs from its weights' {kernel}"
            continue
        group = node.attributes.get("group", 1)
        node.attributes = {**window(graph, node, kernel), "group": group}
        del node.attributes["kernel_shape"]
        if len(node.inputs) == 2:
            bias = np.zeros(len(weight), weight.dtype)
            node.inputs.append(graph.constant(node.output + "_bias", bias))


def window(
    graph: NetworkGraph, node: Node, kernel: Sequence[int]
) -> dict[str, list[int]]:
    """A convolution's or pool's kernel, strides, dilations and pads, all explicit."""
    a, dims = node.attributes, len(kernel)
    strides = list(a.get("strides", [1] * dims))
    dilations = list(a.get("dilations", [1] * dims))
    pads = list(a.get("pads", [0] * 2 * dims))
    auto = a.get("auto_pad", b"NOTSET")
    if auto in _AUTO:
        pads = _same_pads(
            graph.shapes[node.inputs[0]][2:], kernel, strides, dilations, auto
        )
    elif auto == b"VALID":
        pads = [0] * 2 * dims
    return {
        "kernel_shape": list(kernel),
        "strides": strides,
        "dilations": dilations,
        "pads": pads,
    }


def _same_pads(
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: list[int],
    dilations: list[int],
    auto: bytes,
) -> list[int]:
    before, after = [], []
    for i, size in enumerate(sizes):
        reach = dilations[i] * (kernel[i] - 1) + 1
        total = max((math.ceil(size / strides[i]) - 1) * strides[i] + reach - size, 0)
        small, large = total // 2, total - total // 2
        before.append(small if auto == b"SAME_UPPER" else large)
        after.append(large if auto == b"SAME_UPPER" else small)
    return before + after
