"""What CrypTen computes by comparisons, and the masked engine does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from crypten.nn import module as crypten_nn
from torch.nn import functional

from ..graph import NetworkGraph, Node
from .arithmetic import Arithmetic, Pair, V
from .kind import Kind, pair
from .pools import FLAT


class Relu(Kind):
    """max(x, 0)."""

    op = "Relu"
    compares = True

    def apply(self, a: Arithmetic[V], inputs: Sequence[V]) -> V:
        return a.compared(lambda x: x.clamp(min=0), inputs[0])

    def module(self) -> crypten_nn.Module:
        return crypten_nn.ReLU()


@dataclass(frozen=True)
class MaxPool(Kind):
    """Largest values of an image's windows; pads are of rows and of columns."""

    op = "MaxPool"
    compares = True
    kernel: Pair
    stride: Pair
    pads: Pair
    ceil_mode: bool

    @classmethod
    def read(cls, node: Node) -> MaxPool | None:
        a = node.attributes
        pads = list(a.get("pads", [0] * 4))
        if (
            len(a["kernel_shape"]) != 2
            or a.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID")
            or pads[:2] != pads[2:]
            or any(step != 1 for step in a.get("dilations", ()))
        ):
            return None
        return cls(
            pair(a["kernel_shape"]),
            pair(a.get("strides", (1, 1))),
            pair(pads[:2]),
            bool(a.get("ceil_mode", 0)),
        )

    @classmethod
    def problem(cls, node: Node, graph: NetworkGraph) -> str:
        a = node.attributes
        if len(a["kernel_shape"]) != 2:
            return FLAT
        if len(set(a.get("pads", [0]))) != 1:
            return (
                f"pads {a['pads']}: CrypTen pads rows and columns alike; use one "
                "padding for all sides, or replace_pooling(model)"
            )
        return super().problem(node, graph)

    def apply(self, a: Arithmetic[V], inputs: Sequence[V]) -> V:
        def largest(x: torch.Tensor) -> torch.Tensor:
            reals = x if x.is_floating_point() else x.double()
            y = functional.max_pool2d(
                reals, self.kernel, self.stride, self.pads, 1, self.ceil_mode
            )
            return y.to(x.dtype)

        return a.compared(largest, inputs[0])

    def module(self) -> crypten_nn.Module:
        return crypten_nn.MaxPool2d(
            self.kernel,
            stride=self.stride,
            padding=self.pads,
            ceil_mode=self.ceil_mode,
        )
