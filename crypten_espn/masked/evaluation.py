"""What stands between a step's two openings, as each party and the dealer compute it.

A step is a polynomial of one opened value, or a product of two. Both have the same
messages: the server sends what it opened, above the bits that round; each party makes
its share of the value from words of the dealer; the client sends its own back.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from . import kernels
from .linear import NO_PADS, Shape, shape_of
from .memory import Space
from .products import Factors, dealt_words, places
from .steps import Activation, Product, Step

# One array for each part of a message, or one whose rows they are.
Openings = np.ndarray | Sequence[np.ndarray]


def chunks(batch: int) -> list[slice]:
    """The parts of a batch that travel as messages of their own within a layer.

    While the client works on one chunk, the server convolves the next, and a chunk's
    values stay in the cache from one step to the next. Less than 8 images travel whole.
    """
    size = batch if batch < 8 else min(4, batch // 4)
    return [slice(a, min(a + size, batch)) for a in range(0, batch, size)]


@dataclass
class Coins:
    """A step's masks and rounding coins, which nobody but the dealer knows in full.

    Args:
        masks: (groups, n) r_k of the n opened elements, uniform modulo 2**m.
        rounding: of the elements of the result, rho uniform below 2**s.
    """

    masks: np.ndarray
    rounding: np.ndarray

    def part(self, chunk: slice, batch: int) -> Coins:
        """Those of some inputs of the batch."""
        found = []
        for array in (self.masks, self.rounding):
            size = array.shape[-1] // batch
            part = array[..., chunk.start * size : chunk.stop * size]
            found.append(np.ascontiguousarray(part))
        return Coins(*found)


class Evaluation(ABC):
    """A step between its openings.

    Attributes:
        step: the step.
        opened: elements of one input that its linear part opens.
        result: the resulting source's shape.
        sizes: elements of one input in each part of the server's message.
    """

    step: Step
    opened: int
    result: Shape
    sizes: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Of the result for one input."""
        return math.prod(self.result)

    @property
    def activations(self) -> int:
        """Polynomials or products of one input."""
        return self.elements

    @property
    def words(self) -> int:
        """Of the dealer for one input."""
        return math.prod(self.words_shape(1))

    @abstractmethod
    def dealt(self, rows: int) -> tuple[tuple[int, int], ...]:
        """Words and bits of each part of the dealer's message, in their order.

        A part is the beginning of a line of the words; what follows there is not used.
        """

    def lines(self, words: np.ndarray, rows: int) -> list[np.ndarray]:
        """The parts of words for so many inputs, as they travel; views."""
        parts = self.dealt(rows)
        lines = words.reshape(len(parts), -1)
        return [line[:count] for line, (count, _) in zip(lines, parts, strict=True)]

    def payload(self, rows: int) -> tuple[tuple[int, int], ...]:
        """Elements and bits of each part of the server's message for so many inputs."""
        sizes = zip(self.sizes, self.opened_bits, strict=True)
        return tuple((rows * size, bits) for size, bits in sizes)

    @cached_property
    def opened_bits(self) -> tuple[int, ...]:
        """Bits an element of each part of the server's message."""
        return self.step.opened_bits

    def room(self, rows: int, space: Space) -> Openings:
        """Where a message of the server's for so many inputs is received."""
        return [
            space.array(f"opening {k}", (count,), kernels.ring_dtype(bits))
            for k, (count, bits) in enumerate(self.payload(rows))
        ]

    @abstractmethod
    def words_shape(self, rows: int) -> Shape:
        """Of one party's shares of the dealer's words for so many inputs."""

    @abstractmethod
    def open(self, c: np.ndarray, deltas: np.ndarray) -> Openings:
        """What the client receives of a chunk's opening c, (rows, *part)."""

    @abstractmethod
    def share(
        self, openings: Openings, words: np.ndarray, *, c: np.ndarray | None = None
    ) -> np.ndarray:
        """One party's share of the value, (elements of the chunk,) modulo 2**64.

        Args:
            openings: of the chunk, as `open` makes them or as `room` received them.
            words: this party's, of the chunk.
            c: the opening itself, at the server. The client's share comes without the
                bits that it does not send.
        """

    @abstractmethod
    def deal(self, coins: Coins, words: np.ndarray) -> None:
        """Overwrite the words that one party draws by those that the other is sent."""

    @abstractmethod
    def hide(self, words: np.ndarray, hidden: np.ndarray) -> None:
        """Let the second opening's mask, without the bits it drops, join the words."""


