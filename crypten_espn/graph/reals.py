"""A graph in plain floating point: what a conversion is compared with.

Operations that conversion leaves are torch's; any other is ONNX's own evaluator's,
which is slow and covers what a graph holds before its passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .network import POLYNOMIAL_OP, NetworkGraph, Node
from .passes.constants import evaluate


def run(graph: NetworkGraph, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every value of a graph for one batch, of any size.

    Args:
        graph: with or without its passes run.
        x: (batch, ...) as the graph's input.
        dtype: what real numbers are computed in.

    Returns:
        name to value; the graph's output among them.
    """

    def real(array: Tensor) -> Tensor:
        return array.to(dtype) if array.is_floating_point() else array

    constants = {
        name: real(torch.from_numpy(np.array(array)))
        for name, array in graph.constants.items()
    }
    values = {graph.input: real(x.detach())}
    for node in graph.nodes:
        inputs = [
            values[name] if name in values else constants.get(name)
            for name in node.inputs
        ]
        compute = _OPERATIONS.get(node.op)
        if compute is not None and _is_plain(node):
            values[node.output] = compute(inputs, node.attributes)
            continue
        arrays = {
            name: value.numpy()
            for name, value in zip(node.inputs, inputs, strict=True)
            if value is not None
        }
        outputs = evaluate(node, arrays, graph.opset)
        for name, output in zip([node.output, *node.others], outputs, strict=True):
            values[name] = real(torch.from_numpy(np.array(output)))
    return {**constants, **values}


def _is_plain(node: Node) -> bool:
    """Whether a convolution or pool has nothing but what torch computes alike."""
    a = node.attributes
    pads = list(a.get("pads", ()))
    if node.op == "Pad":
        return len(node.inputs) == 1
    if node.op in ("Conv", "AveragePool", "MaxPool"):
        half = len(pads) // 2
        return (
            a.get("auto_pad", b"NOTSET") == b"NOTSET"
            and not a.get("ceil_mode", 0)
            and pads[:half] == pads[half:]
            and (node.op == "Conv" or not any(pads) or node.op == "MaxPool")
            and (node.op == "Conv" or all(d == 1 for d in a.get("dilations", ())))
            and (node.op == "Conv" or len(a["kernel_shape"]) == 2)
        )
    return True


def _convolution(inputs: list[Any], a: dict[str, Any]) -> Tensor:
    dims = inputs[1].dim() - 2
    convolve: Any = (functional.conv1d, functional.conv2d, functional.conv3d)[dims - 1]
    return convolve(
        *inputs,
        stride=a.get("strides", 1),
        padding=list(a.get("pads", [0] * dims))[:dims],
        dilation=a.get("dilations", 1),
        groups=a.get("group", 1),
    )


def _gemm(inputs: list[Any], a: dict[str, Any]) -> Tensor:
    x = inputs[0].transpose(-1, -2) if a.get("transA", 0) else inputs[0]
    weight = inputs[1].T if a.get("transB", 0) else inputs[1]
    result = a.get("alpha", 1.0) * (x @ weight)
    return result + a.get("beta", 1.0) * inputs[2] if len(inputs) > 2 else result


def _polynomial(inputs: list[Any], a: dict[str, Any]) -> Tensor:
    x = inputs[0]
    result = torch.zeros_like(x)
    for numerator in reversed(a["numerators"]):
        result = result * x + numerator * 2.0 ** -a["frac_bits"]
    return result


def _max_pool(inputs: list[Any], a: dict[str, Any]) -> Tensor:
    return functional.max_pool2d(
        inputs[0],
        a["kernel_shape"],
        a.get("strides", 1),
        list(a.get("pads", [0, 0]))[:2],
    )


_OPERATIONS: dict[str, Callable[[list[Any], dict[str, Any]], Tensor]] = {
    "Add": lambda inputs, a: inputs[0] + inputs[1],
    "AveragePool": lambda inputs, a: functional.avg_pool2d(
        inputs[0], a["kernel_shape"], a.get("strides", 1)
    ),
    "Concat": lambda inputs, a: torch.cat(inputs, a["axis"]),
    "Conv": _convolution,
    "Flatten": lambda inputs, a: inputs[0].flatten(1),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda inputs, a: inputs[0].mean((2, 3), keepdim=True),
    "MaxPool": _max_pool,
    "Pad": lambda inputs, a: functional.pad(inputs[0], a["pads"]),
    "Relu": lambda inputs, a: torch.relu(inputs[0]),
    "Scale": lambda inputs, a: inputs[0] * inputs[0].new_tensor(a["factor"]),
    POLYNOMIAL_OP: _polynomial,
}
