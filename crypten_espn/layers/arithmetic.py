"""What layers are computed in: an interpreter's operations, and floating point."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from ..graph import IndexMap
from ..nn import moved
from ..polynomial import AnyPolynomial

Pair = tuple[int, int]
Function = Callable[..., Tensor]


class Windows(NamedTuple):
    """Where a convolution looks; pads are the same at both ends of an axis."""

    stride: Pair
    pads: Pair
    dilation: Pair
    groups: int


class Shaped(Protocol):
    """A value of some arithmetic; images are (batch, channels, height, width)."""

    @property
    def shape(self) -> Sequence[int]: ...


V = TypeVar("V", bound=Shaped)


class Arithmetic(ABC, Generic[V]):
    """An interpreter of layers.

    The first methods say what arithmetic it is. `function` there takes tensors, and is
    linear in each but for `compared`. The others are what layers are written in; an
    interpreter that wants to know more than a function overrides them.
    """

    @abstractmethod
    def product(self, function: Function, x: V, weight: V) -> V:
        """A bilinear function of a value and secret weights."""

    @abstractmethod
    def add(self, x: V, y: V) -> V:
        """A sum; parameters broadcast."""

    @abstractmethod
    def local(self, function: Function, *values: V) -> V:
        """Sums of elements, and moves, that each party computes on its shares."""

    @abstractmethod
    def scaled(self, x: V, factor: float) -> V:
        """A product with a public number."""

    @abstractmethod
    def weighed(self, function: Function, x: V, matrix: Tensor) -> V:
        """A bilinear function of a value and a public matrix."""

    @abstractmethod
    def divided(self, x: V, count: int) -> V:
        """A quotient by a public whole number."""

    @abstractmethod
    def compared(self, function: Function, x: V) -> V:
        """What needs comparisons."""

    @abstractmethod
    def approximated(self, function: Function, x: V) -> V:
        """What CrypTen approximates."""

    @abstractmethod
    def polynomial(self, polynomial: AnyPolynomial, x: V) -> V:
        """A public polynomial of every element, or each channel's own."""

    # -- what layers are written in

    def multiply(self, x: V, y: V) -> V:
        """A product of two private values; y may have 1 where x has more."""
        return self.product(torch.mul, x, y)

    def convolution(self, x: V, weight: V, bias: V | None, windows: Windows) -> V:
        """A two-dimensional convolution, as torch's conv2d."""
        y = self.product(
            lambda x, w: functional.conv2d(x, w, None, *windows), x, weight
        )
        if bias is None:
            return y
        return self.add(y, self.local(lambda bias: bias.view(1, -1, 1, 1), bias))

    def matmul(self, x: V, weight: V, bias: V | None) -> V:
        """x @ weight.T + bias, of (batch, in) and (out, in)."""
        y = self.product(lambda x, w: x @ w.t(), x, weight)
        if bias is None:
            return y
        # CrypTen multiplies both by ONNX's alpha and beta, which truncates.
        return self.add(self.scaled(y, 1.0), self.scaled(bias, 1.0))

    def window_sums(self, x: V, kernel: Pair, stride: Pair) -> V:
        """Sums over windows of an image."""
        return self.local(
            lambda x: functional.avg_pool2d(x, kernel, stride, divisor_override=1), x
        )

    def mix(self, x: V, rows: Tensor, columns: Tensor) -> V:
        """rows @ x @ columns.T, of an image and public matrices (out, in)."""
        y = self.weighed(lambda x, m: torch.matmul(m, x), x, rows)
        return self.weighed(lambda x, m: torch.matmul(x, m.t()), y, columns)

    def move(self, values: Sequence[V], given: IndexMap) -> V:
        """Elements of values at public places, and zeros."""
        return self.local(lambda *values: moved(values, given), *values)

    def pad(self, x: V, sides: tuple[int, int, int, int]) -> V:
        """Zeros around an image: left, right, top, bottom."""
        return self.local(lambda x: functional.pad(x, sides), x)

    def flatten(self, x: V) -> V:
        """(batch, everything else)."""
        return self.local(lambda x: x.flatten(1), x)

    def concat(self, values: Sequence[V], axis: int) -> V:
        """Values beside each other along an axis, the batch counted."""
        return self.local(lambda *values: torch.cat(values, axis), *values)


class Reals(Arithmetic[Tensor]):
    """Layers in floating point, of the type of the values."""

    def product(self, function: Function, x: Tensor, weight: Tensor) -> Tensor:
        return function(x, weight)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def local(self, function: Function, *values: Tensor) -> Tensor:
        return function(*values)

    def scaled(self, x: Tensor, factor: float) -> Tensor:
        return x * factor

    def weighed(self, function: Function, x: Tensor, matrix: Tensor) -> Tensor:
        return function(x, matrix.to(x))

    def divided(self, x: Tensor, count: int) -> Tensor:
        return x / count

    def compared(self, function: Function, x: Tensor) -> Tensor:
        return function(x)

    def approximated(self, function: Function, x: Tensor) -> Tensor:
        return function(x)

    def polynomial(self, polynomial: AnyPolynomial, x: Tensor) -> Tensor:
        return polynomial(x)

    # torch adds a bias in the same pass.

    def convolution(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, windows: Windows
    ) -> Tensor:
        return self.product(
            lambda x, w: functional.conv2d(x, w, bias, *windows), x, weight
        )

    def matmul(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.product(lambda x, w: functional.linear(x, w, bias), x, weight)
