"""A plan: which integers each party computes, at which scale, in which ring.

A plan is public. It holds the network's structure, shapes, polynomials, ring widths and
scales, and the input guard's bounds: what client and dealer need, and nothing else.
Weights, the values seen in calibration and the layers' names stay with the owner
(`model.PlanReport`). Both parties and the dealer hold the same plan and compare its
digest first.

The network is cut into steps at its activations, and at products of its values. Each
reads sources (the input, or the result of a step), which exist as x = D + t with D
opened and t a dealer-known mask, and ends in a value z that is opened again:

    z in R_m at g bits --open m - s_k bits a group--> polynomial y in R_64 at F bits
    y --open, drop s = F - f bits--> source x = D + t in R_(64-s), f fractional bits

Where all that read y read its average pool, y is the pool's sums before it is opened.
Where y is a product, z is its two factors beside each other, opened in one message.

Nothing in a plan is believed: every plan, our own and a received one, is checked
whenever one is made. Shapes are computed, never declared; sizes, depth and work are
bounded before anything is allocated. `planning` makes plans from converted networks.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated

import msgspec
import numpy as np
import torch
from msgspec import Meta

from ..errors import PlanError, RangeError
from ..pillar.guard import InputGuard
from ..pillar.guarding import guarded_batch
from ..wire.packing import packed_bytes
from . import kernels
from .checks import MAX_TEXT, Checked
from .evaluation import Evaluation, chunks, evaluation
from .linear import Conv, Shape, shape_of
from .steps import Input, Output, Step, Strict

INPUT = 0


@dataclass(frozen=True)
class Source:
    """A value that exists as x = D + t; shape without the batch, channels last."""

    shape: Shape
    ring: int
    frac_bits: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class WeightShape:
    """The integers of one layer.

    Args:
        shape: (filters, channels / groups, kh, kw), in torch's order.
        groups: convolution groups.
        ring: modulo 2**ring.
        fast: whether `filters` are those of Winograd's form, on this processor.
    """

    shape: tuple[int, int, int, int]
    groups: int
    ring: int
    fast: bool = False

    @staticmethod
    def of(node: Conv, source: Shape, ring: int) -> WeightShape:
        """A layer's, which reads a value of this shape."""
        plain = WeightShape(node.weight_shape(source[-1]), node.groups, ring)
        fast = kernels.pays(
            plain.kernel_layout,
            ring,
            stride=node.stride,
            dilation=node.dilation,
            size=node.output_shape([source])[:-1],
        )
        return replace(plain, fast=fast)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def kernel_layout(self) -> tuple[int, ...]:
        """The shape of the integers as the convolution kernels want them."""
        o, c, kh, kw = self.shape
        if self.groups > 1 and c == 1 and o == self.groups:
            return (kh, kw, o)
        return (self.groups, kh, kw, c, o // self.groups)

    def arrange(self, array: np.ndarray) -> np.ndarray:
        """Bring (filters, channels, kh, kw) into `kernel_layout`."""
        o, c, kh, kw = self.shape
        if len(self.kernel_layout) == 3:
            return np.ascontiguousarray(array.reshape(o, kh, kw).transpose(1, 2, 0))
        grouped = array.reshape(self.groups, o // self.groups, c, kh, kw)
        return np.ascontiguousarray(grouped.transpose(0, 3, 4, 2, 1))

    @property
    def filter_bytes(self) -> int:
        """Of `filters` in memory, at most: channels may be paired, or need half."""
        size = self.elements * np.dtype(kernels.ring_dtype(self.ring)).itemsize
        channels = self.shape[1]
        if channels > 1:
            size = size // channels * (channels + channels % 2)
        return size * 16 // 9 if self.fast else size

    def filters(self, array: np.ndarray) -> kernels.Filters:
        """The integers, in `kernel_layout`, as `Conv.convolve` takes them."""
        return kernels.Filters(array, fast=self.fast)


class Plan(Strict, frozen=True, dict=True):
    """Everything public that both parties and the dealer need.

    Args:
        version: of this format.
        input: what the network takes.
        steps: in order of evaluation; source i + 1 is step i's result.
        output: the logits.

    Raises: PlanError when it is made, if its numbers contradict each other or exceed
        what this version computes.
    """

    version: int
    input: Input
    steps: Annotated[tuple[Step, ...], Meta(max_length=1 << 12)]
    output: Output

    def __post_init__(self) -> None:
        _ = self._totals  # checked here, once

    @cached_property
    def _totals(self) -> Checked:
        return Checked(self)

    # -- identity

    def to_json(self) -> str:
        """The canonical text of the plan."""
        return msgspec.json.encode(self).decode()

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the canonical text."""
        return hashlib.sha256(self.to_json().encode()).digest()

    @staticmethod
    def from_json(text: str | bytes) -> Plan:
        """Read and check a plan received from elsewhere.

        Raises: PlanError if the text is no plan of this version, or a plan that this
            version would not make.
        """
        if len(text) > MAX_TEXT:
            raise PlanError(
                f"A plan of {len(text):,} bytes was given; {MAX_TEXT:,} are the most."
            )
        try:
            return _DECODER.decode(text)
        except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
            raise PlanError(
                f"This is not a plan of this version ({error}). Use the same "
                "crypten-espn on both sides."
            ) from None

    # -- what follows from it

    @cached_property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """How each step is evaluated between its two openings."""
        shape = self.input.shape
        shapes: list[Shape] = [(*shape[1:], shape[0])]
        found = []
        for step in self.steps:
            found.append(evaluation(step, shapes))
            shapes.append(found[-1].result)
        return tuple(found)

    @cached_property
    def sources(self) -> tuple[Source, ...]:
        """The input and each step's result."""
        shape, first = self.input.shape, self.input
        found = [Source((*shape[1:], shape[0]), first.ring, first.frac_bits)]
        for step, between in zip(self.steps, self.evaluations, strict=True):
            act = step.activation
            found.append(Source(between.result, act.ring, act.frac_bits))
        return tuple(found)

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """Of each source, without the batch, channels last."""
        return tuple(source.shape for source in self.sources)

    @cached_property
    def logits_shape(self) -> Shape:
        """Of the output's integers, channels last."""
        return self.part_shapes[-1]

    @property
    def output_shape(self) -> Shape:
        """Of the logits without the batch: channels first, as torch has them."""
        return (self.logits_shape[-1], *self.logits_shape[:-1])

    @property
    def parts(self) -> tuple[Step | Output, ...]:
        """All linear parts in order: the steps, then the output."""
        return (*self.steps, self.output)

    @cached_property
    def reads(self) -> tuple[tuple[int, ...], ...]:
        """Sources that each linear part reads."""
        return tuple(part.root.sources for part in self.parts)

    @cached_property
    def last_reads(self) -> tuple[tuple[int, ...], ...]:
        """Sources that no later part reads, by linear part."""
        last = {s: k for k, read in enumerate(self.reads) for s in read}
        return tuple(
            tuple(s for s, number in last.items() if number == k)
            for k in range(len(self.parts))
        )

    @cached_property
    def part_shapes(self) -> tuple[Shape, ...]:
        """Of each linear part's value, without the batch; channels last."""
        return tuple(shape_of(part.root, self.shapes) for part in self.parts)

    def elements(self, number: int) -> int:
        """Values of linear part `number` for one input."""
        return math.prod(self.part_shapes[number])

    @cached_property
    def weights(self) -> tuple[WeightShape, ...]:
        """The shape of each layer's integers."""
        found = []
        for part in self.parts:
            for node in part.root.walk():
                if isinstance(node, Conv):
                    source = shape_of(node.x, self.shapes)
                    found.append(WeightShape.of(node, source, part.ring))
        return tuple(found)

    # -- cost

    @property
    def activation_elements(self) -> int:
        """Activations and products of one input."""
        return sum(one.activations for one in self.evaluations)

    @property
    def messages(self) -> int:
        """Sequential online messages of one inference."""
        return 2 * len(self.parts)

    @property
    def weight_bytes(self) -> int:
        """What the server sends once per model: its weights under a mask."""
        return sum(packed_bytes(w.elements, w.ring) for w in self.weights)

    def dealer_messages(self, *, batch: int = 1) -> list[int]:
        """Bytes of each of the dealer's corrections for one inference."""
        found = []
        for number, part in enumerate(self.parts):
            found.append(packed_bytes(batch * self.elements(number), part.ring))
            if isinstance(part, Step):
                dealt = self.evaluations[number].dealt
                for chunk in chunks(batch):
                    parts = dealt(chunk.stop - chunk.start)
                    found.append(sum(packed_bytes(*part) for part in parts))
        return found

    def dealer_bytes(self, *, batch: int = 1) -> int:
        """Offline bytes that the dealer sends one party for an inference."""
        return sum(self.dealer_messages(batch=batch))

    def client_bytes(self, *, batch: int = 1) -> int:
        """Offline bytes that the client sends the server for an inference."""
        return sum(
            packed_bytes(batch * between.opened, between.step.ring)
            for between in self.evaluations
        )

    @property
    def work(self) -> int:
        """Multiplications and additions of all linear parts for one input."""
        return self._totals.work

    def dealer_memory(self, *, batch: int = 1) -> int:
        """Bytes that the dealer's arrays take at most during one inference.

        Every value counts as if none were dropped, in words of 64 bits: a bound for
        whoever decides whether to accept an order, not an estimate.
        """
        step = max(
            (
                2 * one.words
                + 3 * step.activation.masks * one.opened
                + 4 * one.elements
                for step, one in zip(self.steps, self.evaluations, strict=True)
            ),
            default=0,
        )
        # The masks as convolutions take them, and one as it is drawn.
        drawn = max((weight.elements for weight in self.weights), default=0)
        masks = sum(weight.filter_bytes for weight in self.weights) + 8 * drawn
        values = batch * (self._totals.elements + 2 * step)
        return masks + 8 * (2 * self._totals.coeffs + values)

    # -- the input

    @cached_property
    def guard(self) -> InputGuard | None:
        """What the client checks of an input in the clear; None if nothing."""
        return None if self.input.guard is None else self.input.guard.read()

    def encode(self, x: object, *, force: bool = False) -> np.ndarray:
        """Integers of an input batch, channels last, at the input's scale.

        Args:
            x: (batch, *input.shape), real numbers of any kind that `inputs` takes.
            force: take what the guard refuses, as `pillar.guarding.guarded_batch`.

        Returns: int64 (batch, *sources[0].shape), rounded to nearest.

        Raises: DataError for what holds no real numbers; ShapeError for another shape;
            RangeError for values that are not finite or exceed `input.bound`, forced or
            not, and for inputs that the guard refuses. Nothing has been sent by then.
        """
        x = guarded_batch(x, self.input.shape, self.guard, force=force)
        largest = float(x.abs().max())
        if largest > self.input.bound:
            raise RangeError(
                f"The input reaches {largest:.4g}; the plan allows "
                f"{self.input.bound:.4g}. Normalise the input as in training, or "
                "calibrate with data that covers it."
            )
        values = channels_last(x.cpu().to(torch.float64).numpy())
        return np.rint(values * 2.0**self.input.frac_bits).astype(np.int64)

    def decode(self, z: np.ndarray) -> torch.Tensor:
        """Real logits (batch, *output_shape) from the output's integers."""
        real = kernels.centred(z, self.output.ring) * 2.0**-self.output.frac_bits
        real = np.moveaxis(real, -1, 1)
        return torch.from_numpy(np.ascontiguousarray(real)).to(torch.float32)


def channels_last(values: np.ndarray) -> np.ndarray:
    """(batch, c, ...) to (batch, ..., c); (batch, n) stays."""
    return np.ascontiguousarray(np.moveaxis(values, 1, -1))


# Made here once: two threads that decode a type for the first time crash msgspec.
_DECODER = msgspec.json.Decoder(Plan)
