"""A plan: which integers each party computes, at which scale, in which ring.

A plan is public. It holds the network's structure, shapes, polynomials, ring widths and
scales: what client and dealer need to compute, and nothing else. Weights, the values
seen in calibration and the layers' names stay with the owner (`model.PlanReport`).
Both parties and the dealer hold the same plan and compare its digest first.

The network is cut at its activations into steps. Each reads sources (the input, or the
result of an activation), which exist as x = D + t with D opened and t a dealer-known
mask, and ends in a value z that is opened again:

    z in R_m at g bits --open m - s_k bits a group--> polynomial y in R_64 at F bits
    y --open, drop s = F - f bits--> source x = D + t in R_(64-s), f fractional bits

Nothing in a plan is believed: every plan, our own and a received one, is checked
whenever one is made. Shapes are computed, never declared; sizes, depth and work are
bounded before anything is allocated. `planning` makes plans from converted networks.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import msgspec
import numpy as np
import torch
from msgspec import Meta

from ..errors import PlanError, RangeError, ShapeError
from ..wire.packing import packed_bytes
from . import kernels
from .linear import Conv, Expression, Operation, Pad, Pool, Read, Shape, shape_of

VERSION = 2
INPUT = 0
VALUE_RING = 64
RING_LIMITS = (20, 56)
# Bits of a second opening that the client sends below those that reach the next layer.
# The client knows what it drops, and that stays in x: with 16, the rest is worth 2**-16
# of a unit, and averaging it out takes 2**32 times as many queries.
KEPT_BITS = 16

MAX_TEXT = 1 << 24
MAX_DEPTH = 100
MAX_OPERATIONS = 1 << 16
MAX_VALUE = 1 << 26  # elements of one value of one input, pads included
MAX_ELEMENTS = 1 << 28  # of all values of one input
MAX_STEP_DEALT = 1 << 27  # words from the dealer for one step of one input
MAX_DEALT = 1 << 29  # of all steps
MAX_WEIGHTS = 1 << 28
MAX_WORK = 1 << 42  # multiplications and additions of one input

Int64 = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Ring = Annotated[int, Meta(ge=RING_LIMITS[0], le=RING_LIMITS[1])]
Bits = Annotated[int, Meta(ge=0, le=62)]
Size = Annotated[int, Meta(ge=1, le=1 << 26)]


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Part of a plan: decoding accepts exactly its fields and their types."""


class Linear(_Strict, frozen=True):
    """The power 1 of a polynomial: coefficient * (z >> shift), at the server alone."""

    shift: Bits
    coefficient: Int64


class Group(_Strict, frozen=True):
    """Powers of x that share one truncation: x_k = z >> shift, up to one unit.

    Args:
        shift: bits dropped.
        coeffs: integers; coeffs[k] multiplies x_k**k, and the first is 0.
    """

    shift: Bits
    coeffs: Annotated[tuple[Int64, ...], Meta(min_length=3, max_length=17)]

    @property
    def degree(self) -> int:
        return len(self.coeffs) - 1


class Activation(_Strict, frozen=True):
    """A polynomial between two openings.

    Every group has a mask of its own. The linear term and the constant go with the
    first group's; where there is no group, with a mask that serves them alone.

    Args:
        linear: the power 1, or None.
        groups: the higher powers, each at its own truncation.
        constant: integer constant term at F bits.
        drop: s = F - f, bits dropped by the second opening.
        frac_bits: f, of the resulting source.
    """

    linear: Linear | None
    groups: Annotated[tuple[Group, ...], Meta(max_length=8)]
    constant: Int64
    drop: Annotated[
        int, Meta(ge=VALUE_RING - RING_LIMITS[1], le=VALUE_RING - RING_LIMITS[0])
    ]
    frac_bits: Bits

    @property
    def value_frac_bits(self) -> int:
        """F, fractional bits of the polynomial's value."""
        return self.frac_bits + self.drop

    @property
    def ring(self) -> int:
        """Bits of the ring in which the resulting source lives."""
        return VALUE_RING - self.drop

    @property
    def kept(self) -> int:
        """Low bits that the client sends though they are dropped in the end."""
        return min(KEPT_BITS, self.drop)

    @property
    def sent_bits(self) -> int:
        """Bits of the client's half of the second opening."""
        return self.ring + self.kept

    @property
    def masks(self) -> int:
        """Masks of the first opening."""
        return max(1, len(self.groups))

    @property
    def values(self) -> int:
        """Dealer values per element for each of a mask's two cases."""
        return sum(group.degree for group in self.groups) or 1

    def shifts(self, ring: int) -> tuple[int, ...]:
        """Low bits of each mask's opening that the client does not receive.

        A rounding coin is known to who knows the bits below a group's shift. Without
        any group the client needs the top bit alone, to choose its constant.
        """
        return tuple(group.shift for group in self.groups) or (ring - 1,)


