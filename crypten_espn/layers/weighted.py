"""Layers with secret weights: convolutions and linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from crypten.nn import module as crypten_nn

from ..graph import NetworkGraph, Node
from .arithmetic import Arithmetic, V, Windows
from .kind import Kind, pair


def _weights_problem(node: Node, graph: NetworkGraph) -> str:
    names = node.inputs[1:]
    if len(names) != 2 or not graph.constants.keys() >= {*names}:
        return "its weights are computed at run time; make them constants"
    if not all(np.isfinite(graph.constants[name]).all() for name in names):
        return "its weights are not finite numbers; train the network again"
    return ""


def _operands(inputs: Sequence[V]) -> tuple[V, V, V | None]:
    """A value, its weights, and a bias if there is one."""
    return inputs[0], inputs[1], inputs[2] if len(inputs) == 3 else None


@dataclass(frozen=True)
class Convolution(Kind):
    """A two-dimensional convolution."""

    op = "Conv"
    windows: Windows

    @classmethod
    def read(cls, node: Node) -> Convolution | None:
        a = node.attributes
        strides = a.get("strides", a.get("kernel_shape", ()))
        pads = list(a.get("pads", [0] * 4))
        if (
            a.get("auto_pad", b"NOTSET") != b"NOTSET"
            or len(strides) != 2
            or pads[:2] != pads[2:]
        ):
            return None
        stride, dilation = a.get("strides", (1, 1)), a.get("dilations", (1, 1))
        windows = Windows(
            pair(stride), pair(pads[:2]), pair(dilation), a.get("group", 1)
        )
        return cls(windows)

    @classmethod
    def problem(cls, node: Node, graph: NetworkGraph) -> str:
        unknown = _weights_problem(node, graph)
        if not unknown and graph.constants[node.inputs[1]].ndim != 4:
            return (
                "only two-dimensional convolutions are supported; unsqueeze the input"
            )
        return unknown

    def apply(self, a: Arithmetic[V], inputs: Sequence[V]) -> V:
        return a.convolution(*_operands(inputs), self.windows)

    def module(self) -> crypten_nn.Module:
        stride, pads, dilation, groups = self.windows
        return crypten_nn.Conv(list(stride), list(pads), list(dilation), groups=groups)


class Linear(Kind):
    """x @ W.T + b."""

    op = "Gemm"

    @classmethod
    def read(cls, node: Node) -> Linear | None:
        a = node.attributes
        plain = a.get("alpha", 1.0) == a.get("beta", 1.0) == 1.0
        return cls() if plain and a.get("transB") and not a.get("transA") else None

    @classmethod
    def problem(cls, node: Node, graph: NetworkGraph) -> str:
        return _weights_problem(node, graph)

    def apply(self, a: Arithmetic[V], inputs: Sequence[V]) -> V:
        return a.matmul(*_operands(inputs))

    def module(self) -> crypten_nn.Module:
        return crypten_nn.Gemm(trans_b=True)
