"""From a converted network to its plan: bounds, scales and truncations.

1. Read the crypten.nn.Graph and run it in float64 on the calibration inputs; note how
   large values get, and how far an error in them or in a weight moves the output.
2. Cut it into linear segments at its activations.
3. Give each segment the scale its largest value allows, and split the bits between
   weights and activations where rounded weights, rounded activations and the
   polynomial's own truncations together move the output least.
4. Choose for every power of a polynomial the truncation that costs least precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ...errors import PlanError
from ...polynomial import Polynomial
from ..plan import (
    INPUT,
    RING_LIMITS,
    Activation,
    Expression,
    Plan,
    Segment,
    Source,
    WeightSpec,
)
from .precision import (
    NO_EFFECT,
    Effect,
    choose_groups,
    evaluation_error,
    measured_effect,
    shifted,
)

VALUE_RING = 64
# The linear ring of each named precision. At most 32 bits: int32 kernels, fewer bytes.
PRECISIONS = {"fast": 32, "high": 40}
HEADROOM = 4.0
_FRAC_BITS = range(2, 31)
_RESCALED = ":rescaled"
_EFFECT_IMAGES, _EFFECT_SIGNS = 8, 2


@dataclass
class _Layer:
    """A node of the converted network, and what calibration says of its result.

    Attributes:
        largest, mean_square: of the result.
        effect: of errors of the result, as a function of an activation's input.
        weight_effect: the outputs' mean square error when every weight is off by 1,
            its sign random.
    """

    name: str
    kind: str
    inputs: list[str]
    shape: tuple[int, ...] = ()
    weight: str = ""
    bias: str = ""
    module: Any = None
    polynomial: Polynomial | None = None
    largest: float = 0.0
    mean_square: float = 0.0
    effect: Effect = NO_EFFECT
    weight_effect: float = 0.0


_KINDS = {
    "Conv": "conv",
    "Conv2d": "conv",
    "Gemm": "gemm",
    "Linear": "gemm",
    "PolynomialActivation": "activation",
    "Add": "add",
    "AvgPool2d": "pool",
    "GlobalAveragePool": "global_pool",
    "AdaptiveAvgPool2d": "adaptive_pool",
    "Flatten": "flatten",
    "Reshape": "flatten",
    "Concat": "concat",
    "ConstantPad2d": "pad",
    "_ConstantPad": "pad",
    "Dropout": "same",
    "Identity": "same",
}


def parameters_of(graph: Any) -> dict[str, np.ndarray]:
    """The real parameters of a converted, unencrypted crypten.nn.Graph, by name.

    Raises: PlanError if the network is encrypted.
    """
    found = {}
    for name, module in graph._modules.items():
        if type(module).__name__ in ("Parameter", "Constant"):
            data = getattr(module, "data", None)
            if data is None:
                data = module.value
            if not torch.is_tensor(data):
                raise PlanError(
                    f"{name} is encrypted; plan the network before .encrypt(), on the "
                    "party that owns the weights."
                )
            found[name] = data.detach().cpu().numpy()
    return found


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, (tuple, list)):
        items = tuple(int(v) for v in value)
        return (items[0], items[0]) if len(items) == 1 else (items[0], items[1])
    return int(value), int(value)


def _pads(value: Any) -> tuple[int, int, int, int]:
    if isinstance(value, (tuple, list)) and len(value) == 4:
        return tuple(int(v) for v in value)  # type: ignore[return-value]
    top, left = _pair(value)
    return top, left, top, left


def _last_pads(value: Any) -> tuple[int, int, int, int]:
    """torch's (left, right, top, bottom) as (top, left, bottom, right)."""
    items = [int(v) for v in value] + [0] * (4 - len(value))
    left, right, top, bottom = items[:4]
    return top, left, bottom, right


def layer_title(name: str) -> str:
    """A readable layer name from an exporter's value name.

    /stages/stages.0/stages.0.0/relu1/Op_output_0 is stages.0.0.relu1.
    """
    if name.endswith(_RESCALED):
        return f"{layer_title(name.removesuffix(_RESCALED))} (rescaled)"
    parts = [part for part in name.replace("_output_0", "").split("/") if part]
    parts = parts[:-1] if len(parts) > 1 else parts
    kept = [
        part
        for part, after in zip(parts, [*parts[1:], ""], strict=True)
        if not after.startswith(part + ".")
    ]
    return ".".join(kept) or name


