"""The linear part of a step: public and weighted operations on ring elements.

A step's expression is a tree over sources, values that exist as x = D + t. One class an
operation: each says which shape it has, computed from its inputs' and never declared,
and adds its value to an array. Arrays are channels-last, (batch, h, w, c) or
(batch, n); weights are the server's secret, everything else here is public.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Union

import msgspec
import numpy as np
from msgspec import Meta

from ..errors import PlanError
from . import kernels
from .mixing import Windows, weigh
from .moving import Box, add_boxes

Shape = tuple[int, ...]

# Numbers that a plan may hold; what they lead to is bounded in `plan`.
Small = Annotated[int, Meta(ge=1, le=1 << 16)]
Padding = Annotated[int, Meta(ge=0, le=1 << 12)]
Pair = tuple[Small, Small]
Pads = tuple[Padding, Padding, Padding, Padding]  # top, left, bottom, right
NO_PADS = (0, 0, 0, 0)
Count = Annotated[int, Meta(ge=1, le=1 << 26)]
MOST_BOXES = 1 << 12


class Operation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What all operations share; see the subclasses."""

    @property
    def inputs(self) -> tuple[Expression, ...]:
        """The operations it reads."""
        return ()

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        """The shape of its value without the batch.

        Raises: PlanError if the inputs' shapes do not fit it.
        """
        raise NotImplementedError

    def add_to(self, out: np.ndarray, inputs: Sequence[np.ndarray]) -> None:
        """Add its value to `out`, modulo the ring of out's type."""
        raise NotImplementedError

    def walk(self) -> Iterator[Operation]:
        """This operation and all below it, in the order they are computed."""
        for child in self.inputs:
            yield from child.walk()
        yield self

    @property
    def depth(self) -> int:
        return 1 + max((child.depth for child in self.inputs), default=0)

    @property
    def weighted(self) -> bool:
        """Whether a secret weight lies on some path to a source."""
        return any(isinstance(node, Conv) for node in self.walk())

    @property
    def sources(self) -> tuple[int, ...]:
        """The sources it reads, each once, in rising order."""
        found = {node.source for node in self.walk() if isinstance(node, Read)}
        return tuple(sorted(found))


class Read(Operation, frozen=True, tag="read"):
    """A source times a public integer that brings it to the scale wanted here."""

    source: Annotated[int, Meta(ge=0, le=1 << 16)]
    multiplier: Annotated[int, Meta(ge=1, le=(1 << 62) - 1)] = 1


class OfOne(Operation, frozen=True):
    """An operation on one value."""

    x: Expression

    @property
    def inputs(self) -> tuple[Expression, ...]:
        return (self.x,)


