"""Chooses the scale of every value of a cut network.

Each linear part gets the scale its largest value allows; the bits are split between
weights and activations where rounded weights, rounded activations and the polynomial's
own truncations together move the output least.
"""

from __future__ import annotations

import math

import numpy as np

from ...errors import PlanError
from ..checks import MAX_OPERATIONS
from ..linear import Pair
from ..plan import INPUT
from ..steps import VALUE_RING
from .calibration import Calibration
from .layers import RESCALED, Layer
from .pools import common_pools
from .precision import Truncations, choose_truncations, radii_of
from .products import Dropped, choose_dropped
from .units import Natural, Public, Readings, Unit, Weighing

FRAC_BITS = range(2, 31)
# The fractional bits of a linear part, and the bits of a layer's largest weight, below
# which a plan is refused.
LEAST_SCALE = 12
LEAST_WEIGHT_BITS = 3
# A public multiplier is rounded to a whole number; further off than this it is refused.
_MULTIPLIER_ERROR = 2.0**-7
# How far beyond what calibration reached a polynomial's input may go at least; its
# interval holds it too.
_BEYOND = 1.25
# What room for more may cost: mean squares of errors, by factor.
_ROOM = 1.5


class NarrowError(PlanError):
    """A network that has no plan in this ring, but may have one in a wider."""