@dataclass(frozen=True)
class PolynomialTables:
    """A step's activation as the kernels take it.

    Args:
        shifts, widths, degrees: (masks,) of each opening.
        public: (masks, K + 1) coefficients of the opened value's own powers.
        table: table[g, j, k] multiplies D**j t**k in p(D + t).
        linear, linear_shift, constant: the rest of the polynomial.
    """

    shifts: np.ndarray
    widths: np.ndarray
    degrees: np.ndarray
    public: np.ndarray
    table: np.ndarray
    linear: int
    linear_shift: int
    constant: int


class Step(_Strict, frozen=True, dict=True):
    """One linear part of the network and the activation after it.

    Args:
        root: the expression to compute.
        ring: bits m of the linear ring.
        frac_bits: g, of its result.
        activation: what follows.
    """

    root: Expression
    ring: Ring
    frac_bits: Bits
    activation: Activation

    @property
    def opened_bits(self) -> tuple[int, ...]:
        """Bits an element of each part of the server's message."""
        return tuple(self.ring - s for s in self.activation.shifts(self.ring))

    @cached_property
    def tables(self) -> PolynomialTables:
        act = self.activation
        shifts = np.array(act.shifts(self.ring), dtype=np.int64)
        degrees = [group.degree for group in act.groups] or [1]
        top = max(degrees)
        public = np.zeros((act.masks, top + 1), dtype=np.int64)
        table = np.zeros((act.masks, top, top + 1), dtype=np.int64)
        for g, group in enumerate(act.groups):
            public[g, : group.degree + 1] = group.coeffs
            for j in range(group.degree):
                for k in range(1, group.degree - j + 1):
                    product = group.coeffs[j + k] * math.comb(j + k, j)
                    table[g, j, k] = wrapped(product)
        linear = act.linear or Linear(0, 0)
        return PolynomialTables(
            shifts,
            self.ring - shifts,
            np.array(degrees, dtype=np.int64),
            public,
            table,
            linear.coefficient,
            linear.shift,
            act.constant,
        )


class Output(_Strict, frozen=True):
    """The network's last linear part: the logits.

    Args:
        root: the expression to compute.
        ring: bits m of the linear ring.
        frac_bits: of the logits.
        noise_bits: d; the server adds noise uniform below 2**d to its share, since
            answers to one input differ by rows of the last layer's weights.
    """

    root: Expression
    ring: Ring
    frac_bits: Bits
    noise_bits: Bits


