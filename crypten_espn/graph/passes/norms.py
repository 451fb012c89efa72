"""Batch-norm goes into the layer before it, else becomes a layer of its own."""

from __future__ import annotations

import numpy as np

from ..network import NetworkGraph, Node


def fold_batch_norms(graph: NetworkGraph) -> None:
    """Batch-norm goes into the layer before it, else becomes a layer of its own."""
    folded = alone = 0
    for node in list(graph.nodes):
        if node.op != "BatchNormalization":
            continue
        gamma, beta, mean, variance = (
            graph.constants[name].astype(np.float64) for name in node.inputs[1:5]
        )
        factor = gamma / np.sqrt(variance + node.attributes.get("epsilon", 1e-5))
        offset = beta - mean * factor
        before = graph.producer(node.inputs[0])
        if (
            before is not None
            and before.op in ("Conv", "Gemm")
            and len(graph.users(before.output)) == 1
            and before.output != graph.output
        ):
            weight, bias = (graph.constants[name] for name in before.inputs[1:3])
            shape = (-1,) + (1,) * (weight.ndim - 1)
            new_weight = (weight * factor.reshape(shape)).astype(weight.dtype)
            new_bias = (bias * factor + offset).astype(bias.dtype)
            before.inputs[1:3] = [
                graph.constant(before.output + "_folded_weight", new_weight),
                graph.constant(before.output + "_folded_bias", new_bias),
            ]
            before.output = node.output
            graph.nodes.remove(node)
            folded += 1
        else:
            _norm_to_layer(graph, node, factor, offset)
            alone += 1
    if folded:
        graph.changes.append(f"{folded} batch-norms folded into the layer before")
    if alone:
        graph.changes.append(f"{alone} batch-norms turned into depthwise layers")


def _norm_to_layer(
    graph: NetworkGraph, node: Node, factor: np.ndarray, offset: np.ndarray
) -> None:
    channels = len(factor)
    dims = len(graph.shapes[node.inputs[0]]) - 2
    if dims == 0:
        node.op, weight, node.attributes = "Gemm", np.diag(factor), {"transB": 1}
    else:
        node.op, weight = "Conv", factor.reshape((channels, 1) + (1,) * dims)
        node.attributes = {
            "strides": [1] * dims,
            "dilations": [1] * dims,
            "pads": [0] * 2 * dims,
            "group": channels,
        }
    node.inputs = [
        node.inputs[0],
        graph.constant(node.output + "_weight", weight.astype(np.float32)),
        graph.constant(node.output + "_bias", offset.astype(np.float32)),
    ]