class _Reader:
    """Reads a crypten.nn.Graph, runs it in float, and builds the plan's segments."""

    def __init__(self, graph: Any) -> None:
        self.parameters = parameters_of(graph)
        self._tensors: dict[str, torch.Tensor] = {}
        self.layers: dict[str, _Layer] = {}
        if len(graph.input_names) != 1 or len(graph.output_names) != 1:
            raise PlanError("The masked engine takes networks of one input and output.")
        self.input = graph.input_names[0]
        self.output = graph.output_names[0]
        self.order = self._sorted(graph)
        for name in self.order:
            self._read(name, graph._modules[name], list(graph._graph[name]))
        self.output = self._same(self.output)

    def _sorted(self, graph: Any) -> list[str]:
        done = {self.input, *self.parameters}
        waiting = [name for name in graph._graph if name not in done]
        order: list[str] = []
        while waiting:
            ready = [n for n in waiting if all(i in done for i in graph._graph[n])]
            if not ready:
                raise PlanError(f"{layer_title(waiting[0])}: its input is missing.")
            order += ready
            done.update(ready)
            waiting = [name for name in waiting if name not in done]
        return order

    def _same(self, name: str) -> str:
        while name in self.layers and self.layers[name].kind == "same":
            name = self.layers[name].inputs[0]
        return name

    def _read(self, name: str, module: Any, inputs: list[str]) -> None:
        title = type(module).__name__
        kind = _KINDS.get(title)
        if kind is None:
            raise PlanError(
                f"{layer_title(name)}: {title} is not supported by the masked engine. "
                'Convert with protocol="espn", or replace the layer by convolutions, '
                "pools, additions and polynomial activations."
            )
        constants = [i for i in inputs if i in self.parameters]
        values = [self._same(i) for i in inputs if i not in self.parameters]
        layer = _Layer(name, kind, values, module=module)
        if kind in ("conv", "gemm"):
            if len(values) != 1 or not 1 <= len(constants) <= 2:
                raise PlanError(f"{layer_title(name)}: weights must be constants.")
            layer.weight = constants[0]
            layer.bias = constants[1] if len(constants) == 2 else ""
        elif kind == "activation":
            layer.polynomial = module.polynomial
        elif kind == "add" and constants:
            raise PlanError(f"{layer_title(name)}: adding a constant is not supported.")
        self.layers[name] = layer

    # -- float pass

    def calibrate(self, x: torch.Tensor) -> None:
        """Run the network in float64 and note every value's size and weight."""
        self.layers[self.input] = _Layer(self.input, "input", [])
        with torch.no_grad():
            values = self._run(x.to(torch.float64))
        for name, result in values.items():
            layer = self.layers[name]
            layer.shape = tuple(result.shape[1:])
            layer.largest = float(result.abs().max())
            layer.mean_square = float(result.square().mean())
        del values
        self._differentiate(x[:_EFFECT_IMAGES].to(torch.float64))

    def _run(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Every layer's result.

        Raises: PlanError where one is not finite.
        """
        values = {self.input: x}
        for name in self.order:
            layer = self.layers[name]
            if layer.kind == "same":
                continue
            result = self._float(layer, [values[i] for i in layer.inputs])
            if not bool(torch.isfinite(result).all()):
                raise PlanError(
                    f"{layer_title(name)}: the calibration data overflow here. The "
                    "activations leave the interval their polynomial was fitted on."
                )
            values[name] = result
        return values

    def _differentiate(self, x: torch.Tensor) -> None:
        """Set every layer's effects, from the outputs' derivatives.

        The outputs enter with random signs: the square of a derivative of such a sum
        is on average the sum of the squares.
        """
        weights = sorted({layer.weight for layer in self.layers.values()} - {""})
        with torch.enable_grad():
            for name in weights:
                self._tensor(name).requires_grad_()
            values = self._run(x.detach().clone().requires_grad_())
        output = values[self._same(self.output)]
        of = [*values.values(), *(self._tensor(name) for name in weights)]
        toss = torch.Generator().manual_seed(0)
        draws = []
        for _ in range(_EFFECT_SIGNS):
            signs = 2.0 * torch.randint(2, output.shape, generator=toss) - 1
            draws.append(
                torch.autograd.grad(
                    output,
                    of,
                    signs,
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
            )
        for name in weights:
            self._tensor(name).requires_grad_(False)
        columns = list(zip(*draws, strict=True))
        by_weight = {}
        for name, gradients in zip(weights, columns[len(values) :], strict=True):
            squares = sum(float(gradient.square().sum()) for gradient in gradients)
            by_weight[name] = squares / (len(x) * _EFFECT_SIGNS)
        self._input_gradients = x, columns[0]
        for name, gradients in zip(values, columns, strict=False):
            layer = self.layers[name]
            z, degree, radius = values[name], 0, 1.0
            if layer.polynomial is not None:
                z, degree = values[layer.inputs[0]], len(layer.polynomial.coeffs) - 1
                radius = max(map(abs, layer.polynomial.interval))
            layer.effect = measured_effect(
                z.detach(), gradients, degree=degree, radius=radius
            )
            if layer.weight:
                weight = self._tensor(layer.weight)
                depth = weight.numel() / len(weight)
                # Without a derivative, as if it read values of size one.
                layer.weight_effect = (
                    by_weight[layer.weight] or layer.effect.rounding * depth
                )

    def input_error(self, bits: int) -> float:
        """The outputs' mean square error when the input is rounded to nearest.

        The same values round in the same way, and images hold many equal ones; so what
        these inputs' rounding does is added to what that of any values would.
        """
        x, gradients = self._input_gradients
        off = (torch.round(x * 2.0**bits) / 2.0**bits - x).flatten(1)
        sums = [(off * gradient.flatten(1)).sum(1) for gradient in gradients]
        any_values = self.layers[self.input].effect.rounding * 2.0 ** (-2 * bits) / 12
        return float(torch.stack(sums).square().mean()) + any_values

    def _tensor(self, name: str) -> torch.Tensor:
        """A parameter in float64, the same tensor each time."""
        if name not in self._tensors:
            array = np.array(self.parameters[name], dtype=np.float64)
            self._tensors[name] = torch.from_numpy(array)
        return self._tensors[name]

    def _float(self, layer: _Layer, inputs: list[torch.Tensor]) -> torch.Tensor:
        function = torch.nn.functional
        x = inputs[0]
        bias = self._tensor(layer.bias).reshape(-1) if layer.bias else None
        if layer.kind == "conv":
            top, left, bottom, right = _pads(layer.module.padding)
            return function.conv2d(
                function.pad(x, (left, right, top, bottom)),
                self._tensor(layer.weight),
                bias,
                _pair(layer.module.stride),
                0,
                _pair(layer.module.dilation),
                int(layer.module.groups),
            )
        if layer.kind == "gemm":
            return function.linear(x, self._matrix(layer), bias)
        if layer.kind == "activation":
            assert layer.polynomial is not None
            coeffs = layer.polynomial.coeffs
            y = torch.full_like(x, coeffs[-1])
            for coefficient in coeffs[-2::-1]:
                y = y * x + coefficient
            return y
        if layer.kind == "add":
            return inputs[0] + inputs[1]
        if layer.kind == "concat":
            if layer.module.dimension not in (1, 1 - x.dim()):
                raise PlanError(
                    f"{layer_title(layer.name)}: only channels can be concatenated."
                )
            return torch.cat(inputs, 1)
        if layer.kind == "flatten":
            return x.reshape(len(x), -1)
        if layer.kind == "pad":
            top, left, bottom, right = _last_pads(layer.module.padding)
            return function.pad(x, (left, right, top, bottom))
        kernel, stride, pads = self._pool(layer, tuple(x.shape[1:]))
        top, left, bottom, right = pads
        padded = function.pad(x, (left, right, top, bottom))
        return function.avg_pool2d(padded, kernel, stride)

    def _matrix(self, layer: _Layer) -> torch.Tensor:
        matrix = self._tensor(layer.weight)
        module = layer.module
        if type(module).__name__ == "Gemm":
            if (
                float(module.alpha) != 1.0
                or float(module.beta) != 1.0
                or module.trans_a
            ):
                raise PlanError(f"{layer_title(layer.name)}: Gemm with factors.")
            return matrix if module.trans_b else matrix.T
        return matrix

    def _pool(
        self, layer: _Layer, shape: tuple[int, ...]
    ) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int, int, int]]:
        height, width = shape[1:]
        if layer.kind == "global_pool":
            return (height, width), (1, 1), (0, 0, 0, 0)
        if layer.kind == "adaptive_pool":
            rows, columns = _pair(layer.module.output_size)
            if height % rows or width % columns:
                raise PlanError(
                    f"{layer_title(layer.name)}: adaptive pooling from "
                    f"{height}x{width} to {rows}x{columns} has uneven windows."
                )
            kernel = (height // rows, width // columns)
            return kernel, kernel, (0, 0, 0, 0)
        module = layer.module
        kernel = _pair(module.kernel_size)
        stride = _pair(module.kernel_size if module.stride is None else module.stride)
        if getattr(module, "ceil_mode", False) and any(
            (size - k) % s
            for size, k, s in zip((height, width), kernel, stride, strict=True)
        ):
            raise PlanError(f"{layer_title(layer.name)}: ceil_mode pads unevenly.")
        return kernel, stride, _pads(module.padding)

    # -- cutting into segments

    def cut(self) -> None:
        """Insert a rescaling where a weight would meet another with no opening between.

        A value that depends on weights may end a segment, or be read once by another
        operation that needs none. Any other reader gets it through an identity
        polynomial, which is an activation like any other.
        """
        readers: dict[str, list[str]] = {}
        for name in self.order:
            for value in self.layers[name].inputs:
                readers.setdefault(value, []).append(name)
        weighted: dict[str, bool] = {self.input: False}
        rescaled: dict[str, str] = {}
        order: list[str] = []
        for name in self.order:
            layer = self.layers[name]
            if layer.kind == "same":
                continue
            if layer.kind != "activation":
                for index, value in enumerate(layer.inputs):
                    needs = layer.kind in ("conv", "gemm") or len(readers[value]) > 1
                    if weighted[value] and needs:
                        layer.inputs[index] = self._rescale(value, rescaled, order)
            order.append(name)
            weighted[name] = layer.kind in ("conv", "gemm") or (
                layer.kind != "activation"
                and any(weighted.get(value, False) for value in layer.inputs)
            )
        self.order = order

    def _rescale(self, value: str, rescaled: dict[str, str], order: list[str]) -> str:
        if value not in rescaled:
            before = self.layers[value]
            name = value + _RESCALED
            self.layers[name] = replace(
                before,
                name=name,
                kind="activation",
                inputs=[value],
                weight="",
                bias="",
                polynomial=Polynomial((0, 1), 0, (-1.0, 1.0)),
                effect=Effect(
                    np.array([before.effect.rounding, 0.0, 0.0]), np.zeros((2, 2))
                ),
            )
            rescaled[value] = name
            order.append(name)
        return rescaled[value]

    def hwc(self, name: str) -> tuple[int, ...]:
        shape = self.layers[name].shape
        if len(shape) == 3:
            return (shape[1], shape[2], shape[0])
        if len(shape) == 1:
            return shape
        raise PlanError(
            f"{layer_title(name)}: values of {len(shape) + 1} dimensions; the masked "
            "engine takes (batch, channels, height, width) and (batch, features)."
        )


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
        window: elements pooled on the way from the source to the segment's end.
    """

    layer: _Layer
    weighted: bool
    window: int

    @property
    def spent(self) -> int:
        """Bits of the segment's scale that this source cannot have.

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


class _Builder:
    """Chooses scales for a cut network and writes its plan."""

    def __init__(
        self, reader: _Reader, *, ring: int, headroom: float, mode: str
    ) -> None:
        self.reader = reader
        self.ring = ring
        self.headroom = headroom
        self.mode = mode
        # x = D + t must hold in the linear ring: value_ring - drop = ring.
        self.drop = VALUE_RING - ring
        self.source_of = {reader.input: INPUT}
        self.ends: list[str] = []
        for name in reader.order:
            if reader.layers[name].kind == "activation":
                self.ends.append(reader.layers[name].inputs[0])
                self.source_of[name] = len(self.ends)
        self.ends.append(reader.output)
        self.weights: list[WeightSpec] = []
        self.bounds = [self._bound(i) for i in range(len(self.ends))]
        self.scales = [self._scale(i) for i in range(len(self.ends))]
        self.frac_bits = self._choose_frac_bits()

    def _activation(self, index: int) -> _Layer | None:
        names = [n for n, source in self.source_of.items() if source == index + 1]
        return self.reader.layers[names[0]] if names else None

    def _bound(self, index: int) -> float:
        """Headroom times the largest value seen, and at least the interval."""
        seen = self.reader.layers[self.ends[index]].largest
        act = self._activation(index)
        bound = self.headroom * seen
        if (
            act is not None
            and act.polynomial is not None
            and not act.name.endswith(_RESCALED)
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
        """Every place where a segment reads a source."""
        stack: list[tuple[str, _Layer | None, int]] = [(self.ends[index], None, 1)]
        while stack:
            value, above, window = stack.pop()
            layer = self.reader.layers[value]
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
        layer = self.reader.layers[name]
        for bits in _FRAC_BITS:
            if bits > limit or largest * 2.0**bits >= 2.0 ** (self.ring - 2):
                break
            if layer.polynomial is None:
                error = self.reader.input_error(bits)
            else:
                error = layer.effect.rounding * 2.0 ** (-2 * bits) / 6
                error += evaluation_error(
                    layer.polynomial,
                    scale=self.scales[self.source_of[name] - 1],
                    value_scale=bits + self.drop,
                    effect=layer.effect,
                )
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

    def _errors(self, place: _Place, scale: int, bits: int) -> float:
        """Variance of z's error by rounded weights, and by a source's rounding."""
        rounding = 2.0 ** (-2 * bits) / 6
        if not place.weighted:
            return rounding
        layer = place.layer
        weight = self.reader.parameters[layer.weight].astype(np.float64)
        filters = weight.shape[0]
        depth = weight.size / filters
        square = self.reader.layers[layer.inputs[0]].mean_square
        by_weights = depth * square * place.weight_unit(scale, bits) ** 2 / 12
        return by_weights + float(np.square(weight).sum()) / filters * rounding

    def _largest_source(self, name: str) -> float:
        """What a source may reach when its polynomial's input reaches its bound."""
        layer = self.reader.layers[name]
        if layer.kind == "input":
            return self.headroom * max(layer.largest, 0.5)
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
        layer = self.reader.layers[name]
        units = [self.natural(child) for child in layer.inputs]
        unit = max(units, key=lambda u: u.factor)
        if any(not (unit.factor / u.factor).is_integer() for u in units):
            # No whole multiplier brings one input to the other's unit: go finer.
            unit = _Unit(unit.bits + 10, unit.ratio)
        if layer.kind.endswith("pool"):
            unit = self._pooled(layer, unit)
        return unit

    def _pooled(self, layer: _Layer, unit: _Unit) -> _Unit:
        """A sum over a window counts as the mean of integers in a finer unit."""
        count = self._window(layer)
        twos = (count & -count).bit_length() - 1
        return _Unit(unit.bits + twos, unit.ratio * (count >> twos))

    def _window(self, layer: _Layer) -> int:
        shape = self.reader.layers[layer.inputs[0]].shape
        return math.prod(self.reader._pool(layer, shape)[0])

    def write(self, name: str, unit: _Unit, ring: int) -> Expression:
        """The expression whose integers stand for the value in the given unit."""
        reader = self.reader
        shape = reader.hwc(name)
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
            return Expression(
                "source", (), shape, title, source=index, multiplier=multiplier
            )
        layer = reader.layers[name]
        if layer.kind in ("conv", "gemm"):
            return self._write_weighted(layer, title, shape, unit, ring)
        if layer.kind.endswith("pool"):
            before = reader.layers[layer.inputs[0]].shape
            kernel, stride, pads = reader._pool(layer, before)
            finer = _Unit(unit.bits, unit.ratio / math.prod(kernel))
            child = self.write(layer.inputs[0], finer, ring)
            return Expression(
                "pool", (child,), shape, title, kernel=kernel, stride=stride, pads=pads
            )
        children = tuple(self.write(child, unit, ring) for child in layer.inputs)
        if layer.kind == "pad":
            return Expression(
                "pad", children, shape, title, pads=_last_pads(layer.module.padding)
            )
        return Expression(layer.kind, children, shape, title)

    def _write_weighted(
        self, layer: _Layer, title: str, shape: tuple[int, ...], unit: _Unit, ring: int
    ) -> Expression:
        reader = self.reader
        below = self.natural(layer.inputs[0])
        child = self.write(layer.inputs[0], below, ring)
        weight = reader.parameters[layer.weight]
        if layer.kind == "gemm":
            outs, ins = reader._matrix(layer).shape
            full, groups = (outs, ins, 1, 1), 1
            geometry: dict[str, Any] = {}
        else:
            full = tuple(weight.shape)
            groups = int(layer.module.groups)
            geometry = {
                "kernel": (int(weight.shape[2]), int(weight.shape[3])),
                "stride": _pair(layer.module.stride),
                "dilation": _pair(layer.module.dilation),
                "pads": _pads(layer.module.padding),
                "groups": groups,
            }
        spec = WeightSpec(
            title,
            layer.weight,
            layer.bias,
            full,
            groups,
            unit.factor / below.factor,
            unit.factor,
            ring,
        )
        largest = float(np.abs(weight).max()) * spec.factor
        if spec.factor < 8 or largest >= 2.0 ** (ring - 1):
            raise PlanError(
                f"{title}: its weights would keep {math.log2(spec.factor):.0f} "
                f"fractional bits in a ring of {ring}. Use a wider ring."
            )
        self.weights.append(spec)
        return Expression(
            "conv", (child,), shape, title, weight=len(self.weights) - 1, **geometry
        )

    # -- the polynomial

    def activation(self, index: int) -> Activation | None:
        layer = self._activation(index)
        if layer is None:
            return None
        polynomial = layer.polynomial
        assert polynomial is not None
        title = layer_title(layer.name)
        frac_bits = self.frac_bits[index + 1]
        value_scale = frac_bits + self.drop
        groups = choose_groups(
            polynomial,
            scale=self.scales[index],
            value_scale=value_scale,
            effect=layer.effect,
        )
        largest = self._largest_source(layer.name)
        if largest * 2.0**value_scale >= 2.0 ** (VALUE_RING - 2):
            raise PlanError(
                f"{title}: the polynomial reaches {largest:.4g}, too large at scale "
                f"{value_scale} in a ring of {VALUE_RING} bits."
            )
        return Activation(
            title,
            self.scales[index],
            groups,
            shifted(polynomial.numerators[0], value_scale - polynomial.frac_bits),
            VALUE_RING,
            value_scale,
            self.drop,
            frac_bits,
        )

    def build(self, example_bound: float) -> Plan:
        reader = self.reader
        segments = []
        for index, end in enumerate(self.ends):
            root = self.write(end, _Unit(self.scales[index]), self.ring)
            scale = self.scales[index]
            variance = sum(
                self._errors(place, scale, self.frac_bits[source])
                for name, source in self.source_of.items()
                for place in self._readers(name, index)
            )
            segments.append(
                Segment(
                    self.title(index),
                    root,
                    self.ring,
                    self.scales[index],
                    self.bounds[index],
                    reader.layers[end].largest,
                    math.sqrt(variance),
                    self.activation(index),
                )
            )
        names = sorted(self.source_of, key=self.source_of.__getitem__)
        sources = tuple(
            Source(reader.hwc(name), self.ring, self.frac_bits[i])
            for i, name in enumerate(names)
        )
        plan = Plan(
            self.mode,
            tuple(reader.layers[reader.input].shape),
            tuple(reader.layers[reader.output].shape),
            tuple(segments),
            sources,
            tuple(self.weights),
            example_bound,
        )
        plan.check()
        return plan


def make_plan(
    graph: Any,
    example: torch.Tensor,
    *,
    precision: str | int = "fast",
    headroom: float = HEADROOM,
    mode: str = "owner",
) -> Plan:
    """The plan of a converted network.

    1. Run the network in float64 on the example and note every value's size.
    2. Cut it at its activations; insert a rescaling between weights with none between.
    3. Bound every z by headroom times the largest seen, and at least the polynomial's
       interval; the ring leaves the rest to fractional bits.
    4. Split these between weights and activations where the output is moved least.

    Args:
        graph: a crypten.nn.Graph, converted, batch-norm folded, not encrypted.
        example: (batch, *input_shape) calibration inputs; more give better bounds.
        precision: "fast" (32-bit linear ring), "high" (40-bit), or the bits, 20 to 56.
        headroom: how far beyond the calibration inputs values may go.
        mode: "owner" or "shared".

    Raises: PlanError naming the layer that is unsupported or whose values do not fit.
    """
    if precision not in PRECISIONS and not isinstance(precision, int):
        raise PlanError(
            f"precision={precision!r}; give {', '.join(map(repr, PRECISIONS))} or the "
            f"linear ring's bits, {RING_LIMITS[0]} to {RING_LIMITS[1]}."
        )
    ring = PRECISIONS[precision] if isinstance(precision, str) else precision
    if not RING_LIMITS[0] <= ring <= RING_LIMITS[1]:
        raise PlanError(
            f"A linear ring of {ring} bits; {RING_LIMITS[0]} to {RING_LIMITS[1]} work."
        )
    if mode not in ("owner", "shared"):
        raise PlanError(f'mode={mode!r}; give "owner" or "shared".')
    if headroom < 1:
        raise PlanError(f"headroom={headroom}; at least 1 is needed.")
    reader = _Reader(graph)
    reader.calibrate(example)
    reader.cut()
    builder = _Builder(reader, ring=ring, headroom=headroom, mode=mode)
    bound = builder._largest_source(reader.input)
    return builder.build(bound)
