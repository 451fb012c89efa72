"""A layer as the plan writes it: one interpreter of `layers`.

Its values are templates: the expression over what the layer reads, the shape, and what
the expression's integers have still to be divided by, which stands in the scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from ...errors import PlanError
from ...graph import NOTHING, IndexMap
from ...layers.arithmetic import Arithmetic, Function, Pair, Reals, Windows
from ...polynomial import AnyPolynomial, ChannelPolynomials
from ..linear import (
    MOST_BOXES,
    Add,
    Concat,
    Conv,
    Expression,
    Flatten,
    Mix,
    Move,
    Pad,
    Pool,
)
from ..moving import boxes

# Public factors by position are whole numbers over one denominator, none above this.
_MAX_FACTOR = 1 << 16
# From the expressions of what a layer reads, and the number of its weight.
Write = Callable[[Sequence[Expression], int], Expression]


@dataclass(frozen=True)
class Form:
    """What a layer's value is, or one on the way to it.

    Attributes:
        like: a tensor of its shape, for a batch of none.
        write: None for parameters, and for what the masked engine has no operation for.
        divisor: of the sums that `write` gives.
        weighted: whether secret weights are in it.
        polynomial: what is computed of the value read; the layer is an activation.
        factors: shapes without the batch of two values whose product it is.
    """

    like: torch.Tensor
    write: Write | None = None
    divisor: int = 1
    weighted: bool = False
    polynomial: AnyPolynomial | None = None
    factors: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @property
    def shape(self) -> torch.Size:
        return self.like.shape


def read_form(shape: Sequence[int], index: int) -> Form:
    """The value that a layer reads at a place, of this shape without the batch."""
    return Form(torch.empty(0, *shape), lambda given, number: given[index])


def parameter_form(shape: Sequence[int]) -> Form:
    """A secret parameter; it is written as integers, apart from the expression."""
    return Form(torch.empty(()).expand(*shape))


class Forms(Arithmetic[Form]):
    """Layers as the masked engine's linear operations.

    Args:
        refused: makes the error that names the layer.
        kind: what the layer is called where it has no form.
    """

    def __init__(self, refused: Callable[[str], PlanError], kind: str) -> None:
        self._refused = refused
        self._kind = kind
        self._has_weight = False

    def unsupported(self) -> PlanError:
        """The error for what the masked engine does not compute."""
        return self._refused(
            f"{self._kind} is not supported by the masked engine. Convert with "
            'protocol="espn", or replace the layer by convolutions, pools, additions '
            "and polynomial activations."
        )

    def product(self, function: Function, x: Form, weight: Form) -> Form:
        # A layer has one weight, and reads a value in its own unit.
        if self._has_weight or x.divisor != 1:
            raise self.unsupported()
        self._has_weight = True
        return Form(function(x.like, weight.like), weighted=True)

    def add(self, x: Form, y: Form) -> Form:
        if x.shape != y.shape:
            raise self._refused(
                f"an addition of values of shapes {tuple(x.shape[1:])} and "
                f"{tuple(y.shape[1:])}; the masked engine adds values of one shape. "
                "Bring both to one shape before."
            )
        return self._written(x.like, [x, y], lambda given: Add(tuple(given)))

    def local(self, function: Function, *values: Form) -> Form:
        return Form(function(*[value.like for value in values]))

    def scaled(self, x: Form, factor: float) -> Form:
        raise self.unsupported()

    def weighed(self, function: Function, x: Form, matrix: torch.Tensor) -> Form:
        raise self.unsupported()

    def mix(self, x: Form, rows: torch.Tensor, columns: torch.Tensor) -> Form:
        self._image(x)
        like = Reals().mix(x.like, rows, columns)
        both = [self._factors(matrix.numpy()) for matrix in (rows, columns)]
        sides = [_windows(integers) for integers, _ in both]
        y = self._written(like, [x], lambda given: Mix(given[0], *sides))
        return self.divided(y, both[0][1] * both[1][1])

    def move(self, values: Sequence[Form], given: IndexMap) -> Form:
        if not given.shape:
            raise self._refused("a value of one dimension; keep one beside the batch.")
        like = super().move(values, given).like
        index = _channels_last(given.index, [tuple(v.shape[1:]) for v in values])
        sizes = [math.prod(value.shape[1:]) for value in values]
        try:
            found = boxes(index, sizes, most=MOST_BOXES)
        except PlanError as error:
            raise self._refused(str(error)) from None
        return self._written(
            like, values, lambda parts: Move(tuple(parts), index.shape, found)
        )

    def divided(self, x: Form, count: int) -> Form:
        if x.weighted:
            raise self.unsupported()
        return replace(x, divisor=x.divisor * count)

    def compared(self, function: Function, x: Form) -> Form:
        raise self.unsupported()

    def approximated(self, function: Function, x: Form) -> Form:
        raise self.unsupported()

    def polynomial(self, polynomial: AnyPolynomial, x: Form) -> Form:
        if x.weighted or x.divisor != 1:
            raise self.unsupported()
        if isinstance(polynomial, ChannelPolynomials):
            polynomial.check_channels(tuple(x.shape))
        return replace(x, polynomial=polynomial)

    def multiply(self, x: Form, y: Form) -> Form:
        if x.weighted or y.weighted or x.divisor != 1 or y.divisor != 1:
            raise self.unsupported()
        like = torch.mul(x.like, y.like)
        if like.shape != x.shape or like.dim() != y.like.dim():
            raise self._refused(
                f"a product of values of shapes {tuple(x.shape[1:])} and "
                f"{tuple(y.shape[1:])}; the first has to be of the product's shape."
            )
        return Form(like, x.write, factors=(tuple(x.shape[1:]), tuple(y.shape[1:])))

    def convolution(
        self, x: Form, weight: Form, bias: Form | None, windows: Windows
    ) -> Form:
        self._image(x)
        stride, pads, dilation, groups = windows
        filters, _, height, width = weight.shape
        # The bias goes with the weight.
        y = super().convolution(x, weight, None, windows)
        return self._weighted(
            y, x, filters, (height, width), stride, dilation, (*pads, *pads), groups
        )

    def matmul(self, x: Form, weight: Form, bias: Form | None) -> Form:
        if x.like.dim() != 2:
            raise self._refused(
                f"a linear layer on values of {x.like.dim()} dimensions; flatten them "
                "first, or use a 1x1 convolution."
            )
        y = super().matmul(x, weight, None)
        return self._weighted(y, x, weight.shape[0])

    def window_sums(self, x: Form, kernel: Pair, stride: Pair) -> Form:
        self._image(x)
        like = super().window_sums(x, kernel, stride).like
        return self._written(like, [x], lambda given: Pool(given[0], kernel, stride))

    def pad(self, x: Form, sides: tuple[int, int, int, int]) -> Form:
        self._image(x)
        left, right, top, bottom = sides
        around = (top, left, bottom, right)
        like = super().pad(x, sides).like
        return self._written(like, [x], lambda given: Pad(given[0], around))

    def flatten(self, x: Form) -> Form:
        like = super().flatten(x).like
        return self._written(like, [x], lambda given: Flatten(given[0]))

    def concat(self, values: Sequence[Form], axis: int) -> Form:
        rank = values[0].like.dim()
        if axis not in (1, 1 - rank):
            raise self._refused(
                f"a concatenation along axis {axis} of {rank}; only channels (axis 1) "
                "can be concatenated."
            )
        like = super().concat(values, axis).like
        return self._written(like, values, lambda given: Concat(tuple(given)))

    # -- templates

    def _written(
        self,
        like: torch.Tensor,
        given: Sequence[Form],
        operation: Callable[[list[Expression]], Expression],
    ) -> Form:
        """An operation on values in one unit."""
        writes = [form.write for form in given if form.write is not None]
        if len(writes) < len(given) or len({form.divisor for form in given}) != 1:
            raise self.unsupported()
        return Form(
            like,
            lambda read, number: operation([write(read, number) for write in writes]),
            given[0].divisor,
            any(form.weighted for form in given),
        )

    def _weighted(self, y: Form, x: Form, filters: int, *windows: Any) -> Form:
        """A product as a convolution with a secret weight."""
        child = x.write
        if child is None:
            raise self.unsupported()
        return replace(
            y,
            write=lambda read, number: Conv(
                child(read, number), number, filters, *windows
            ),
        )

    def _image(self, x: Form) -> Sequence[int]:
        """(channels, height, width) of a value that has to be an image."""
        if x.like.dim() != 4:
            raise self._refused(
                f"values of {x.like.dim()} dimensions; this layer takes (batch, "
                "channels, height, width)."
            )
        return x.shape[1:]

    def _factors(self, real: np.ndarray) -> tuple[np.ndarray, int]:
        """Public factors as whole numbers over one denominator."""
        if not np.isfinite(real).all():
            raise self._refused("its factors are not finite.")
        values = np.unique(real).tolist()
        exact = {v: Fraction(v).limit_denominator(4096) for v in values}
        divisor = math.lcm(*(fraction.denominator for fraction in exact.values()))
        off = max(abs(float(f) - v) for v, f in exact.items())
        integers = np.rint(real * divisor)
        if off > 2.0**-20 * abs(real).max() or max(divisor, abs(integers).max()) > (
            _MAX_FACTOR
        ):
            raise self._refused(
                "its factors are no fractions of a small common denominator; use pools "
                "that count every element of their windows, or other sizes."
            )
        return integers.astype(int), divisor


def _windows(matrix: np.ndarray) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """By row, where it is not zero: the first place, and what stands from there."""
    found = []
    for row in matrix.tolist():
        places = [i for i, weight in enumerate(row) if weight] or [0]
        found.append((places[0], tuple(row[places[0] : places[-1] + 1])))
    return tuple(found)


def _channels_last(index: np.ndarray, shapes: Sequence[Sequence[int]]) -> np.ndarray:
    """An index map of values whose channels come first, for channels last."""
    table, start = [], 0
    for shape in shapes:
        size = math.prod(shape)
        last = np.moveaxis(np.arange(size).reshape(shape), 0, -1).reshape(-1)
        places = np.empty(size, np.int64)
        places[last] = np.arange(size)
        table.append(start + places)
        start += size
    numbers = np.concatenate([*table, [NOTHING]])[index]
    return np.ascontiguousarray(np.moveaxis(numbers, 0, -1))