class Input(_Strict, frozen=True):
    """The network's input.

    Args:
        shape: (channels, height, width) or (features,), without the batch.
        ring: x = D + t holds modulo 2**ring.
        frac_bits: of its integers.
        bound: largest |input| that fits.
    """

    shape: Annotated[tuple[Size, ...], Meta(min_length=1, max_length=3)]
    ring: Ring
    frac_bits: Bits
    bound: Annotated[float, Meta(gt=0, le=2.0**60)]


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
    """

    shape: tuple[int, int, int, int]
    groups: int
    ring: int

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


class Plan(_Strict, frozen=True, dict=True):
    """Everything public that both parties and the dealer need.

    Args:
        version: of this format.
        input: what the network takes.
        steps: in order of evaluation; source i + 1 is step i's activation.
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
    def _totals(self) -> _Checked:
        return _Checked(self)

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
            return msgspec.json.decode(text, type=Plan)
        except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
            raise PlanError(
                f"This is not a plan of this version ({error}). Use the same "
                "crypten-espn on both sides."
            ) from None

    # -- what follows from it

    @cached_property
    def sources(self) -> tuple[Source, ...]:
        """The input and each activation's result."""
        shape = self.input.shape
        last = (*shape[1:], shape[0])
        found = [Source(last, self.input.ring, self.input.frac_bits)]
        for step in self.steps:
            act = step.activation
            shapes = [source.shape for source in found]
            found.append(Source(shape_of(step.root, shapes), act.ring, act.frac_bits))
        return tuple(found)

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """Of each source, without the batch, channels last."""
        return tuple(source.shape for source in self.sources)

    @cached_property
    def logits_shape(self) -> Shape:
        """Of the output's integers, channels last."""
        return shape_of(self.output.root, self.shapes)

    @property
    def output_shape(self) -> Shape:
        """Of the logits without the batch: (channels, height, width) or (features,)."""
        return (self.logits_shape[-1], *self.logits_shape[:-1])

    @property
    def parts(self) -> tuple[Step | Output, ...]:
        """All linear parts in order: the steps, then the output."""
        return (*self.steps, self.output)

    @cached_property
    def last_reads(self) -> tuple[tuple[int, ...], ...]:
        """Sources that no later part reads, by linear part."""
        last = {s: k for k, part in enumerate(self.parts) for s in part.root.sources}
        return tuple(
            tuple(s for s, number in last.items() if number == k)
            for k in range(len(self.parts))
        )

    def elements(self, number: int) -> int:
        """Values of linear part `number` for one input."""
        if number < len(self.steps):
            return self.sources[number + 1].elements
        return math.prod(self.logits_shape)

    @cached_property
    def weights(self) -> tuple[WeightShape, ...]:
        """The shape of each layer's integers."""
        found = []
        for part in self.parts:
            for node in part.root.walk():
                if isinstance(node, Conv):
                    channels = shape_of(node.x, self.shapes)[-1]
                    shape = node.weight_shape(channels)
                    found.append(WeightShape(shape, node.groups, part.ring))
        return tuple(found)

    # -- cost

    @property
    def activation_elements(self) -> int:
        """Activations of one input."""
        return sum(source.elements for source in self.sources[1:])

    @property
    def messages(self) -> int:
        """Sequential online messages of one inference."""
        return 2 * len(self.parts)

    @property
    def weight_bytes(self) -> int:
        """What the server sends once per model: its weights under a mask."""
        return sum(packed_bytes(w.elements, w.ring) for w in self.weights)

    def dealer_bytes(self, *, batch: int = 1) -> int:
        """Offline bytes the dealer sends the server for one inference."""
        total = 0
        for number, part in enumerate(self.parts):
            count = batch * self.elements(number)
            total += packed_bytes(count, part.ring)
            if isinstance(part, Step):
                total += 16 * part.activation.values * count
        return total

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
                (4 * s.activation.values + 3 * s.activation.masks + 4) * elements
                for s, elements in zip(
                    self.steps, map(self.elements, range(len(self.steps))), strict=True
                )
            ),
            default=0,
        )
        return 8 * (self._totals.weights + batch * (self._totals.elements + 2 * step))

    # -- the input

    def encode(self, x: torch.Tensor) -> np.ndarray:
        """Integers of an input batch, channels last, at the input's scale.

        Args:
            x: (batch, *input.shape), real numbers.

        Returns: int64 (batch, *sources[0].shape), rounded to nearest.

        Raises: ShapeError for another shape; RangeError for values that are not finite
            or exceed `input.bound`. Nothing has been sent by then.
        """
        shape = self.input.shape
        if tuple(x.shape[1:]) != shape or x.dim() < 2 or x.shape[0] < 1:
            raise ShapeError(
                f"Input of shape {tuple(x.shape)}; this network takes (batch, "
                f"{', '.join(map(str, shape))})."
            )
        if not torch.is_floating_point(x):
            x = x.to(torch.float64)
        if not bool(torch.isfinite(x).all()):
            raise RangeError(
                "The input holds NaN or infinity. Clean it before predicting."
            )
        largest = float(x.abs().max())
        if largest > self.input.bound:
            raise RangeError(
                f"The input reaches {largest:.4g}; the plan allows "
                f"{self.input.bound:.4g}. Normalise the input as in training, or "
                "calibrate with data that covers it."
            )
        values = channels_last(x.detach().cpu().to(torch.float64).numpy())
        return np.rint(values * 2.0**self.input.frac_bits).astype(np.int64)

    def decode(self, z: np.ndarray) -> torch.Tensor:
        """Real logits (batch, *output_shape) from the output's integers."""
        real = kernels.centred(z, self.output.ring) * 2.0**-self.output.frac_bits
        if real.ndim == 4:
            real = real.transpose(0, 3, 1, 2)
        return torch.from_numpy(np.ascontiguousarray(real)).to(torch.float32)