class Scales:
    """The scales of a cut network.

    Args:
        calibration: of the network.
        ring, headroom: as `make_plan`.
        room: standard deviation of a logit's error; powers share a truncation where
            all their errors together keep that. 0 if they need not.

    Attributes:
        source_of: numbers of the input and the activations, by name.
        ends: names of the values that end the linear parts.
        bounds, scales: by part: the largest |z| allowed for, and z's fractional bits.
        reaches: by part, the largest |z| allowed for by the activation's channels.
        frac_bits: by source.
        pools: windows by activation whose sums are opened, and not its elements.

    Raises: NarrowError naming the layer whose values or weights do not fit the ring.
    """

    def __init__(
        self,
        calibration: Calibration,
        *,
        ring: int,
        headroom: float,
        room: float = 0.0,
    ) -> None:
        self.calibration = calibration
        self.network = network = calibration.network
        self.ring = ring
        self.headroom = headroom
        # x = D + t must hold in the linear ring: 64 - drop = ring.
        self.drop = VALUE_RING - ring
        self.source_of = {network.input: INPUT}
        self.ends = network.ends
        for name in network.order:
            if network.layers[name].activates:
                self.source_of[name] = len(self.source_of)
        self._names = list(self.source_of)
        activations = max(1, len(self._names) - 1)
        self._room = room**2 * calibration.outputs / activations
        self._naturals: dict[str, Natural] = {}
        self._found: dict[tuple[str, int], Truncations | Dropped | None] = {}
        self.reaches = [self._reach(i) for i in range(len(self.ends))]
        self.bounds = [max(float(r.max()), 2.0**-4) for r in self.reaches]
        self.scales = [self._scale(i) for i in range(len(self.ends))]
        self.readings = Readings()
        self._visits = 0
        for index, end in enumerate(self.ends):
            self._visit(end, index, 1)
        self.frac_bits = [FRAC_BITS[0]] * len(self._names)
        self.pools: dict[str, Pair] = {}
        self._common = common_pools(network)
        # Sources that one layer reads together share its scale: choose, then once more
        # knowing what the others chose.
        for _ in range(2):
            for name in self._names:
                self.frac_bits[self.source_of[name]] = self._settle(name)

    # -- what is where

    def activation(self, index: int) -> Layer | None:
        """The activation after part `index`; None after the last."""
        if index + 1 >= len(self._names):
            return None
        return self.network.layers[self._names[index + 1]]

    def title(self, index: int) -> str:
        """The name of part `index`."""
        act = self.activation(index)
        return "output" if act is None else act.title

    def natural(self, name: str) -> Natural:
        """The unit of a public value."""
        if name not in self._naturals:
            self._naturals[name] = self._natural(name)
        return self._naturals[name]

    def _natural(self, name: str) -> Natural:
        if name in self.source_of:
            return Natural(1, {self.source_of[name]: 0})
        layer = self.network.layers[name]
        below = [self.natural(child) for child in layer.inputs]
        divisor = layer.form.divisor
        twos = (divisor & -divisor).bit_length() - 1
        offsets: dict[int, int] = {}
        for child in below:
            for source, offset in child.offsets.items():
                offsets[source] = max(offset + twos, offsets.get(source, 0))
        ratio = math.lcm(*(child.ratio for child in below)) * (divisor >> twos)
        return Natural(ratio, offsets)

    def unit(self, name: str) -> Unit:
        """The natural unit of a public value at the chosen scales."""
        found = self.natural(name)
        return Unit(found.bits(self.frac_bits), found.ratio)

    def _visit(self, name: str, index: int, divisor: int) -> None:
        self._visits += 1
        if self._visits > MAX_OPERATIONS:
            raise PlanError(
                f"{self.title(index)}: a linear part of more than {MAX_OPERATIONS:,} "
                "operations. Sums of sums are written out; put an activation between."
            )
        if name in self.source_of:
            found = self.readings.public.setdefault(self.source_of[name], [])
            found.append(Public(index, divisor))
            return
        layer = self.network.layers[name]
        if layer.weighted:
            below = self.natural(layer.inputs[0])
            largest = float(np.abs(self.network.parameters[layer.weight]).max())
            weighing = Weighing(layer, index, divisor, below, largest)
            self.readings.weighings.append(weighing)
            return
        for child in layer.inputs:
            self._visit(child, index, divisor * layer.form.divisor)

    # -- parts

    def _reach(self, index: int) -> np.ndarray:
        """Headroom times the largest values seen, and at least the intervals."""
        act = self.activation(index)
        if act is None or act.multiplies:
            seen = self.network.layers[self.ends[index]].largest
            return np.array([self.headroom * seen])
        reach = self.headroom * act.reach
        if act.name.endswith(RESCALED):
            return reach
        return np.maximum(reach, _BEYOND * radii_of(act.rows))

    def _scale(self, index: int) -> int:
        scale = math.floor(self.ring - 2 - math.log2(self.bounds[index]))
        if scale < LEAST_SCALE:
            raise NarrowError(
                f"{self.title(index)}: values up to {self.bounds[index]:.4g} leave "
                f"{scale} fractional bits in a ring of {self.ring}; at least "
                f"{LEAST_SCALE} are needed."
            )
        return scale

    # -- sources

    def _settle(self, name: str) -> int:
        """A source's bits, and whether sums over windows are opened in its place.

        They are where that costs little precision: sums reach further, but are
        truncated once and not at every element.
        """
        self.pools.pop(name, None)
        bits, error = self._choose(name)
        if name not in self._common:
            return bits
        self.pools[name] = self._common[name]
        try:
            pooled, pooled_error = self._choose(name)
        except NarrowError:
            pooled, pooled_error = bits, math.inf
        if pooled_error <= _ROOM * error:
            return pooled
        del self.pools[name]
        return bits

    def summed(self, name: str) -> int:
        """How many of its elements an opened value of a source is the sum of."""
        return math.prod(self.pools.get(name, ()))

    def rounding(self, layer: Layer, bits: int) -> float:
        """What the truncation of an activation's results does to the outputs.

        A sum is truncated once for all its elements, and moves as much as each.
        """
        return layer.effect.rounding * 2.0 ** (-2 * bits) / 6 / self.summed(layer.name)

    def _choose(self, name: str) -> tuple[int, float]:
        """The bits at which the output is moved least, over all readers; the error.

        Of those that leave room for the polynomial of its input's bound, if that costs
        little precision. At high degrees it may be a thousand times what
        the polynomial is on its interval.
        """
        source = self.source_of[name]
        weighings = [
            (one, self._others(one.below, source))
            for one in self.readings.weighings
            if source in one.below.offsets
        ]
        public = self.readings.public.get(source, [])
        best, best_error = 0, math.inf
        roomy, roomy_error = 0, math.inf
        largest, at_bound = self.largest_source(name), self._roomy(name)
        layer = self.network.layers[name]
        why = f"values up to {largest:.4g} do not fit a ring of {self.ring}."
        for bits in FRAC_BITS:
            if largest * 2.0**bits >= 2.0 ** (self.ring - 2):
                break
            error = self._own_error(layer, bits)
            if error is None:
                why = (
                    "a coefficient of its polynomial rounds to 0, or its powers keep "
                    f"too few bits, in a ring of {self.ring}; a lower degree needs "
                    "fewer."
                )
                continue
            for one, others in weighings:
                shared = max(others, bits + one.below.offsets[source])
                factor = self._weight_factor(one, shared)
                if not self._holds(one, factor):
                    why = self._lost(one, factor, layer)
                    error = math.inf
                    break
                error += one.layer.weight_effect / factor**2 / 12
            for reader in public:
                off = self.multiplier_error(reader, bits)
                if off > _MULTIPLIER_ERROR:
                    why = (
                        f"its scale cannot be brought to that of "
                        f"{self.title(reader.part)} in a ring of {self.ring}."
                    )
                    error = math.inf
                    break
                error += self.calibration.factor_error(layer, off)
            if error < best_error:
                best, best_error = bits, error
            if error < roomy_error and at_bound * 2.0**bits < 2.0 ** (self.ring - 2):
                roomy, roomy_error = bits, error
        if best == 0:
            raise NarrowError(why if ": " in why else f"{layer.title}: {why}")
        if roomy_error <= _ROOM * best_error:
            return roomy, roomy_error
        return best, best_error

    def _others(self, below: Natural, source: int) -> int:
        rest = {s: o for s, o in below.offsets.items() if s != source}
        return max((self.frac_bits[s] + o for s, o in rest.items()), default=0)

    def _own_error(self, layer: Layer, bits: int) -> float | None:
        """What a source's own rounding does to the outputs."""
        if not layer.activates:
            return self.calibration.input_error(bits)
        found = self.truncations(layer.name, bits)
        if found is None:
            return None
        rounding = self.rounding(layer, bits)
        return rounding + found.by_coins + found.by_coefficients

    def _weight_factor(self, one: Weighing, bits: int) -> float:
        """Integers are round(weight * factor) when the layer's input has these bits."""
        ratio = one.divisor * one.below.ratio
        return 2.0 ** (self.scales[one.part] - bits) / ratio

    def _holds(self, one: Weighing, factor: float) -> bool:
        """Whether a layer's weights survive their rounding and fit the ring."""
        most = one.largest * factor
        return most == 0 or 2.0**LEAST_WEIGHT_BITS <= most < 2.0 ** (self.ring - 1)

    def _lost(self, one: Weighing, factor: float, source: Layer) -> str:
        bits = math.log2(one.largest * factor)
        return (
            f"{one.layer.title}: its largest weight, {one.largest:.4g}, would have "
            f"{bits:.0f} bits in a ring of {self.ring}, {LEAST_WEIGHT_BITS} to "
            f"{self.ring - 2} are possible; it reads {source.title}, values up to "
            f"{self.largest_source(source.name):.4g}."
        )

    def multiplier_error(self, reader: Public, bits: int) -> float:
        """How far a public multiplier is off, relatively, when it is rounded."""
        exact = 2.0 ** (self.scales[reader.part] - bits) / reader.divisor
        whole = round(exact)
        if not 1 <= whole < 2 ** (self.ring - 1):
            return math.inf
        return abs(whole / exact - 1)

    def truncations(self, name: str, bits: int) -> Truncations | Dropped | None:
        """A step's truncations if its result keeps `bits`; None if it cannot."""
        key = (name, bits)
        if key not in self._found:
            layer = self.network.layers[name]
            part = self.source_of[name] - 1
            if layer.multiplies:
                self._found[key] = choose_dropped(
                    layer,
                    ring=self.ring,
                    frac_bits=self.scales[part],
                    result_bits=bits,
                    value_frac_bits=bits + self.drop,
                )
                return self._found[key]
            self._found[key] = choose_truncations(
                layer.rows,
                ring=self.ring,
                frac_bits=self.scales[part],
                result_bits=bits,
                effect=layer.effect,
                room=self._room,
            )
        return self._found[key]

    def largest_source(self, name: str) -> float:
        """What a source may reach, over a little more than its intervals and inputs."""
        layer = self.network.layers[name]
        if layer.kind is None:
            # Public, so rounded up: the largest image is nobody's business.
            return 2.0 ** math.ceil(math.log2(self.headroom * max(layer.largest, 0.5)))
        if layer.multiplies:
            return _largest_product(layer, _BEYOND)
        reaches = self.reaches[self.source_of[name] - 1]
        if not name.endswith(RESCALED):
            near = np.maximum(_BEYOND * layer.reach, radii_of(layer.rows))
            reaches = np.minimum(reaches, near)
        return self.summed(name) * _largest(layer, reaches)

    def _roomy(self, name: str) -> float:
        """What a source reaches when its polynomial's input reaches its bound."""
        layer = self.network.layers[name]
        if layer.kind is None:
            return self.largest_source(name)
        if layer.multiplies:
            return _largest_product(layer, self.headroom)
        reaches = self.reaches[self.source_of[name] - 1]
        return self.summed(name) * _largest(layer, reaches)


def _largest(layer: Layer, reaches: np.ndarray) -> float:
    """The largest |p(x)| of an activation, each channel up to its reach."""
    largest = 0.0
    for row, reach in zip(layer.rows, reaches, strict=True):
        grid = np.linspace(-reach, reach, 2001)
        values = np.polynomial.polynomial.polyval(grid, row.coeffs)
        largest = max(largest, float(np.abs(values).max()))
    return largest * 1.01 + 0.01


def _largest_product(layer: Layer, beyond: float) -> float:
    """The largest product when both factors go so far beyond what was seen."""
    return beyond**2 * layer.largest * 1.01 + 0.01
