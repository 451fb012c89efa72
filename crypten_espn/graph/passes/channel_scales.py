"""Channels of an activation brought to intervals of one size.

Calibration gives each channel the interval of what it sees. In fixed point channels
share one scale, so that the narrow ones have few bits left. Every value may be divided
by a power of two of its channel's: weights and biases before take the division,
weights after the product, and p(x) becomes p(s x) / t, exactly. Sums, pools and
whatever else mixes or moves channels tie theirs together.

Source of the idea: the scaling equivariance of Nagel et al., "Data-Free Quantization
Through Weight Equalization and Bias Correction", ICCV 2019, there for ReLU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ...errors import PolynomialError
from ...polynomial import ChannelPolynomials, polynomial_from_json
from ..network import POLYNOMIAL_OP, NetworkGraph, Node

# Exponents by value and channel.
Exponents = Mapping[str, np.ndarray]
_FURTHEST = 8  # a channel whose interval differs by more hardly counts
_ALIKE = ("Add", "AveragePool", "GlobalAveragePool", "Identity", "Mix", "Pad", "Sum")


def absorb_channel_scales(graph: NetworkGraph) -> None:
    """Divide values by powers of two, so that a layer's channels have like intervals.

    1. Tie channels that enter a sum, a pool or a move together; those of the input,
       the output and of layers not known here keep their scale.
    2. Where tied channels enter activations, divide by the mean of how far their radii
       are from their layer's mean; those that only leave one, by their own.
    3. Give weights, biases and polynomials what undoes it.

    Error: none; all factors are powers of two.
    """
    polynomials = dict(_polynomials(graph))
    if not polynomials:
        return
    ties = _Ties(graph, polynomials)
    while True:
        exponents = ties.exponents(polynomials)
        rewritten = {}
        refused = False
        for node in graph.each(POLYNOMIAL_OP):
            if node.output not in polynomials:
                continue
            rows = []
            pairs = zip(
                polynomials[node.output].rows,
                exponents[node.inputs[0]].tolist(),
                exponents[node.output].tolist(),
                strict=True,
            )
            for channel, (row, inner, outer) in enumerate(pairs):
                try:
                    rows.append(row.scaled(inner, outer))
                except PolynomialError:
                    ties.fix(node.inputs[0], channel)
                    ties.fix(node.output, channel)
                    refused = True
            rewritten[node.output] = rows
        if not refused:
            break
    if not any(found.any() for found in exponents.values()):
        return
    for node in graph.each():
        if node.output in rewritten:
            polynomial = ChannelPolynomials(tuple(rewritten[node.output]))
            node.attributes = {"polynomial": polynomial.to_json()}
        elif _weighted(graph, node):
            _reweigh(graph, node, exponents)
    graph.exponents = {n: e for n, e in exponents.items() if e.any()}
    graph.changes.append(
        f"scales of the channels of {len(rewritten)} activations absorbed"
    )


def _polynomials(graph: NetworkGraph) -> Iterator[tuple[str, ChannelPolynomials]]:
    """By the value they make, of layers whose shape fits them."""
    for node in graph.each(POLYNOMIAL_OP):
        text = node.attributes.get("polynomial")
        if text is None:
            continue
        try:
            polynomial = polynomial_from_json(
                text.decode() if isinstance(text, bytes) else text
            )
        except (PolynomialError, UnicodeDecodeError):
            continue  # the layer says so itself
        if isinstance(polynomial, ChannelPolynomials):
            shape = graph.shapes.get(node.inputs[0], ())
            if len(shape) > 1 and shape[1] == polynomial.channels:
                yield node.output, polynomial


def _weighted(graph: NetworkGraph, node: Node) -> bool:
    """Whether a layer's weights take the scales of what it reads and makes."""
    if node.problem or node.op not in ("Conv", "Gemm") or len(node.inputs) != 3:
        return False
    if not all(name in graph.constants for name in node.inputs[1:]):
        return False
    rank = len(graph.shapes.get(node.inputs[0], ()))
    if node.op == "Gemm":
        return rank == 2 and bool(node.attributes.get("transB", 0))
    return rank == graph.constants[node.inputs[1]].ndim