class Conv(OfOne, frozen=True, tag="conv"):
    """A convolution with secret weights; a linear layer when its input is flat.

    Args:
        weight: its number; a plan numbers them in the order of `walk`.
    """

    weight: Annotated[int, Meta(ge=0, le=1 << 16)]
    filters: Annotated[int, Meta(ge=1, le=1 << 24)]
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    dilation: Pair = (1, 1)
    pads: Pads = NO_PADS
    groups: Small = 1

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        (shape,) = inputs
        if self.filters % self.groups or shape[-1] % self.groups:
            raise PlanError(
                f"A convolution from {shape[-1]} channels to {self.filters} cannot "
                f"have {self.groups} groups."
            )
        if len(shape) == 1:
            plain = Conv(self.x, self.weight, self.filters)
            if plain != self:
                raise PlanError(
                    "A linear layer has a kernel, a stride, pads or groups."
                )
            return (self.filters,)
        return (
            *_windows(shape, self.kernel, self.stride, self.dilation, self.pads),
            self.filters,
        )

    def weight_shape(self, channels: int) -> tuple[int, int, int, int]:
        """(filters, channels / groups, kh, kw), in torch's order."""
        return (self.filters, channels // self.groups, *self.kernel)

    def convolve(self, x: np.ndarray, weight: kernels.Filters, out: np.ndarray) -> None:
        """Add the convolution of x with integer weights."""
        kernels.convolve(
            _as_image(x),
            weight,
            _as_image(out),
            stride=self.stride,
            dilation=self.dilation,
            pads=self.pads,
        )


class Add(Operation, frozen=True, tag="add"):
    """A sum of values of one shape."""

    terms: Annotated[tuple[Expression, ...], Meta(min_length=2, max_length=1 << 10)]

    @property
    def inputs(self) -> tuple[Expression, ...]:
        return self.terms

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        if len(set(inputs)) != 1:
            raise PlanError(f"An addition of different shapes, {_listed(inputs)}.")
        return inputs[0]


class Concat(Operation, frozen=True, tag="concat"):
    """Values side by side along their channels."""

    parts: Annotated[tuple[Expression, ...], Meta(min_length=1, max_length=1 << 10)]

    @property
    def inputs(self) -> tuple[Expression, ...]:
        return self.parts

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        if len({shape[:-1] for shape in inputs}) != 1:
            raise PlanError(f"A concatenation of shapes {_listed(inputs)}.")
        return (*inputs[0][:-1], sum(shape[-1] for shape in inputs))

    def add_to(self, out: np.ndarray, inputs: Sequence[np.ndarray]) -> None:
        start = 0
        for value in inputs:
            out[..., start : start + value.shape[-1]] += value
            start += value.shape[-1]


class Pool(OfOne, frozen=True, tag="pool"):
    """Sums over windows; an average's division stands in the scale."""

    kernel: Pair
    stride: Pair
    pads: Pads = NO_PADS

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        (shape,) = inputs
        size = _windows(shape, self.kernel, self.stride, (1, 1), self.pads)
        return (*size, shape[-1])

    def add_to(self, out: np.ndarray, inputs: Sequence[np.ndarray]) -> None:
        kernels.pool_sum(
            inputs[0], out, kernel=self.kernel, stride=self.stride, pads=self.pads
        )


class Pad(OfOne, frozen=True, tag="pad"):
    """Zeros around an image."""

    pads: Pads

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        height, width, channels = _image(inputs[0])
        top, left, bottom, right = self.pads
        return (height + top + bottom, width + left + right, channels)

    def add_to(self, out: np.ndarray, inputs: Sequence[np.ndarray]) -> None:
        out += kernels.pad(inputs[0], self.pads)


class Move(Operation, frozen=True, tag="move"):
    """Elements of values at public places, and zeros; see `moving`."""

    parts: Annotated[tuple[Expression, ...], Meta(min_length=1, max_length=1 << 10)]
    shape: Annotated[tuple[Count, ...], Meta(min_length=1, max_length=8)]
    boxes: Annotated[tuple[Box, ...], Meta(min_length=1, max_length=MOST_BOXES)]

    @property
    def inputs(self) -> tuple[Expression, ...]:
        return self.parts

    @property
    def moved(self) -> int:
        """How many elements."""
        return sum(box.elements for box in self.boxes)

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        sizes, size = [math.prod(shape) for shape in inputs], math.prod(self.shape)
        for box in self.boxes:
            box.check(sizes, size)
        return self.shape

    def add_to(self, out: np.ndarray, inputs: Sequence[np.ndarray]) -> None:
        add_boxes(self.boxes, out, inputs)


class Mix(OfOne, frozen=True, tag="mix"):
    """Public weighted sums of an image's rows, then of its columns.

    Each row of the result says where its first element is, and the weights from there
    on. A quotient stands in the scale.
    """

    rows: Windows
    columns: Windows

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        height, width, channels = _image(inputs[0])
        for size, windows in ((height, self.rows), (width, self.columns)):
            last = max(first + len(weights) for first, weights in windows)
            if last > size:
                raise PlanError(f"A weighted sum reads element {last - 1} of {size}.")
        return (len(self.rows), len(self.columns), channels)

    def between(self, shape: Shape) -> Shape:
        """After the rows, before the columns."""
        return (len(self.rows), *shape[1:])

    def add_to(self, out: np.ndarray, inputs: Sequence[np.ndarray]) -> None:
        (x,) = inputs
        rows = np.zeros((len(x), *self.between(x.shape[1:])), dtype=out.dtype)
        weigh(x, self.rows, 1, rows)
        weigh(rows, self.columns, 2, out)


class Flatten(OfOne, frozen=True, tag="flatten"):
    """A value as one row, in torch's order: channels, then rows, then columns."""

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        return (math.prod(inputs[0]),)

    def add_to(self, out: np.ndarray, inputs: Sequence[np.ndarray]) -> None:
        out += flatten(inputs[0])


Expression = Union[  # noqa: UP007
    Read, Conv, Add, Concat, Pool, Pad, Move, Mix, Flatten
]


def _listed(shapes: Sequence[Shape]) -> str:
    return " and ".join("x".join(map(str, shape)) for shape in shapes)


def _image(shape: Shape) -> Shape:
    if len(shape) != 3:
        raise PlanError(f"An operation on images reads {_listed([shape])}.")
    return shape


def _windows(
    shape: Shape, kernel: Pair, stride: Pair, dilation: Pair, pads: Pads
) -> tuple[int, int]:
    size = kernels.windows(_image(shape), kernel, stride, dilation, pads)
    if min(size) < 1:
        raise PlanError(
            f"A window of {_listed([kernel])} does not fit {_listed([shape])}."
        )
    return size


def shape_of(node: Operation, sources: Sequence[Shape]) -> Shape:
    """An expression's shape without the batch, from its sources' shapes.

    Raises: PlanError where operations do not fit each other.
    """
    if isinstance(node, Read):
        return sources[node.source]
    return node.output_shape([shape_of(child, sources) for child in node.inputs])


def flatten(value: np.ndarray) -> np.ndarray:
    """(batch, ..., c) to (batch, c * ...), in torch's order."""
    value = np.moveaxis(value, -1, 1)
    return np.ascontiguousarray(value).reshape(len(value), -1)


def _as_image(value: np.ndarray) -> np.ndarray:
    """A flat (batch, n) as one row of pixels, so that a batch shares weights."""
    return value[None, None] if value.ndim == 2 else value


# ---------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class Operands:
    """What an expression is computed on.

    Args:
        shapes: of every source, without the batch.
        sources: channels-last ring elements by source, or None for zeros.
        weights: integers by weight, or None for zeros.
        biases: integers to add after each weight, by weight, or None for zeros.
        public: whether paths without a weight count; the dealer leaves them out.
    """

    shapes: Sequence[Shape]
    sources: Mapping[int, np.ndarray] | None = None
    weights: Sequence[kernels.Filters] | None = None
    biases: Sequence[np.ndarray | None] | None = None
    public: bool = True


def accumulate(node: Operation, given: Operands, out: np.ndarray) -> None:
    """Add an expression's value to `out`, (batch, *shape), in the ring of its type."""
    if isinstance(node, Read):
        if given.public and given.sources is not None:
            value = given.sources[node.source].astype(out.dtype, copy=False)
            out += value if node.multiplier == 1 else value * _fit(node, out.dtype)
    elif isinstance(node, Add):
        for term in node.terms:
            accumulate(term, given, out)
    elif isinstance(node, Conv):
        if given.weights is not None and given.sources is not None:
            # Below a weight there is no other: its input is public to the dealer too.
            public = Operands(given.shapes, given.sources)
            x = _value(node.x, public, len(out), out.dtype)
            node.convolve(x, given.weights[node.weight], out)
        if given.biases is not None and given.biases[node.weight] is not None:
            out += given.biases[node.weight]
    else:
        values = [_value(child, given, len(out), out.dtype) for child in node.inputs]
        node.add_to(out, values)


def _value(node: Operation, given: Operands, batch: int, dtype: np.dtype) -> np.ndarray:
    if given.public and given.sources is not None:
        # What only moves a source needs no accumulator.
        if isinstance(node, Read) and node.multiplier == 1:
            return given.sources[node.source].astype(dtype, copy=False)
        if isinstance(node, Flatten) and isinstance(node.x, Read):
            return flatten(_value(node.x, given, batch, dtype))
    out = np.zeros((batch, *shape_of(node, given.shapes)), dtype=dtype)
    accumulate(node, given, out)
    return out


def _fit(node: Read, dtype: np.dtype) -> np.signedinteger:
    """The multiplier as the congruent number of a type."""
    bits = 8 * dtype.itemsize
    value = node.multiplier & ((1 << bits) - 1)
    fitted: np.signedinteger
    fitted = dtype.type(value - (1 << bits) if value >> (bits - 1) else value)
    return fitted
