"""Slow and obviously correct: Python integers, and a network in plain floats."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from crypten_espn.graph import NetworkGraph
from crypten_espn.polynomial import RingForm

MODULUS = 2**64


def signed(value: int) -> int:
    """The representative of a ring element in [-2**63, 2**63)."""
    return (value + MODULUS // 2) % MODULUS - MODULUS // 2


def add(*shares: torch.Tensor) -> list[int]:
    """Sum of shares modulo 2**64, flattened, as Python integers."""
    columns = zip(*(share.flatten().tolist() for share in shares), strict=True)
    return [signed(sum(column)) for column in columns]


def polynomial(form: RingForm, x: list[int], p: list[int]) -> list[int]:
    """c_0 + c_1 x + sum_{k>=2} c_k p**k modulo 2**64, term by term."""
    results = []
    for x_value, p_value in zip(x, p, strict=True):
        total = form.coeffs[0]
        if form.degree >= 1:
            total += form.coeffs[1] * x_value
        for k in range(2, form.degree + 1):
            total += form.coeffs[k] * p_value**k
        results.append(signed(total))
    return results


def run_graph(graph: NetworkGraph, x: torch.Tensor) -> torch.Tensor:
    """A simplified graph, in the type of x, through torch's own functions."""
    functional = torch.nn.functional
    values = {
        k: torch.from_numpy(np.array(v)).to(x.dtype) for k, v in graph.constants.items()
    }
    values[graph.input] = x
    for node in graph.nodes:
        inputs: Any = [values[name] for name in node.inputs]
        a = node.attributes
        if node.op == "Conv":
            half = len(a["pads"]) // 2
            assert a["pads"][:half] == a["pads"][half:]
            convolve: Any = functional.conv2d
            out = convolve(
                *inputs,
                stride=a["strides"],
                padding=a["pads"][:half],
                dilation=a["dilations"],
                groups=a["group"],
            )
        elif node.op == "Gemm":
            out = functional.linear(*inputs)
        elif node.op == "PolynomialActivation":
            q = 2.0 ** a["frac_bits"]
            terms = (c / q * inputs[0] ** k for k, c in enumerate(a["numerators"]))
            out = sum(terms, torch.zeros_like(inputs[0]))
        elif node.op == "Relu":
            out = torch.relu(inputs[0])
        elif node.op == "Add":
            out = inputs[0] + inputs[1]
        elif node.op == "Mul":
            out = inputs[0] * inputs[1]
        elif node.op == "AveragePool":
            out = functional.avg_pool2d(inputs[0], a["kernel_shape"], a["strides"])
        elif node.op == "MaxPool":
            out = functional.max_pool2d(
                inputs[0],
                a["kernel_shape"],
                a["strides"],
                a["pads"][:2],
                ceil_mode=bool(a.get("ceil_mode", 0)),
            )
        elif node.op == "GlobalAveragePool":
            out = inputs[0].mean((2, 3), keepdim=True)
        elif node.op == "Flatten":
            out = inputs[0].flatten(1)
        elif node.op == "Concat":
            out = torch.cat(inputs, a["axis"])
        elif node.op == "Pad":
            out = functional.pad(inputs[0], a["pads"])
        elif node.op == "Move":
            columns = [column for v in inputs for column in v.flatten(1).unbind(1)]
            columns.append(torch.zeros_like(columns[0]))  # of the index -1
            picked = [columns[place] for place in a["map"].index.flatten().tolist()]
            out = torch.stack(picked, 1).reshape(len(x), *a["map"].shape)
        elif node.op == "Mix":
            matrices = (torch.tensor(a[k]).to(x) for k in ("rows", "columns"))
            out = torch.einsum("bchw,ih,jw->bcij", inputs[0], *matrices)
        else:
            raise AssertionError(f"the oracle does not know {node.op}")
        values[node.output] = out
    return values[graph.output]