def _reweigh(graph: NetworkGraph, node: Node, exponents: Exponents) -> None:
    before, after = exponents[node.inputs[0]], exponents[node.output]
    if not before.any() and not after.any():
        return
    weight, bias = (graph.constants[name] for name in node.inputs[1:])
    groups = node.attributes.get("group", 1)
    # (filters, channels of a filter)
    read = before.reshape(groups, 1, -1).repeat(len(weight) // groups, 1)
    shift = read.reshape(len(weight), -1) - after[:, None]
    shift = shift.reshape(*shift.shape, *[1] * (weight.ndim - 2))
    node.inputs[1:] = [
        graph.constant(f"{node.output}_{what}", np.ldexp(_real(array), by))
        for what, array, by in (("weight", weight, shift), ("bias", bias, -after))
    ]


def _real(array: np.ndarray) -> np.ndarray:
    """In a type that holds powers of two of it."""
    return array.astype(np.promote_types(array.dtype, np.float32))


class _Ties:
    """Which channels of which values are divided by the same.

    Channels are numbered over all values; number 0 is not divided at all.
    """

    def __init__(self, graph: NetworkGraph, polynomials: Mapping[str, object]) -> None:
        self._parents = [0]
        self._numbers: dict[str, range] = {}
        self._graph = graph
        for node in graph.each():
            values = [name for name in node.inputs if name not in graph.constants]
            free = node.output in polynomials or _weighted(graph, node)
            if not free and not self._tie(node, values):
                for name in (*values, node.output, *node.others):
                    self._fix_all(name)
        for name in (graph.input, graph.output):
            self._fix_all(name)

    def exponents(self, polynomials: Mapping[str, ChannelPolynomials]) -> Exponents:
        """By value and channel, the logarithm of the divisor."""
        wanted: dict[int, list[float]] = {}
        made: dict[int, list[float]] = {}
        for node in self._graph.each(POLYNOMIAL_OP):
            if node.output not in polynomials:
                continue
            rows = polynomials[node.output].rows
            sizes = np.array([math.log2(max(map(abs, r.interval))) for r in rows])
            used = np.array([row.degree > 0 for row in rows])
            if not used.any():
                continue
            for channel in np.flatnonzero(used).tolist():
                size = float(sizes[channel] - sizes[used].mean())
                for name, found in ((node.inputs[0], wanted), (node.output, made)):
                    found.setdefault(self._root(name, channel), []).append(size)
        chosen = {
            root: round(float(np.mean(wanted.get(root) or made[root])))
            for root in {*wanted, *made} - {0}
        }
        return {
            name: np.array(
                [chosen.get(self._find(n), 0) for n in numbers], dtype=np.int32
            ).clip(-_FURTHEST, _FURTHEST)
            for name, numbers in self._numbers.items()
        }

    def fix(self, name: str, channel: int) -> None:
        """Leave a channel of a value, and all tied to it, as they are."""
        self._join(0, self._of(name)[channel])

    def _fix_all(self, name: str) -> None:
        for number in self._of(name):
            self._join(0, number)

    def _tie(self, node: Node, values: Sequence[str]) -> bool:
        """Tie what a layer moves or adds; False if that is not known."""
        shapes = [self._graph.shapes.get(name, ()) for name in values]
        shape = self._graph.shapes.get(node.output, ())
        if len(values) < len(node.inputs) or node.others or not values:
            return False
        if not all(len(other) > 1 for other in (*shapes, shape)):
            return False
        if node.op == "Flatten" and len(shape) == 2:
            repeats = shape[1] // shapes[0][1]
        elif node.op == "Concat" and node.attributes["axis"] in (1, 1 - len(shape)):
            values, repeats = [*values], 1
        elif node.op in _ALIKE and all(other[1] == shape[1] for other in shapes):
            for name in values:
                self._join_all(self._of(name), self._of(node.output))
            return True
        else:
            return False
        numbers = [n for name in values for n in self._of(name) for _ in range(repeats)]
        if len(numbers) != shape[1]:
            return False
        self._join_all(numbers, self._of(node.output))
        return True

    def _of(self, name: str) -> range:
        """The numbers of a value's channels."""
        if name not in self._numbers:
            shape = self._graph.shapes.get(name, ())
            start = len(self._parents)
            self._numbers[name] = range(
                start, start + (shape[1] if len(shape) > 1 else 0)
            )
            self._parents.extend(self._numbers[name])
        return self._numbers[name]

    def _root(self, name: str, channel: int) -> int:
        return self._find(self._of(name)[channel])

    def _join_all(self, first: Sequence[int], second: Sequence[int]) -> None:
        for one, other in zip(first, second, strict=True):
            self._join(one, other)

    def _join(self, one: int, other: int) -> None:
        one, other = self._find(one), self._find(other)
        self._parents[max(one, other)] = min(one, other)

    def _find(self, number: int) -> int:
        parents = self._parents
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = parents[number]
        return number
