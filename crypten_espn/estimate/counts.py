"""What a network's layers cost: an interpreter that counts, on shapes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConversionError
from ..graph import NetworkGraph, layer_name
from ..layers import Kind, Reals
from ..layers.arithmetic import Function
from ..polynomial import AnyPolynomial


@dataclass(frozen=True)
class Linear:
    """A layer with secret weights; elements of one input image.

    Args:
        name: the layer.
        inputs, weights, outputs: ring elements.
        macs: multiply-accumulates.
    """

    name: str
    inputs: int
    weights: int
    outputs: int
    macs: int


@dataclass(frozen=True)
class Multiplied:
    """A product of two values of one image; the second may be shorter.

    Args:
        name: the layer.
        elements: of both factors.
    """

    name: str
    elements: tuple[int, int]


@dataclass(frozen=True)
class Nonlinear:
    """An activation of `elements` values of one image."""

    name: str
    elements: int
    polynomial: AnyPolynomial


class Counts(Reals):
    """Counts what one image costs; its values are of a batch of none.

    Attributes:
        linear, nonlinear, products: the layers that cost something, so far.
    """

    def __init__(self) -> None:
        self.linear: list[Linear] = []
        self.products: list[Multiplied] = []
        self.nonlinear: list[Nonlinear] = []
        self._name = ""

    def run(self, graph: NetworkGraph, layers: Mapping[str, Kind]) -> int:
        """Count a graph's layers, by the names of their values.

        Returns: how many elements its output has.

        Raises:
            ConversionError: a layer whose cost is not known.
        """
        values = {
            name: torch.empty(()).expand(array.shape)
            for name, array in graph.constants.items()
        }
        values[graph.input] = torch.empty(0, *graph.shapes[graph.input][1:])
        for node in graph.nodes:
            self._name = layer_name(node)
            given = [values[name] for name in node.inputs]
            values[node.output] = layers[node.output].apply(self, given)
        return _elements(values[graph.output])

    def product(self, function: Function, x: Tensor, weight: Tensor) -> Tensor:
        y = function(x, weight)
        outputs, weights = _elements(y), weight.numel()
        macs = outputs * weights // len(weight)
        counted = Linear(self._name, _elements(x), weights, outputs, macs)
        self.linear.append(counted)
        return y

    def multiply(self, x: Tensor, y: Tensor) -> Tensor:
        self.products.append(Multiplied(self._name, (_elements(x), _elements(y))))
        return x * y

    def polynomial(self, polynomial: AnyPolynomial, x: Tensor) -> Tensor:
        self.nonlinear.append(Nonlinear(self._name, _elements(x), polynomial))
        return x

    def compared(self, function: Function, x: Tensor) -> Tensor:
        raise ConversionError(f"{self._name}: the cost of comparisons is not known")

    def approximated(self, function: Function, x: Tensor) -> Tensor:
        return self.compared(function, x)


def _elements(value: Tensor) -> int:
    """Of one image."""
    return math.prod(value.shape[1:])
