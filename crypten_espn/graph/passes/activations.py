"""Activations that are written out become one node, named after the torch module.

A network writes silu as x * sigmoid(x), gelu with erf, hard-swish with a clip. Whatever
the spelling, nodes that together are a function of one value are recognised by what
they compute on a grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from ..network import POLYNOMIAL_OP, NetworkGraph, Node
from .constants import evaluate

_GRID = np.concatenate([np.linspace(-9, 9, 73), np.array([1e-3, -1e-3])])
_LARGEST = 12
_LINEAR = ("Add", "Div", "Mul", "Neg", "Relu", "Sub")
_NONLINEAR = (
    "Abs",
    "Clip",
    "Elu",
    "Erf",
    "Exp",
    "Gelu",
    "HardSigmoid",
    "HardSwish",
    "LeakyRelu",
    "Log",
    "Max",
    "Min",
    "Mish",
    "Pow",
    "Reciprocal",
    "Selu",
    "Sigmoid",
    "Softplus",
    "Softsign",
    "Sqrt",
    "Tanh",
)
# What a written-out activation may turn out to be.
NAMED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "ReLU6": functional.relu6,
    "Hardtanh": functional.hardtanh,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "SiLU": functional.silu,
    "Hardswish": functional.hardswish,
    "Hardsigmoid": functional.hardsigmoid,
    "GELU": functional.gelu,
    "GELU(approximate='tanh')": lambda x: functional.gelu(x, approximate="tanh"),
    "Mish": functional.mish,
    "Softplus": functional.softplus,
    "ELU": functional.elu,
    "SELU": functional.selu,
    "LogSigmoid": functional.logsigmoid,
    "Softsign": functional.softsign,
    "Tanhshrink": functional.tanhshrink,
}
# Powers, of which polynomials are made; the highest degree that is looked for.
_POWERS = ("Add", "Div", "Mul", "Neg", "Pow", "Sub")
_DEGREE = 8
_FRAC_BITS = 24
UNNAMED = "Elementwise"

Region = list[Node]


def name_activations(graph: NetworkGraph) -> None:
    """Replace each group of nodes that is a function of one value by one node."""
    for node in graph.each(*_NONLINEAR, "Mul", "Div"):
        products = node.op in ("Mul", "Div")
        if products and len(_values(graph, node)) < (1 if node.op == "Div" else 2):
            continue
        if node.op == "Div" and _values(graph, node)[:1] == node.inputs[:1]:
            continue
        if all(other is not node for other in graph.nodes):
            continue  # part of a group found before
        _name(graph, node)


def _values(graph: NetworkGraph, node: Node) -> list[str]:
    return [name for name in node.inputs if name and name not in graph.constants]


def _name(graph: NetworkGraph, node: Node) -> None:
    chosen: tuple[str, Region, str, dict[str, Any] | None] | None = None
    nearest: set[str] = set()
    for start, region in _regions(graph, node):
        end = region[-1]
        found, attributes = _recognise(graph, start, region), None
        if found is None:
            # Without a name, a group is what lies between a product and where its
            # two factors part.
            first, nearest = end.output not in nearest, nearest | {end.output}
            attributes = _polynomial(graph, start, region)
            product = end.op == "Mul" and first and len(_values(graph, end)) > 1
            if attributes is None and not product:
                continue
        if chosen is None or len(region) > len(chosen[1]):
            chosen = start, region, found or UNNAMED, attributes
    if chosen is None:
        return
    start, region, name, attributes = chosen
    if attributes is not None:
        name = POLYNOMIAL_OP
    inner = next((n for n in region if n.op in _NONLINEAR), node)
    label = inner.name.rsplit("/", 1)[0] + f"/{name}" if inner.name else ""
    new = Node(name, [start], region[-1].output, attributes or {}, label)
    graph.insert_before(region[-1], new)
    for member in region:
        graph.remove(member)


def _regions(graph: NetworkGraph, node: Node) -> Iterator[tuple[str, Region]]:
    """Groups around a node that read one value and are read at their end, small first.

    A value that every path from the network's input to another crosses dominates it;
    within the elementwise nodes around, a group lies between such a value and its end.
    """
    dominators: dict[str, set[str]] = {}
    ancestors: dict[str, set[str]] = {}
    around: list[Node] = []
    for other in graph.nodes:
        values = _values(graph, other)
        if other.problem or not values or not _is_elementwise(graph, other):
            continue
        around.append(other)
        sets = [dominators.get(v, {v}) for v in values]
        dominators[other.output] = set.intersection(*sets) | {other.output}
        above = [ancestors.get(v, {v}) for v in values]
        ancestors[other.output] = set.union(*above) | {other.output}
    found = []
    for end in around:
        if node.output not in ancestors[end.output]:
            continue
        for start in dominators[end.output] - {end.output}:
            region = [
                n
                for n in around
                if n.output in ancestors[end.output]
                and n.output != start
                and start in ancestors[n.output]
            ]
            inside = {n.output for n in region}
            closed = all(
                n is end
                or (
                    n.output != graph.output
                    and all(user.output in inside for user in graph.users(n.output))
                )
                for n in region
            )
            if node.output in inside and closed and len(region) <= _LARGEST:
                found.append((start, region))
    yield from sorted(found, key=lambda item: len(item[1]))


def _is_elementwise(graph: NetworkGraph, node: Node) -> bool:
    if node.op not in (*_NONLINEAR, *_LINEAR) or node.others:
        return False
    shapes = {graph.shapes.get(name) for name in (*_values(graph, node), node.output)}
    scalars = all(
        graph.constants[name].size == 1
        for name in node.inputs
        if name in graph.constants
    )
    return len(shapes) == 1 and None not in shapes and scalars


def _recognise(graph: NetworkGraph, start: str, region: Region) -> str | None:
    """The torch module whose function a group computes."""
    got = torch.from_numpy(_computed(graph, start, region, np.dtype(np.float32)))
    x = torch.from_numpy(_GRID.astype(np.float32))
    for name, function in NAMED.items():
        if torch.allclose(got, function(x), atol=2e-3, rtol=1e-3):
            return name
    return None


def _computed(
    graph: NetworkGraph, start: str, region: Region, dtype: np.dtype[Any]
) -> np.ndarray:
    """A group's values on the grid."""
    values = {start: _GRID.astype(dtype)}
    real = {
        name: array.astype(dtype) if array.dtype.kind == "f" else array
        for node in region
        for name, array in ((n, graph.constants.get(n)) for n in node.inputs)
        if array is not None
    }
    with np.errstate(all="ignore"):
        for node in region:
            inputs = {
                name: values.get(name, real.get(name)) for name in node.inputs if name
            }
            outputs = evaluate(node, inputs, graph.opset)  # type: ignore[arg-type]
            values[node.output] = np.asarray(outputs[0]).reshape(_GRID.shape)
    return values[region[-1].output].astype(dtype)


def _polynomial(
    graph: NetworkGraph, start: str, region: Region
) -> dict[str, Any] | None:
    """The attributes of the polynomial that products and powers make, if they do."""
    if any(node.op not in _POWERS for node in region):
        return None
    got = _computed(graph, start, region, np.dtype(np.float64))
    for degree in range(2, _DEGREE + 1):
        powers = _GRID[:, None] ** np.arange(degree + 1)
        coeffs = np.linalg.lstsq(powers / 9.0 ** np.arange(degree + 1), got)[0]
        numerators = np.rint(coeffs / 9.0 ** np.arange(degree + 1) * 2.0**_FRAC_BITS)
        off = np.abs(powers @ (numerators * 2.0**-_FRAC_BITS) - got).max()
        if off <= 1e-6 * np.abs(got).max():
            whole = [int(n) for n in numerators]
            twos = ((n & -n).bit_length() - 1 for n in whole if n)
            shift = min([_FRAC_BITS, *twos])
            return {
                "numerators": [n >> shift for n in whole],
                "frac_bits": _FRAC_BITS - shift,
                "interval": [-5.0, 5.0],
            }
    return None
