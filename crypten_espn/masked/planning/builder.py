"""Chooses the scales of a cut network and writes its plan.

Each linear part gets the scale its largest value allows; the bits are split between
weights and activations where rounded weights, rounded activations and the polynomial's
own truncations together move the output least.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ...errors import PlanError
from ..linear import Add, Concat, Conv, Expression, Flatten, Pad, Pool, Read
from ..model import PartReport, PlanReport
from ..plan import (
    INPUT,
    VALUE_RING,
    VERSION,
    Activation,
    Input,
    Output,
    Plan,
    Step,
)
from ..weights import Quantisation
from .calibration import Calibration
from .network import RESCALED, Layer, last_pads, layer_title, pads_of, pair
from .precision import Truncations, choose_truncations, shifted

_FRAC_BITS = range(2, 31)


@dataclass(frozen=True)
class _Unit:
    """Integers stand for real * 2**bits * ratio."""

    bits: int
    ratio: float = 1.0

    @property
    def factor(self) -> float:
        return 2.0**self.bits * self.ratio


@dataclass(frozen=True)
class _Place:
    """Where a source is read.

    Args:
        layer: the layer with weights that reads it, or itself if there is none.
        weighted: whether there is one.
        window: elements pooled on the way from the source to the part's end.
    """

    layer: Layer
    weighted: bool
    window: int

    @property
    def spent(self) -> int:
        """Bits of the part's scale that this source cannot have.

        A pool adds up its window, so 1 / window is left to the weights, of which three
        bits have to remain; without weights a public multiplier stands for it: exact
        for a power of two, to ten bits otherwise.
        """
        window = math.ceil(math.log2(self.window))
        if self.weighted:
            return window + 3
        return window + (0 if self.window & (self.window - 1) == 0 else 10)

    def weight_unit(self, scale: int, bits: int) -> float:
        """What one unit of an integer weight is worth, for a source of `bits`."""
        return 2.0 ** (bits - scale) * self.window


class Builder:
    """Chooses scales for a cut network and writes its plan."""

    def __init__(self, calibration: Calibration, *, ring: int, headroom: float) -> None:
        self.calibration = calibration
        self.network = network = calibration.network
        self.ring = ring
        self.headroom = headroom
        # x = D + t must hold in the linear ring: 64 - drop = ring.
        self.drop = VALUE_RING - ring
        self.source_of = {network.input: INPUT}
        self.ends: list[str] = []
        for name in network.order:
            if network.layers[name].kind == "activation":
                self.ends.append(network.layers[name].inputs[0])
                self.source_of[name] = len(self.ends)
        self.ends.append(network.output)
        self.weights: list[Quantisation] = []
        self.bounds = [self._bound(i) for i in range(len(self.ends))]
        self.scales = [self._scale(i) for i in range(len(self.ends))]
        self.frac_bits = self._choose_frac_bits()

    def _activation(self, index: int) -> Layer | None:
        names = [n for n, source in self.source_of.items() if source == index + 1]
        return self.network.layers[names[0]] if names else None

    def _bound(self, index: int) -> float:
        """Headroom times the largest value seen, and at least the interval."""
        seen = self.network.layers[self.ends[index]].largest
        act = self._activation(index)
        bound = self.headroom * seen
        if (
            act is not None
            and act.polynomial is not None
            and not act.name.endswith(RESCALED)
        ):
            bound = max(bound, 1.25 * max(map(abs, act.polynomial.interval)))
        return max(bound, 2.0**-4)

    def _scale(self, index: int) -> int:
        scale = math.floor(self.ring - 2 - math.log2(self.bounds[index]))
        if scale < 12:
            raise PlanError(
                f"{self.title(index)}: values up to {self.bounds[index]:.4g} leave "
                f"{scale} fractional bits in a ring of {self.ring}. Use "
                'precision="high", a wider ring, or train with a range penalty.'
            )
        return scale

    def title(self, index: int) -> str:
        act = self._activation(index)
        return "output" if act is None else layer_title(act.name)

    # -- choosing the scale of each source

    def _readers(self, name: str, index: int) -> Iterator[_Place]:
        """Every place where a part reads a source."""
        stack: list[tuple[str, Layer | None, int]] = [(self.ends[index], None, 1)]
        while stack:
            value, above, window = stack.pop()
            layer = self.network.layers[value]
            if value == name:
                yield _Place(above or layer, above is not None, window)
            elif layer.kind not in ("activation", "input"):
                here = layer if layer.kind in ("conv", "gemm") else above
                if layer.kind.endswith("pool"):
                    window *= self._window(layer)
                stack += [(child, here, window) for child in layer.inputs]

    def _choose_frac_bits(self) -> list[int]:
        names = sorted(self.source_of, key=self.source_of.__getitem__)
        return [self._choose(name) for name in names]

    def _choose(self, name: str) -> int:
        """The bits at which the output is moved least, over all readers."""
        places = [
            (place, self.scales[index])
            for index in range(len(self.ends))
            for place in self._readers(name, index)
        ]
        limit = min((scale - place.spent for place, scale in places), default=16)
        best, best_error = 0, math.inf
        largest = self._largest_source(name)
        layer = self.network.layers[name]
        for bits in _FRAC_BITS:
            if bits > limit or largest * 2.0**bits >= 2.0 ** (self.ring - 2):
                break
            if layer.polynomial is None:
                error = self.calibration.input_error(bits)
            else:
                error = layer.effect.rounding * 2.0 ** (-2 * bits) / 6
                found = self._truncations(name, bits)
                error += found.by_coins + found.by_coefficients
            for place, scale in places:
                if place.weighted:
                    unit = place.weight_unit(scale, bits)
                    error += place.layer.weight_effect * unit**2 / 12
            if error < best_error:
                best, best_error = bits, error
        if best == 0:
            raise PlanError(
                f"{layer_title(name)}: values up to {largest:.4g} do not fit a ring of "
                f"{self.ring} bits. Use a wider ring or train with a range penalty."
            )
        return best

    def _truncations(self, name: str, bits: int) -> Truncations:
        """An activation's truncations when its result keeps `bits`."""
        layer = self.network.layers[name]
        assert layer.polynomial is not None
        return choose_truncations(
            layer.polynomial,
            frac_bits=self.scales[self.source_of[name] - 1],
            value_frac_bits=bits + self.drop,
            effect=layer.effect,
        )

    def _errors(self, place: _Place, scale: int, bits: int) -> float:
        """Variance of z's error by rounded weights, and by a source's rounding."""
        rounding = 2.0 ** (-2 * bits) / 6
        if not place.weighted:
            return rounding
        layer = place.layer
        weight = self.network.parameters[layer.weight].astype(np.float64)
        filters = weight.shape[0]
        depth = weight.size / filters
        square = self.network.layers[layer.inputs[0]].mean_square
        by_weights = depth * square * place.weight_unit(scale, bits) ** 2 / 12
        return by_weights + float(np.square(weight).sum()) / filters * rounding

    def _largest_source(self, name: str) -> float:
        """What a source may reach when its polynomial's input reaches its bound."""
        layer = self.network.layers[name]
        if layer.kind == "input":
            # Public, so rounded up: the largest image is nobody's business.
            return 2.0 ** math.ceil(math.log2(self.headroom * max(layer.largest, 0.5)))
        assert layer.polynomial is not None
        bound = self.bounds[self.source_of[name] - 1]
        grid = np.linspace(-bound, bound, 2001)
        values = np.polynomial.polynomial.polyval(grid, layer.polynomial.coeffs)
        return float(np.abs(values).max()) * 1.01 + 0.01

    # -- writing expressions

    def natural(self, name: str) -> _Unit:
        """The unit a public value has when its sources are read as they are."""
        if name in self.source_of:
            return _Unit(self.frac_bits[self.source_of[name]])
        layer = self.network.layers[name]
        units = [self.natural(child) for child in layer.inputs]
        unit = max(units, key=lambda u: u.factor)
        if any(not (unit.factor / u.factor).is_integer() for u in units):
            # No whole multiplier brings one input to the other's unit: go finer.
            unit = _Unit(unit.bits + 10, unit.ratio)
        if layer.kind.endswith("pool"):
            unit = self._pooled(layer, unit)
        return unit

    def _pooled(self, layer: Layer, unit: _Unit) -> _Unit:
        """A sum over a window counts as the mean of integers in a finer unit."""
        count = self._window(layer)
        twos = (count & -count).bit_length() - 1
        return _Unit(unit.bits + twos, unit.ratio * (count >> twos))

    def _window(self, layer: Layer) -> int:
        shape = self.network.layers[layer.inputs[0]].shape
        return math.prod(self.network.pool(layer, shape)[0])

    def write(self, name: str, unit: _Unit) -> Expression:
        """The expression whose integers stand for the value in the given unit."""
        title = layer_title(name)
        if name in self.source_of:
            index = self.source_of[name]
            exact = unit.factor / 2.0 ** self.frac_bits[index]
            multiplier = round(exact)
            if multiplier < 1 or abs(multiplier / exact - 1) > 2.0**-9:
                raise PlanError(
                    f"{title}: its scale of {self.frac_bits[index]} bits cannot be "
                    "brought to that of the layer it is added to. Use a wider ring."
                )
            return Read(index, multiplier)
        layer = self.network.layers[name]
        if layer.kind in ("conv", "gemm"):
            return self._write_weighted(layer, title, unit)
        if layer.kind.endswith("pool"):
            before = self.network.layers[layer.inputs[0]].shape
            kernel, stride, pads = self.network.pool(layer, before)
            finer = _Unit(unit.bits, unit.ratio / math.prod(kernel))
            return Pool(self.write(layer.inputs[0], finer), kernel, stride, pads)
        children = tuple(self.write(child, unit) for child in layer.inputs)
        if layer.kind == "pad":
            return Pad(children[0], last_pads(layer.module.padding))
        if layer.kind == "flatten":
            return Flatten(children[0])
        return Add(children) if layer.kind == "add" else Concat(children)

    def _write_weighted(self, layer: Layer, title: str, unit: _Unit) -> Expression:
        network = self.network
        below = self.natural(layer.inputs[0])
        child = self.write(layer.inputs[0], below)
        weight = network.parameters[layer.weight]
        factor = unit.factor / below.factor
        largest = float(np.abs(weight).max()) * factor
        if factor < 8 or largest >= 2.0 ** (self.ring - 1):
            raise PlanError(
                f"{title}: its weights would keep {math.log2(factor):.0f} "
                f"fractional bits in a ring of {self.ring}. Use a wider ring."
            )
        number = len(self.weights)
        self.weights.append(
            Quantisation(title, layer.weight, layer.bias, factor, unit.factor)
        )
        if layer.kind == "gemm":
            shape = network.layers[layer.inputs[0]].shape
            if len(shape) != 1:
                raise PlanError(
                    f"{title}: a linear layer on values of {len(shape) + 1} "
                    "dimensions; flatten them first, or use a 1x1 convolution."
                )
            return Conv(child, number, len(network.matrix(layer)))
        return Conv(
            child,
            number,
            int(weight.shape[0]),
            (int(weight.shape[2]), int(weight.shape[3])),
            pair(layer.module.stride),
            pair(layer.module.dilation),
            pads_of(layer.module.padding),
            int(layer.module.groups),
        )

    # -- the polynomial

    def activation(self, index: int) -> Activation:
        layer = self._activation(index)
        assert layer is not None and layer.polynomial is not None
        polynomial = layer.polynomial
        frac_bits = self.frac_bits[index + 1]
        value_frac_bits = frac_bits + self.drop
        found = self._truncations(layer.name, frac_bits)
        largest = self._largest_source(layer.name)
        if largest * 2.0**value_frac_bits >= 2.0 ** (VALUE_RING - 2):
            raise PlanError(
                f"{layer_title(layer.name)}: the polynomial reaches {largest:.4g}, too "
                f"large at {value_frac_bits} fractional bits in a ring of {VALUE_RING}."
            )
        return Activation(
            found.linear,
            found.groups,
            shifted(polynomial.numerators[0], value_frac_bits - polynomial.frac_bits),
            self.drop,
            frac_bits,
        )

    # -- the whole plan

    def build(self) -> tuple[Plan, PlanReport]:
        roots, known = [], []
        for index, end in enumerate(self.ends):
            roots.append(self.write(end, _Unit(self.scales[index])))
            variance = sum(
                self._errors(place, self.scales[index], self.frac_bits[source])
                for name, source in self.source_of.items()
                for place in self._readers(name, index)
            )
            known.append(
                PartReport(
                    self.title(index),
                    self.bounds[index],
                    self.network.layers[end].largest,
                    math.sqrt(variance),
                )
            )
        coins, total = self._logits_variance()
        scale = self.scales[-1]
        noise_bits = 0
        if coins > 0:
            noise_bits = max(0, math.ceil(2 + math.log2(math.sqrt(coins)) + scale))
        noise = math.ldexp(1.0, 2 * (noise_bits - scale)) / 12 if noise_bits else 0.0
        shape = tuple(self.network.layers[self.network.input].shape)
        bound = self._largest_source(self.network.input)
        steps = tuple(
            Step(root, self.ring, self.scales[index], self.activation(index))
            for index, root in enumerate(roots[:-1])
        )
        try:
            plan = Plan(
                VERSION,
                Input(shape, self.ring, self.frac_bits[INPUT], bound),
                steps,
                Output(roots[-1], self.ring, scale, noise_bits),
            )
        except PlanError as error:
            raise PlanError(self._named(str(error))) from None
        self._compare_shapes(plan)
        report = PlanReport(
            tuple(known),
            tuple(self.weights),
            math.sqrt(total + noise),
            math.sqrt(coins),
        )
        return plan, report

    def _named(self, text: str) -> str:
        """A plan's complaint with the layer's name for the step's number."""
        found = re.match(r"step (\d+)(?=:)", text)
        if found is None:
            return text
        return self.title(int(found[1])) + text[found.end() :]

    def _compare_shapes(self, plan: Plan) -> None:
        """What the plan computes has the shapes that calibration saw."""
        shapes = (*plan.shapes[1:], plan.logits_shape)
        for index, (end, shape) in enumerate(zip(self.ends, shapes, strict=True)):
            if self.network.hwc(end) != shape:
                raise PlanError(
                    f"{self.title(index)}: the plan computes values of shape {shape}, "
                    f"the network {self.network.hwc(end)}."
                )

    def _logits_variance(self) -> tuple[float, float]:
        """Variance of a logit's error by coins alone, and by all roundings.

        Effects count all logits together; no logit has more than all, and hardly one
        has more than twice the average.
        """
        coins = other = 0.0
        for name, source in self.source_of.items():
            layer, bits = self.network.layers[name], self.frac_bits[source]
            if layer.polynomial is None:
                other += self.calibration.input_error(bits)
            else:
                found = self._truncations(name, bits)
                coins += layer.effect.rounding * 2.0 ** (-2 * bits) / 6
                coins += found.by_coins
                other += found.by_coefficients
            for index in range(len(self.ends)):
                for place in self._readers(name, index):
                    if place.weighted:
                        unit = place.weight_unit(self.scales[index], bits)
                        other += place.layer.weight_effect * unit**2 / 12
        share = min(1.0, 2.0 / self.calibration.outputs)
        return coins * share, (coins + other) * share