class _Checked:
    """Every bound and every relation of a plan, checked in the order of its steps.

    Sums grow as the checks go on, so that nothing large is computed on the way.
    """

    def __init__(self, plan: Plan) -> None:
        if plan.version != VERSION:
            raise PlanError(
                f"A plan of version {plan.version}; this is version {VERSION}. Use the "
                "same crypten-espn on both sides."
            )
        self.elements = self.weights = self.work = 0
        self._operations = self._dealt = self._numbered = 0
        shape = plan.input.shape
        if len(shape) == 2:
            raise PlanError("An input has 1 or 3 dimensions beside the batch.")
        first = plan.input
        if first.bound * 2.0**first.frac_bits >= 2.0 ** (first.ring - 1):
            raise PlanError(
                f"An input up to {first.bound:.4g} does not fit {first.ring} bits."
            )
        self._shapes: list[Shape] = [(*shape[1:], shape[0])]
        self._rings = [first.ring]
        self._count(math.prod(shape), "the input")
        for number, step in enumerate(plan.steps):
            place = f"step {number}"
            result = self._expression(step.root, step.ring, place)
            self._activation(step.activation, step.ring, place)
            dealt = 2 * step.activation.values * math.prod(result)
            self._dealt += dealt
            if dealt > MAX_STEP_DEALT or self._dealt > MAX_DEALT:
                raise PlanError(
                    f"{place}: {dealt:,} words from the dealer, {self._dealt:,} so "
                    f"far; a step may have {MAX_STEP_DEALT:,}, all {MAX_DEALT:,}."
                )
            self._shapes.append(result)
            self._rings.append(step.activation.ring)
        self._expression(plan.output.root, plan.output.ring, "the output")
        if plan.output.noise_bits > plan.output.ring - 3:
            raise PlanError("The output's noise leaves nothing of its ring.")

    def _count(self, elements: int, place: str) -> None:
        self.elements += elements
        if elements > MAX_VALUE or self.elements > MAX_ELEMENTS:
            raise PlanError(
                f"{place}: {elements:,} elements, {self.elements:,} so far; "
                f"{MAX_VALUE:,} in one value and {MAX_ELEMENTS:,} in all are allowed."
            )

    def _expression(self, root: Operation, ring: int, place: str) -> Shape:
        if root.depth > MAX_DEPTH:
            raise PlanError(
                f"{place}: operations {root.depth} deep; {MAX_DEPTH} are allowed."
            )
        return self._operation(root, ring, place, below=False)

    def _operation(
        self, node: Operation, ring: int, place: str, *, below: bool
    ) -> Shape:
        """Check one operation after its inputs; `below` a weight there is no other."""
        self._operations += 1
        if self._operations > MAX_OPERATIONS:
            raise PlanError(f"{place}: more than {MAX_OPERATIONS:,} operations.")
        if isinstance(node, Read):
            if node.source >= len(self._shapes):
                raise PlanError(f"{place}: reads source {node.source}, a later one.")
            if ring > self._rings[node.source] or node.multiplier >> ring:
                raise PlanError(
                    f"{place}: a ring of {ring} bits, wider than its source's "
                    f"{self._rings[node.source]} or narrower than a multiplier."
                )
            # A multiplied source is a value of its own; every read is a pass over it.
            self._count(math.prod(self._shapes[node.source]), place)
            return self._shapes[node.source]
        if isinstance(node, Conv):
            if below:
                raise PlanError(f"{place}: a weight reads another without an opening.")
            below = True
        shapes = [
            self._operation(child, ring, place, below=below) for child in node.inputs
        ]
        try:
            shape = node.output_shape(shapes)
        except PlanError as error:
            raise PlanError(f"{place}: {error}") from None
        if isinstance(node, Conv | Pool | Pad) and len(shapes[0]) == 3:
            top, left, bottom, right = node.pads
            height, width, channels = shapes[0]
            padded = (height + top + bottom) * (width + left + right) * channels
            self._count(padded, place)
        self._count(math.prod(shape), place)
        if isinstance(node, Conv):
            self._weight(node, shapes[0], place)
            each = math.prod(node.weight_shape(shapes[0][-1])) // node.filters
            self._pass(math.prod(shape) * each, place)
        elif isinstance(node, Pool):
            self._pass(math.prod(shape) * math.prod(node.kernel), place)
        return shape

    def _weight(self, node: Conv, before: Shape, place: str) -> None:
        if node.weight != self._numbered:
            raise PlanError(f"{place}: weights out of order, {node.weight}.")
        self._numbered += 1
        self.weights += math.prod(node.weight_shape(before[-1]))
        if self.weights > MAX_WEIGHTS:
            raise PlanError(
                f"{place}: {self.weights:,} weights so far; a plan may have "
                f"{MAX_WEIGHTS:,}."
            )

    def _pass(self, work: int, place: str) -> None:
        self.work += work
        if self.work > MAX_WORK:
            raise PlanError(
                f"{place}: {self.work:,} multiplications and additions so far; "
                f"{MAX_WORK:,} are allowed."
            )

    def _activation(self, act: Activation, ring: int, place: str) -> None:
        if act.linear is None and not act.groups:
            raise PlanError(f"{place}: a polynomial without a power.")
        for group in act.groups:
            if not 0 <= group.shift <= ring - 3:
                raise PlanError(f"{place}: drops {group.shift} of {ring} bits.")
            if group.coeffs[0] != 0:
                raise PlanError(f"{place}: a group's constant stands apart.")
        if act.linear is not None:
            # The client receives what lies above the mask's shift; nothing that the
            # linear term rounds by may be among it.
            limit = act.shifts(ring)[0] if act.groups else ring - 3
            if act.linear.shift > limit:
                raise PlanError(
                    f"{place}: the linear term drops {act.linear.shift} bits, its mask "
                    f"hides {limit}."
                )
        if act.value_frac_bits > VALUE_RING - 2:
            raise PlanError(f"{place}: {act.value_frac_bits} fractional bits.")


def part_shape(plan: Plan, number: int) -> Shape:
    """The shape of linear part `number` without the batch."""
    if number < len(plan.steps):
        return plan.shapes[number + 1]
    return plan.logits_shape


def channels_last(values: np.ndarray) -> np.ndarray:
    """(batch, c, h, w) to (batch, h, w, c); (batch, n) stays."""
    if values.ndim == 4:
        values = values.transpose(0, 2, 3, 1)
    return np.ascontiguousarray(values)


def wrapped(value: int) -> int:
    """The int64 congruent to `value` modulo 2**64."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value
