"""What a plan says is checked: its bounds, and how its numbers belong together."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..errors import DataError, PlanError
from ..pillar.guarding import check_channels
from .linear import (
    Conv,
    Mix,
    Move,
    Operation,
    Pad,
    Pool,
    Read,
    Shape,
    shape_of,
)
from .products import Factors, dealt_words
from .steps import VALUE_RING, Activation, Product, Step

if TYPE_CHECKING:
    from .plan import Plan

VERSION = 7
MAX_TEXT = 1 << 24
PLAN_BYTES = 4 << 20  # of a plan's text, as parties take it from another
MAX_DEPTH = 100
MAX_OPERATIONS = 1 << 16
MAX_VALUE = 1 << 26  # elements of one value of one input, pads included
MAX_ELEMENTS = 1 << 28  # of all values of one input
MAX_STEP_DEALT = 1 << 27  # words from the dealer for one step of one input
MAX_DEALT = 1 << 29  # of all steps
MAX_WEIGHTS = 1 << 28
MAX_WINDOW = 1 << 12  # values that are summed before a second opening
MAX_COEFFS = 1 << 22  # of all polynomials, each channel as long as the longest group
MAX_WORK = 1 << 42  # multiplications and additions of one input


class Checked:
    """Every bound and every relation of a plan, checked in the order of its steps.

    Sums grow as the checks go on, so that nothing large is computed on the way.
    """

    def __init__(self, plan: Plan) -> None:
        if plan.version != VERSION:
            raise PlanError(
                f"A plan of version {plan.version}; this is version {VERSION}. Use the "
                "same crypten-espn on both sides."
            )
        self.elements = self.weights = self.work = self.coeffs = 0
        self._operations = self._dealt = self._numbered = 0
        shape = plan.input.shape
        first = plan.input
        if first.bound * 2.0**first.frac_bits >= 2.0 ** (first.ring - 1):
            raise PlanError(
                f"An input up to {first.bound:.4g} does not fit {first.ring} bits."
            )
        if first.guard is not None:
            try:
                check_channels(first.guard.read(), shape)
            except DataError as error:
                raise PlanError(f"The input's guard: {error}.") from None
        self._shapes: list[Shape] = [(*shape[1:], shape[0])]
        self._rings = [first.ring]
        self._count(math.prod(shape), "the input")
        for number, step in enumerate(plan.steps):
            place = f"step {number}"
            result = self._expression(step.root, step.ring, place)
            act = step.activation
            if isinstance(act, Product):
                result, dealt = self._product(step, act, place)
            elif isinstance(step.root, Factors):
                raise PlanError(f"{place}: a polynomial of two factors.")
            else:
                self._activation(act, step.ring, place)
                self._columns(act, result[-1], place)
                dealt = act.words * math.prod(result)
                result = self._pooled(act, result, place)
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
        self._measure(node, shapes, shape, place)
        return shape

    def _measure(
        self, node: Operation, shapes: list[Shape], shape: Shape, place: str
    ) -> None:
        """Count what an operation computes, and its weights."""
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
        elif isinstance(node, Move):
            self._pass(node.moved, place)
        elif isinstance(node, Mix):
            between = math.prod(node.between(shapes[0]))
            self._count(between, place)
            taps = [max(len(w) for _, w in side) for side in (node.rows, node.columns)]
            self._pass(between * taps[0] + math.prod(shape) * taps[1], place)
        elif isinstance(node, Pool):
            self._pass(math.prod(shape) * math.prod(node.kernel), place)

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
            if any(row[0] for row in group.coeffs):
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

    def _pooled(self, act: Activation, shape: Shape, place: str) -> Shape:
        """The shape of a polynomial's result: its values', or that of their sums."""
        if act.pool is None:
            return shape
        if len(shape) != 3 or any(
            size % window for size, window in zip(shape, act.pool, strict=False)
        ):
            raise PlanError(
                f"{place}: windows of {'x'.join(map(str, act.pool))} do not cover "
                f"{'x'.join(map(str, shape))} side by side."
            )
        if not 1 < math.prod(act.pool) <= MAX_WINDOW:
            raise PlanError(
                f"{place}: windows of {math.prod(act.pool):,} values; 2 to "
                f"{MAX_WINDOW:,} are summed."
            )
        result = act.pooled(shape)
        self._count(math.prod(result), place)
        self._pass(math.prod(shape), place)
        return result

    def _product(self, step: Step, act: Product, place: str) -> tuple[Shape, int]:
        """The product's shape, and the words that the dealer sends for one input."""
        if not isinstance(step.root, Factors):
            raise PlanError(f"{place}: a product of one value.")
        if max(act.dropped) > step.ring - 3:
            raise PlanError(f"{place}: drops {max(act.dropped)} of {step.ring} bits.")
        if act.value_frac_bits > VALUE_RING - 2 or act.lift(step.frac_bits) < 0:
            raise PlanError(
                f"{place}: {act.value_frac_bits} fractional bits of a product whose "
                f"factors have {2 * step.frac_bits - sum(act.dropped)} together."
            )
        first, second = (shape_of(factor, self._shapes) for factor in step.root.inputs)
        self._count(math.prod(first), place)
        return first, dealt_words(first, second)

    def _columns(self, act: Activation, channels: int, place: str) -> None:
        """Its numbers are for all channels or each; tables of them stay small."""
        for columns in act.columns:
            if columns not in (1, channels):
                raise PlanError(
                    f"{place}: coefficients of {columns:,} channels for a result of "
                    f"{channels:,}; one for all or one for each is allowed."
                )
        degree = max((group.degree for group in act.groups), default=1)
        for group in act.groups:
            if any(len(row) != group.degree + 1 for row in group.coeffs):
                raise PlanError(f"{place}: channels of different degrees in a group.")
        self.coeffs += max(act.columns) * (act.masks * (degree + 1) + 2)
        if self.coeffs > MAX_COEFFS:
            raise PlanError(
                f"{place}: {self.coeffs:,} coefficients so far; a plan may have "
                f"{MAX_COEFFS:,}."
            )
