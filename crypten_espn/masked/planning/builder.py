"""Writes the plan of a cut network at its scales."""

from __future__ import annotations

import math
import re

import numpy as np

from ...errors import PlanError
from ..checks import VERSION
from ..linear import Expression, Read
from ..model import PartReport, PlanReport
from ..plan import INPUT, Plan
from ..products import Factors
from ..steps import VALUE_RING, Activation, Guard, Input, Output, Product, Step
from ..weights import Quantisation
from .coins import largest_deviation
from .layers import Layer
from .pools import of_sums
from .products import Dropped, Row
from .remains import check_powers, logits_error, part_error
from .scales import NarrowError, Scales
from .units import Unit

# The noise on the logits is 1 to 2 times so many standard deviations of what coins do
# to the logit that they move most.
_NOISE = 4.2
# A bias has to be a whole number that float64 and int64 hold.
_MAX_BIAS = 2.0**62


class Builder:
    """Writes the plan of a cut network."""

    def __init__(self, scales: Scales) -> None:
        self.scales = scales
        self.network = scales.network
        self.weights: list[Quantisation] = []

    # -- expressions

    def root(self, index: int) -> Expression | Factors:
        """The expression that ends part `index`, at its scale."""
        unit, end = Unit(self.scales.scales[index]), self.scales.ends[index]
        layer = self.network.layers[end]
        if isinstance(layer.kind, Row):
            first, second = (self.write(child, unit) for child in layer.inputs)
            return Factors(first, second)
        return self.write(end, unit)

    def write(self, name: str, unit: Unit) -> Expression:
        """The expression whose integers stand for the value in the given unit."""
        layer = self.network.layers[name]
        if name in self.scales.source_of:
            source = self.scales.source_of[name]
            multiplier = round(unit.factor / 2.0 ** self.scales.frac_bits[source])
            return Read(source, multiplier)
        if layer.weighted:
            return self._write_weighted(layer, unit)
        finer = Unit(unit.bits, unit.ratio / layer.form.divisor)
        children = [self.write(child, finer) for child in layer.inputs]
        if any(child in self.scales.pools for child in layer.inputs):
            return of_sums(layer, children)
        assert layer.form.write is not None
        return layer.form.write(children, 0)

    def _write_weighted(self, layer: Layer, unit: Unit) -> Expression:
        below = self.scales.unit(layer.inputs[0])
        child = self.write(layer.inputs[0], below)
        factor = unit.factor / below.factor
        if layer.bias:
            bias = float(np.abs(self.network.parameters[layer.bias]).max())
            if bias * unit.factor >= _MAX_BIAS:
                raise NarrowError(
                    f"{layer.title}: a bias of {bias:.4g}, {unit.factor:.4g} units of "
                    f"its ring of {self.scales.ring} each, does not fit 62 bits."
                )
        number = len(self.weights)
        self.weights.append(
            Quantisation(layer.title, layer.weight, layer.bias, factor, unit.factor)
        )
        assert layer.form.write is not None
        return layer.form.write([child], number)

    # -- the polynomial, or the product

    def activation(self, index: int) -> Activation | Product:
        """What follows part `index`.

        Raises: NarrowError if its values do not fit.
        """
        scales = self.scales
        layer = scales.activation(index)
        assert layer is not None
        frac_bits = scales.frac_bits[index + 1]
        value_frac_bits = frac_bits + scales.drop
        found = scales.truncations(layer.name, frac_bits)
        assert found is not None
        largest = scales.largest_source(layer.name)
        if largest * 2.0**value_frac_bits >= 2.0 ** (VALUE_RING - 2):
            raise NarrowError(
                f"{layer.title}: its value reaches {largest:.4g}, too large at "
                f"{value_frac_bits} fractional bits in a ring of {VALUE_RING}."
            )
        if isinstance(found, Dropped):
            return Product(scales.drop, frac_bits, dropped=found.bits)
        return Activation(
            scales.drop,
            frac_bits,
            linear=found.linear,
            groups=found.groups,
            constant=found.constant,
            pool=scales.pools.get(layer.name),
        )

    # -- the whole plan

    def build(self) -> tuple[Plan, PlanReport]:
        """The plan and what its owner may know beside.

        Raises: PlanError naming the layer that does not fit, or whose shape the plan
            would not compute.
        """
        scales, ends = self.scales, self.scales.ends
        *roots, last = (self.root(index) for index in range(len(ends)))
        assert not isinstance(last, Factors)
        check_powers(scales)
        coins, error = logits_error(scales, self.weights)
        deviation, noise_bits = largest_deviation(scales, coins), 0
        if not math.isfinite(deviation):
            raise PlanError(
                "The output: rounding makes some logits too large for any number. "
                "Calibrate or train with polynomials of a lower degree."
            )
        if deviation > 0:
            bits = math.log2(_NOISE * deviation) + scales.scales[-1]
            noise_bits = max(0, math.ceil(bits))
            error = math.hypot(error, 2.0 ** (noise_bits - scales.scales[-1]) / 12**0.5)
        steps = tuple(
            Step(root, scales.ring, scales.scales[index], self.activation(index))
            for index, root in enumerate(roots)
        )
        taken = Input(
            tuple(self.network.layers[self.network.input].shape),
            scales.ring,
            scales.frac_bits[INPUT],
            scales.largest_source(self.network.input),
            None if self.network.guard is None else Guard.of(self.network.guard),
        )
        output = Output(last, scales.ring, scales.scales[-1], noise_bits)
        try:
            plan = Plan(VERSION, taken, steps, output)
        except PlanError as error_:
            raise PlanError(self._named(str(error_))) from None
        self._compare_shapes(plan)
        parts = tuple(
            PartReport(
                scales.title(index),
                scales.bounds[index],
                self.network.layers[end].largest,
                part_error(scales, index, self.weights),
            )
            for index, end in enumerate(ends)
        )
        inputs = scales.calibration.inputs
        return plan, PlanReport(parts, tuple(self.weights), error, coins, inputs)

    def _named(self, text: str) -> str:
        """A plan's complaint with the layer's name for the step's number."""
        found = re.match(r"step (\d+)(?=:)", text)
        if found is None:
            return text
        return self.scales.title(int(found[1])) + text[found.end() :]

    def _compare_shapes(self, plan: Plan) -> None:
        """What the plan computes has the shapes that calibration saw."""
        for index, (end, shape) in enumerate(
            zip(self.scales.ends, plan.part_shapes, strict=True)
        ):
            if self.network.hwc(end) != shape:
                raise PlanError(
                    f"{self.scales.title(index)}: the plan computes values of shape "
                    f"{shape}, the network {self.network.hwc(end)}."
                )
