"""Average pools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from crypten.nn import module as crypten_nn

from ..graph import NetworkGraph, Node
from .arithmetic import Arithmetic, Pair, V
from .kind import Kind, pair, shape_of

FLAT = "only two-dimensional pools are supported; unsqueeze the input"


@dataclass(frozen=True)
class AveragePool(Kind):
    """Means over whole windows of an image."""

    op = "AveragePool"
    kernel: Pair
    stride: Pair

    @classmethod
    def read(cls, node: Node) -> AveragePool | None:
        a = node.attributes
        if (
            len(a["kernel_shape"]) != 2
            or a.get("auto_pad", b"NOTSET") != b"NOTSET"
            or a.get("ceil_mode", 0)
            or any(a.get("pads", ()))
            or any(step != 1 for step in a.get("dilations", ()))
        ):
            return None
        return cls(pair(a["kernel_shape"]), pair(a.get("strides", (1, 1))))

    @classmethod
    def problem(cls, node: Node, graph: NetworkGraph) -> str:
        flat = FLAT if len(node.attributes["kernel_shape"]) != 2 else ""
        return super().problem(node, graph) or flat

    def apply(self, a: Arithmetic[V], inputs: Sequence[V]) -> V:
        total = a.window_sums(inputs[0], self.kernel, self.stride)
        return a.divided(total, self.kernel[0] * self.kernel[1])

    def module(self) -> crypten_nn.Module:
        return crypten_nn.AvgPool2d(self.kernel, stride=self.stride)


class GlobalAveragePool(Kind):
    """The mean over an image, which becomes an image of one pixel."""

    op = "GlobalAveragePool"

    @classmethod
    def problem(cls, node: Node, graph: NetworkGraph) -> str:
        flat = FLAT if len(shape_of(node, graph)) != 4 else ""
        return super().problem(node, graph) or flat

    def apply(self, a: Arithmetic[V], inputs: Sequence[V]) -> V:
        size = pair(inputs[0].shape[2:])
        return a.divided(a.window_sums(inputs[0], size, size), size[0] * size[1])

    def module(self) -> crypten_nn.Module:
        return crypten_nn.GlobalAveragePool()