def polynomial(act: Activation, ring: int, zeros: Sequence[int]) -> kernels.Polynomial:
    """An activation of values modulo 2**ring, as the kernels read it.

    Args:
        zeros: low bits that each of the dealer's words is without.
    """
    degrees = np.array([group.degree for group in act.groups] or [1])
    shape = act.masks, int(degrees.max()) + 1, max(act.columns)
    coeffs = np.zeros(shape, dtype=np.int64)
    for g, group in enumerate(act.groups):
        rows = np.array(group.coeffs, dtype=np.int64)
        coeffs[g, : group.degree + 1] = rows.T
    coeffs[0, 0] = act.constant
    linear = np.zeros(shape[2], dtype=np.int64)
    if act.linear is not None:
        linear[:] = act.linear.coefficient
    return kernels.Polynomial(
        bits=ring,
        shifts=np.array(act.shifts(ring), dtype=np.int64),
        degrees=degrees,
        coeffs=coeffs,
        linear=linear,
        linear_shift=0 if act.linear is None else act.linear.shift,
        zeros=np.array(zeros, dtype=np.int64),
    )


class OfPolynomial(Evaluation):
    """A polynomial of every element of a value, or its sums over windows.

    Shares are linear: each party sums its own. So what belongs to a result, the second
    opening with its mask and its coin, is one for a window, and so is the constants'
    word. A coin for each value would round up the sum by half a unit for each.

    Attributes:
        values: the shape of what the polynomial is computed of.
    """

    def __init__(self, step: Step, act: Activation, values: Shape) -> None:
        self.step, self.values = step, values
        self.result = act.pooled(values)
        self.opened = math.prod(values)
        self.sizes = (self.opened,) * act.masks
        self._pool = act.pool
        self._zeros = act.zeros(step.ring)
        self._polynomial = polynomial(act, step.ring, self._zeros)

    @property
    def activations(self) -> int:
        return self.opened

    def words_shape(self, rows: int) -> Shape:
        return (self._polynomial.words, rows * self.opened)

    def dealt(self, rows: int) -> tuple[tuple[int, int], ...]:
        constant, *others = self._zeros
        parts = [(rows * self.opened, 64 - low) for low in others]
        return ((rows * self.elements, 64 - constant), *parts)

    def _add_sums(self, values: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Add the values' sums over the windows to out, flat both; out."""
        assert self._pool is not None
        kernels.pool_sum(
            values.reshape(-1, *self.values),
            out.reshape(-1, *self.result),
            kernel=self._pool,
            stride=self._pool,
            pads=NO_PADS,
        )
        return out

    def room(self, rows: int, space: Space) -> Openings:
        dtypes = {kernels.ring_dtype(bits) for bits in self.opened_bits}
        if len(dtypes) > 1:
            return super().room(rows, space)
        shape = len(self.sizes), rows * self.opened
        return space.array("openings", shape, dtypes.pop())  # its rows

    def open(self, c: np.ndarray, deltas: np.ndarray) -> Openings:
        flat = c.reshape(-1)
        out = np.empty((len(self.sizes), flat.size), dtype=c.dtype)
        kernels.shifted_openings(
            flat, deltas, bits=self.step.ring, shifts=self._polynomial.shifts, out=out
        )
        return out  # its rows

    def share(
        self, openings: Openings, words: np.ndarray, *, c: np.ndarray | None = None
    ) -> np.ndarray:
        pooled = self._pool is not None
        unsent = self.step.activation.unsent if c is None else 0
        half = np.empty(words.shape[1], dtype=np.int64)
        self._polynomial.share(
            np.asarray(openings),
            words,
            c=None if c is None else c.reshape(-1),
            step=0 if pooled else unsent,
            out=half,
        )
        if not pooled:
            return half
        # The constants' line is that of the sums, without one for each value.
        low = self._zeros[0]
        half -= words[0] << low
        count = half.size // self.opened * self.elements
        return self._add_sums(half, words[0, :count] << low) >> unsent

    def deal(self, coins: Coins, words: np.ndarray) -> None:
        if self._pool is None:
            self._polynomial.deal(coins.masks, coins.rounding, words, out=words)
            return
        # Every value's constant, whole; they are summed before it is cut.
        first = words[0].copy()
        words[0] = 0
        rounding = np.zeros(words.shape[1], dtype=np.int64)
        self._before_sums.deal(coins.masks, rounding, words, out=words)
        sums = self._add_sums(words[0], coins.rounding.copy())
        words[0, : sums.size] = (sums >> self._zeros[0]) - first[: sums.size]

    @cached_property
    def _before_sums(self) -> kernels.Polynomial:
        act = self.step.activation
        assert isinstance(act, Activation)
        return polynomial(act, self.step.ring, (0, *self._zeros[1:]))

    def hide(self, words: np.ndarray, hidden: np.ndarray) -> None:
        # The constant's word is without the bits that the client does not send.
        mask = hidden.reshape(-1)
        kernels.hide(words[0, : mask.size], mask, kept=self.step.activation.kept)


class OfProduct(Evaluation):
    """A product of two values; see `kernels.product`.

    Who learns what. The client gets of each factor what lies above the bits that are
    dropped from it, under a mask r of its own: uniform, and independent of the low bits
    of r, which alone decide how the factor is rounded. So it can average nothing, and
    two queries' openings differ by masks alone. A gate's element has one mask and one
    coin, whatever it multiplies. The server sees all of c, and the dealer's words with
    the client's seed-drawn shares taken off, the second opening's coins among the
    products of the masks: uniform, and it knows no coin of them. Which case counts is
    said by top bits that both know.

    Attributes:
        factors: the shapes of both.
    """

    def __init__(
        self, step: Step, product: Product, factors: tuple[Shape, Shape]
    ) -> None:
        self.step, self.factors = step, factors
        self.result = factors[0]
        self.sizes = (math.prod(factors[0]), math.prod(factors[1]))
        self.opened = sum(self.sizes)
        self.lift = product.lift(step.frac_bits)
        self._dropped = np.array(product.dropped, dtype=np.int64)
        self._places = places(*factors)

    def words_shape(self, rows: int) -> Shape:
        return (rows, dealt_words(*self.factors))

    def dealt(self, rows: int) -> tuple[tuple[int, int], ...]:
        return ((rows * self.words, 64),)

    def open(self, c: np.ndarray, deltas: np.ndarray) -> Openings:
        del deltas
        parts = np.split(c, [self.sizes[0]], axis=1)
        mask = kernels.ring_mask(self.step.ring)
        return [
            ((part.astype(np.int64) & mask) >> shift).astype(c.dtype).reshape(-1)
            for part, shift in zip(parts, self._dropped, strict=True)
        ]

    def share(
        self, openings: Openings, words: np.ndarray, *, c: np.ndarray | None = None
    ) -> np.ndarray:
        rows, dtype = len(words), kernels.ring_dtype(self.step.ring)
        first, second = (
            opening.astype(dtype, copy=False).reshape(rows, size)
            for opening, size in zip(openings, self.sizes, strict=True)
        )
        half = np.empty((rows, self.elements), dtype=np.int64)
        kernels.product_share(
            first,
            second,
            words,
            widths=self.step.ring - self._dropped,
            places=self._places,
            lift=self.lift,
            own=c is not None,
            step=self.step.activation.unsent if c is None else 0,
            out=half,
        )
        return half.reshape(-1)

    def deal(self, coins: Coins, words: np.ndarray) -> None:
        kernels.deal_product(
            coins.masks.reshape(len(words), -1),
            coins.rounding.reshape(len(words), -1),
            words,
            bits=self.step.ring,
            dropped=self._dropped,
            places=self._places,
            lift=self.lift,
            out=words,
        )

    def hide(self, words: np.ndarray, hidden: np.ndarray) -> None:
        size = self.elements
        four = words[:, 2 * size : 6 * size].reshape(len(words), 4, size)
        mask = hidden.astype(np.int64).reshape(len(words), 1, size)
        four += mask << self.step.activation.drop


def evaluation(step: Step, sources: Sequence[Shape]) -> Evaluation:
    """How a checked plan's step is evaluated, its sources' shapes given."""
    act = step.activation
    if isinstance(act, Activation):
        return OfPolynomial(step, act, shape_of(step.root, sources))
    assert isinstance(step.root, Factors)
    first, second = (shape_of(factor, sources) for factor in step.root.inputs)
    return OfProduct(step, act, (first, second))
