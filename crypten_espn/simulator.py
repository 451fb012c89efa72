"""Why a private result differs: a network's integers in the clear, layer by layer.

`explain` computes a converted network with the integers the parties would hold and
says, layer by layer, how far they are from the real network, how much of that is added
there, how far two private runs differ from each other, and what is left of the ring.
`compare_precisions` does so for several precisions, side by side.

CrypTen's protocols: both shares of every value are simulated, with rank 0's drawn from
a keystream where the protocols draw it. Truncation works on shares, so it rounds as
the parties' does; given the same draws, the result is theirs, bit for bit. The masked
engine's own is `masked.reference`; `explain` calls it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from crypten.encoder import FixedPointEncoder

from .convert import PrivateNetwork, nearest
from .engines import MASKED, CrypTen
from .errors import ConversionError, ProtocolError, RangeError, ShapeError
from .explanation import Comparison, Explanation, Fault, LayerError
from .masked.model import MaskedModel
from .masked.plan import Plan, channels_last
from .masked.planning import layer_title, masked_model
from .masked.planning.network import Network, parameters_of
from .masked.reference import Rounding, Roundings, evaluate
from .masked.steps import Output, Step
from .polynomial import RING_BITS, RingForm, as_int64
from .protocols import Settings, settings
from .randomness import SEED_BYTES, Keystream

# Inputs at once; bounds memory, not results.
_CHUNK = 32


class Draws(Protocol):
    """Where the simulated shares come from; `randomness.Keystream` is one."""

    def ring(self, size: Sequence[int]) -> torch.Tensor:
        """Uniform int64 ring elements of this shape."""
        ...


def explain(
    private: PrivateNetwork,
    x: torch.Tensor,
    *,
    precision_bits: int | None = None,
    precision: str | int | None = None,
    example: torch.Tensor | None = None,
    runs: int = 4,
    draws: Draws | None = None,
) -> Explanation:
    """A converted network's integers in the clear, against the real network.

    1. Encode input and weights as the parties do.
    2. Layer by layer: the integers modulo 2**64 with CrypTen's truncation on both
       shares, the same in float64 without a ring, and the real network in float64.
    3. Compare. The engine is the one the network was converted for, as in `simulate`.

    Args:
        private: what `convert` returned, not encrypted.
        x: (batch, *input_shape).
        precision_bits: fractional bits for CrypTen's protocols;
            crypten.cfg.encoder.precision_bits when None.
        precision: for the masked engine, as `masked.planning.make_plan`; that of the
            conversion if None.
        example: calibration inputs for the masked engine; those of the conversion when
            None.
        runs: simulated runs with shares of their own; their differences give the
            declared rounding, so one run declares none.
        draws: rank 0's shares, in the order of use; a keystream of a fixed seed when
            None, so that a call can be repeated. Only values in the clear are at stake.

    Returns:
        An Explanation.

    Error: given the parties' draws, the logits are theirs bit for bit. Otherwise a run
        of theirs differs from a simulated one by at most `rounding` but for failed
        truncations. What one layer adds to that, in its own units: a product or a pool
        at most 1; a polynomial its form's error bound, and 1 for its own truncation.

    Raises:
        ShapeError, RangeError: the input or a weight, named.
        ConversionError: an operation that `convert` does not make.
        ProtocolError: `precision_bits` for the masked engine, or no runs.
        PlanError: the masked engine has no plan; the layer is named.
    """
    if not isinstance(private, PrivateNetwork):
        raise ConversionError(
            f"a {type(private).__name__} was given; explain() takes what convert() "
            "returned"
        )
    if runs < 1:
        raise ProtocolError(f"runs={runs}: at least one run is simulated")
    _check(private, x)
    if draws is None:
        draws = Keystream(bytes(SEED_BYTES))
    with torch.no_grad():
        engine = private.engine
        if not isinstance(engine, CrypTen):
            if precision_bits is not None:
                raise ProtocolError(
                    f"precision_bits={precision_bits} is for CrypTen's protocols; the "
                    "masked engine chooses scales itself: give precision='fast' or "
                    "'high', or convert with protocol='espn'"
                )
            model = masked_model(private, example, precision=precision)
            return _explain_masked(private, model, x, runs, draws)
        encoder = FixedPointEncoder(precision_bits=precision_bits)
        with settings(
            protocol=engine.protocol,
            truncation=engine.truncation,
            failure_bits=engine.failure_bits,
        ) as chosen:
            return _explain_shares(private, x, encoder, chosen, runs, draws)


def compare_precisions(
    private: PrivateNetwork,
    x: torch.Tensor,
    *,
    precision_bits: Sequence[int] = (8, 12, 16, 20, 24),
    precision: Sequence[str | int] = ("fast", "high"),
    example: torch.Tensor | None = None,
    runs: int = 4,
) -> Comparison:
    """`explain` for several precisions.

    Args:
        private, x, example, runs: as `explain`.
        precision_bits: for CrypTen's protocols.
        precision: for the masked engine.

    Raises: as `explain`.
    """
    results: list[tuple[int | str, Explanation]] = []
    if not isinstance(private.engine, CrypTen):
        for chosen in precision:
            found = explain(private, x, precision=chosen, example=example, runs=runs)
            results.append((chosen, found))
    else:
        for bits in precision_bits:
            found = explain(private, x, precision_bits=bits, runs=runs)
            results.append((bits, found))
    return Comparison(tuple(results))


def _check(private: PrivateNetwork, x: torch.Tensor) -> None:
    """Refuse what would only be noticed as garbage in the end."""
    private.check_shape(tuple(x.shape))
    if not len(x):
        raise ShapeError("the input has no rows; give at least one")
    if not bool(torch.isfinite(x).all()):
        raise RangeError("the input holds NaN or infinity; clean the data")
    for name, array in parameters_of(private).items():
        if not bool(torch.isfinite(torch.from_numpy(array)).all()):
            users = [n for n, inputs in private._graph.items() if name in inputs]
            raise RangeError(
                f"{layer_title(users[0]) if users else name}: its parameter {name} "
                "holds NaN or infinity; train again, or load another checkpoint"
            )


# ---------------------------------------------------------------- both arithmetics


@dataclass
class _Shared:
    """A value modulo 2**64 and rank 0's share of it; the rest is rank 1's."""

    total: torch.Tensor
    first: torch.Tensor


class _Reals:
    """The network in float64."""

    def product(self, function: Callable[..., Any], x: Any, weight: Any) -> Any:
        return function(x, weight)

    def add(self, x: Any, y: Any) -> Any:
        return x + y

    def linear(self, function: Callable[..., Any], values: list[Any]) -> Any:
        return function(*values)

    def scaled(self, x: Any, factor: Any) -> Any:
        return x * factor

    def divided(self, x: Any, count: int) -> Any:
        return x / count

    def compared(self, function: Callable[..., Any], x: Any) -> Any:
        return function(x)

    def polynomial(self, module: Any, x: Any) -> Any:
        return module.polynomial(x)


class _Shares:
    """The network as two CrypTen parties hold it.

    Attributes:
        headroom_bits, failures: of what was computed since `start`.
        overflow, failure: the first of each since `start`; the layer is not set.
    """

    def __init__(
        self, encoder: FixedPointEncoder, chosen: Settings, draws: Draws
    ) -> None:
        self.encoder = encoder
        self.bits = int(encoder._precision_bits)
        self.chosen = chosen
        self.draws = draws
        self.start()

    def start(self) -> None:
        self.headroom_bits = math.inf
        self.failures = 0.0
        self.overflow: Fault | None = None
        self.failure: Fault | None = None

    def share(self, values: torch.Tensor) -> _Shared:
        return _Shared(values, self.draws.ring(values.shape))

    def product(
        self, function: Callable[..., Any], x: _Shared, weight: _Shared
    ) -> _Shared:
        total = function(x.total, weight.total)
        wide = function(x.total.double(), weight.total.double())
        return self._divide(self.share(total), self.encoder.scale, wide)

    def add(self, x: _Shared, y: _Shared) -> _Shared:
        total, first = x.total + y.total, x.first + y.first
        self._room(total, x.total.double() + y.total.double(), 2.0**-self.bits, 63)
        return _Shared(total, first)

    def linear(self, function: Callable[..., Any], values: list[_Shared]) -> _Shared:
        """A sum of values, which each party computes on its shares."""
        return _Shared(
            function(*[value.total for value in values]),
            function(*[value.first for value in values]),
        )

    def scaled(self, x: _Shared, factor: Any) -> _Shared:
        encoded = self.encoder.encode(factor)
        wide = x.total.double() * encoded.double()
        value = _Shared(x.total * encoded, x.first * encoded)
        return self._divide(value, self.encoder.scale, wide)

    def divided(self, x: _Shared, count: int) -> _Shared:
        return self._divide(x, count, x.total.double())

    def compared(self, function: Callable[..., Any], x: _Shared) -> _Shared:
        """Comparisons are exact, and their result is shared afresh."""
        return self.share(function(x.total))

    def polynomial(self, module: Any, x: _Shared) -> _Shared:
        form = self.chosen.form(module.polynomial, self.bits, 2)
        powers = _Shared(x.total * form.factor, x.first * form.factor)
        if form.shift:
            wide = x.total.double() * form.factor
            unit = 2.0 ** -(self.bits + math.log2(form.factor))
            powers = self._shift(powers, form.shift, wide, unit)
        total = form.evaluate(x.total, powers.total)
        if form.degree < 2:
            y = _Shared(total, form.linear_share(x.first, 0))
        else:
            y = self.share(total)
        shift = form.out_bits - self.bits
        wide = _evaluate(form, x.total.double(), powers.total.double())
        unit = 2.0**-form.out_bits
        if self.chosen.exact(2):
            return self._shift_exactly(y, shift, wide, unit)
        return self._shift(y, shift, wide, unit)

    # -- truncation; `wide` is the value without a ring

    def _divide(self, value: _Shared, divisor: int, wide: torch.Tensor) -> _Shared:
        """CrypTen's: each party divides its share, rounding toward zero."""
        unit = 2.0**-self.bits / divisor
        self._room(value.total, wide, unit, 63)
        second = value.total - value.first
        first = value.first.div(divisor, rounding_mode="trunc")
        total = first + second.div(divisor, rounding_mode="trunc")
        self._failed(total, wide, divisor, unit)
        return _Shared(total, first)

    def _shift(
        self, value: _Shared, shift: int, wide: torch.Tensor, unit: float
    ) -> _Shared:
        """`protocols.truncation.local`."""
        self._room(value.total, wide, unit, 63)
        if shift == 0:
            return value
        second = value.total - value.first
        first = (value.first >> shift) + 1
        total = first + (second >> shift)
        self._failed(total, wide, 1 << shift, unit)
        return _Shared(total, first)

    def _shift_exactly(
        self, value: _Shared, shift: int, wide: torch.Tensor, unit: float
    ) -> _Shared:
        """`protocols.truncation.exact`: the mask's low bits decide the rounding."""
        self._room(value.total, wide, unit, RING_BITS)
        if shift == 0:
            return value
        mask = self.draws.ring(value.total.shape)
        opened = value.total + mask + 2**RING_BITS
        logical = (mask >> shift) & ((1 << (64 - shift)) - 1)
        total = (opened >> shift) & ((1 << (64 - shift)) - 1)
        total = total - torch.where(opened < 0, logical, mask >> shift)
        return self.share(total - 2 ** (RING_BITS - shift))

    def _room(
        self, total: torch.Tensor, wide: torch.Tensor, unit: float, limit: int
    ) -> None:
        """Note the headroom below 2**limit, and the first value beyond it."""
        magnitude = wide.abs()
        largest = float(magnitude.max()) if magnitude.numel() else 0.0
        room = limit - math.log2(max(largest, 1.0))
        self.headroom_bits = min(self.headroom_bits, room)
        if room <= 0 and self.overflow is None:
            at = int((magnitude >= 2.0**limit).flatten().int().argmax())
            self.overflow = _fault("wraps", wide, at, unit, limit)

    def _failed(
        self, total: torch.Tensor, wide: torch.Tensor, divisor: int, unit: float
    ) -> None:
        """Count on |value| / 2**64 failures, and note the first that came."""
        magnitude = wide.abs()
        self.failures += float(magnitude.clamp(max=2.0**64).sum()) / 2.0**64
        if self.failure is None:
            tolerance = 2 + magnitude.max() / divisor * 2.0**-40
            wrong = (total.double() - wide / divisor).abs() > tolerance
            wrong &= magnitude < 2.0**63
            if bool(wrong.any()):
                at = int(wrong.flatten().int().argmax())
                self.failure = _fault("truncation failed", wide, at, unit, 63)


def _fault(kind: str, wide: torch.Tensor, at: int, unit: float, limit: int) -> Fault:
    value = float(wide.flatten()[at])
    place = [int(i) for i in torch.unravel_index(torch.tensor(at), wide.shape)]
    room = limit - math.log2(max(abs(value), 1.0))
    return Fault("", kind, tuple(place), value * unit, room)


def _evaluate(form: RingForm, x: torch.Tensor, powers: torch.Tensor) -> torch.Tensor:
    """`RingForm.evaluate` in float64, without a ring."""
    result = torch.zeros_like(x)
    for c in reversed(form.coeffs[2:]):
        result = (result + float(c)) * powers
    result = result * powers
    if form.degree >= 1:
        result = result + x * float(as_int64(form.coeffs[1]))
    return result + float(form.coeffs[0])


def _layer(module: Any, inputs: list[Any], a: _Reals | _Shares) -> Any:
    """What one module of a converted network computes, in either arithmetic.

    Raises:
        ConversionError: a module that `convert` does not make.
    """
    function = torch.nn.functional
    kind = type(module).__name__
    if kind == "Conv":
        options = {
            "stride": module.stride,
            "padding": module.padding,
            "dilation": module.dilation,
            "groups": module.groups,
        }
        y = a.product(
            lambda x, w: function.conv2d(x, w, **options), inputs[0], inputs[1]
        )
        if len(inputs) == 2:
            return y
        return a.add(y, a.linear(lambda b: b.view(1, -1, 1, 1), [inputs[2]]))
    if kind == "Gemm":
        y = a.product(
            lambda x, w: x @ (w.t() if module.trans_b else w), inputs[0], inputs[1]
        )
        y = a.scaled(y, module.alpha)
        return a.add(y, a.scaled(inputs[2], module.beta))
    if kind == "PolynomialActivation":
        return a.polynomial(module, inputs[0])
    if kind == "Add":
        return a.add(inputs[0], inputs[1])
    if kind == "AvgPool2d":
        height, width = module.kernel_size
        total = a.linear(
            lambda x: function.avg_pool2d(
                x, (height, width), module.stride, module.padding, divisor_override=1
            ),
            inputs,
        )
        return a.divided(total, height * width)
    if kind == "GlobalAveragePool":
        count: list[int] = []

        def spatial_sum(x: torch.Tensor) -> torch.Tensor:
            count.append(math.prod(x.shape[2:]))
            return x.sum(tuple(range(2, x.dim())), keepdim=True)

        total = a.linear(spatial_sum, inputs)
        return a.divided(total, count[0])
    if kind == "Flatten":
        return a.linear(lambda x: x.flatten(module.axis), inputs)
    if kind == "Concat":
        return a.linear(lambda *x: torch.cat(x, module.dimension), inputs)
    if kind == "ConstantPad2d":
        return a.linear(lambda x: function.pad(x, module.padding), inputs)
    if kind == "Scale":
        return a.scaled(inputs[0], module.factor)
    if kind == "ReLU":
        return a.compared(lambda x: x.clamp(min=0), inputs[0])
    if kind == "MaxPool2d":
        return a.compared(lambda x: _max_pool(module, x), inputs[0])
    raise ConversionError(
        f"{kind} cannot be explained; explain() takes what convert() returned"
    )


def _max_pool(module: Any, x: torch.Tensor) -> torch.Tensor:
    y = torch.nn.functional.max_pool2d(
        x.double(),
        module.kernel_size,
        module.stride,
        module.padding,
        ceil_mode=module.ceil_mode,
    )
    return y.to(x.dtype)


# ---------------------------------------------------------------- CrypTen's protocols

# What only moves values around has no line of its own.
_SILENT = ("Flatten", "Concat", "ConstantPad2d")


@dataclass
class _Tally:
    """What is known about one layer so far, over all chunks of the input."""

    operation: str
    count: int = 0
    largest: float = 0.0
    max_error: float = 0.0
    sum_error: float = 0.0
    sum_added: float = 0.0
    difference: float = 0.0
    headroom_bits: float = math.inf
    failures: float = 0.0
    overflow: Fault | None = None
    failure: Fault | None = None


def _order(private: PrivateNetwork) -> Iterator[str]:
    """Node names, each after its inputs, as the parties compute them."""
    done = set(private.input_names)
    waiting = dict(private._graph)
    while waiting:
        before = len(waiting)
        for name, inputs in list(waiting.items()):
            if done.issuperset(inputs):
                del waiting[name]
                done.add(name)
                yield name
        if len(waiting) == before:
            raise ConversionError(
                f"{layer_title(next(iter(waiting)))}: nothing computes its input"
            )


def _explain_shares(
    private: PrivateNetwork,
    x: torch.Tensor,
    encoder: FixedPointEncoder,
    chosen: Settings,
    runs: int,
    draws: Draws,
) -> Explanation:
    a, reals = _Shares(encoder, chosen, draws), _Reals()
    order = list(_order(private))
    real: dict[str, torch.Tensor] = {}
    held: dict[str, _Shared] = {}
    for name, array in parameters_of(private).items():
        tensor = torch.from_numpy(array)
        real[name] = tensor.double()
        held[name] = a.share(encoder.encode(nearest(tensor, frac_bits=a.bits)))
    tallies = {
        name: _Tally(type(private._modules[name]).__name__)
        for name in order
        if name not in real
    }
    logits, clear = [], []
    for start in range(0, len(x), _CHUNK):
        part = x[start : start + _CHUNK]
        logit, expected = _run(
            private, part, start, runs, a, reals, real, held, order, tallies
        )
        logits.append(encoder.decode(logit))
        clear.append(expected)
    kept = {n: t for n, t in tallies.items() if t.operation not in _SILENT}
    unit = 2.0**-a.bits
    layers = tuple(
        LayerError(
            layer_title(name),
            tally.operation,
            unit,
            tally.largest,
            tally.max_error,
            tally.sum_error / tally.count,
            math.sqrt(tally.sum_added / tally.count),
            2 * max(tally.difference, unit) if runs > 1 else math.nan,
            tally.headroom_bits,
            tally.failures / (len(x) * runs),
        )
        for name, tally in kept.items()
    )
    return Explanation(
        f"{chosen.protocol.name}, {chosen.truncation} truncation, {a.bits} bits",
        layers,
        torch.cat(logits),
        torch.cat(clear),
        _first([(name, tally.overflow) for name, tally in kept.items()]),
        _first([(name, tally.failure) for name, tally in kept.items()]),
    )


def _first(faults: list[tuple[str, Fault | None]]) -> Fault | None:
    for name, fault in faults:
        if fault is not None:
            return dataclasses.replace(fault, layer=layer_title(name))
    return None


def _run(
    private: PrivateNetwork,
    x: torch.Tensor,
    start: int,
    runs: int,
    a: _Shares,
    reals: _Reals,
    real_parameters: dict[str, torch.Tensor],
    parameters: dict[str, _Shared],
    order: list[str],
    tallies: dict[str, _Tally],
) -> tuple[torch.Tensor, torch.Tensor]:
    """One chunk through both networks; integers and real values of the output."""
    source, batch = private.input_names[0], len(x)
    real = {**real_parameters, source: x.double()}
    encoded = a.encoder.encode(x)
    held = {
        **parameters,
        source: a.share(encoded.repeat(runs, *[1] * (x.dim() - 1))),
    }
    unit = 2.0**-a.bits
    last_use = {n: name for name in order for n in private._graph[name]}
    for name in order:
        if name in real_parameters:
            continue
        module, inputs = private._modules[name], private._graph[name]
        real[name] = expected = _layer(module, [real[i] for i in inputs], reals)
        a.start()
        held[name] = value = _layer(module, [held[i] for i in inputs], a)
        tally = tallies[name]
        given = value.total[:batch].double() * unit
        # The same layer on what the parties really hold: the rest is its own error.
        alone = _layer(
            module,
            [
                real[i]
                if i in real_parameters
                else held[i].total[:batch].double() * unit
                for i in inputs
            ],
            reals,
        )
        error = (given - expected).abs()
        tally.count += error.numel()
        tally.largest = max(tally.largest, float(expected.abs().max()))
        tally.max_error = max(tally.max_error, float(error.max()))
        tally.sum_error += float(error.sum())
        tally.sum_added += float((given - alone).square().sum())
        if runs > 1:
            each = value.total.view(runs, batch, -1)
            span = each.double().amax(0) - each.double().amin(0)
            tally.difference = max(tally.difference, float(span.max()) * unit)
        tally.headroom_bits = min(tally.headroom_bits, a.headroom_bits)
        tally.failures += a.failures
        if tally.overflow is None:
            tally.overflow = _located(a.overflow, batch, start)
        if tally.failure is None:
            tally.failure = _located(a.failure, batch, start)
        for used in set(inputs):
            if last_use[used] == name and used not in real_parameters:
                real.pop(used)
                held.pop(used)
    output = private.output_names[0]
    return held[output].total[:batch], real[output]


def _located(fault: Fault | None, batch: int, start: int) -> Fault | None:
    """The element's first index counted in the whole input."""
    if fault is None:
        return None
    element = (start + fault.element[0] % batch, *fault.element[1:])
    return dataclasses.replace(fault, element=element)


# ---------------------------------------------------------------- the masked engine


def _explain_masked(
    private: PrivateNetwork,
    model: MaskedModel,
    x: torch.Tensor,
    runs: int,
    draws: Draws,
) -> Explanation:
    network = Network(private)
    network.cut()
    ends = network.ends
    clear, exact = [], []
    results: list[list[Any]] = [[] for _ in range(runs)]
    logits = []
    for part in x.split(_CHUNK):
        real = network.run(part, ends)
        clear.append(real[ends[-1]])
        exact.append([_channels_last(real[end]) for end in ends])
        for run in range(runs):
            answer, values = _values(model, part, _coins(model.plan, draws))
            results[run].append(values)
            if run == 0:
                logits.append(answer)
    layers, overflow = [], None
    names = [known.name for known in model.report.parts]
    for index, part_plan in enumerate(model.plan.parts):
        expected = torch.cat([values[index] for values in exact])
        given = [torch.cat([v[index] for v in run]) for run in results]
        error = (given[0] - expected).abs()
        stack = torch.stack(given)
        span = float((stack.amax(0) - stack.amin(0)).max())
        fault = _beyond(part_plan, names[index], expected)
        overflow = overflow or fault[0]
        unit = 2.0**-part_plan.frac_bits
        layers.append(
            LayerError(
                names[index],
                "rescaling" if names[index].endswith("(rescaled)") else "linear part",
                unit,
                float(expected.abs().max()),
                float(error.max()),
                float(error.mean()),
                math.nan,
                2 * max(span, unit) if runs > 1 else math.nan,
                fault[1],
                0.0,
            )
        )
    return Explanation(
        f"{MASKED}, {_scales(model.plan)}",
        tuple(layers),
        torch.cat(logits),
        torch.cat(clear),
        overflow,
        None,
    )


def _scales(plan: Plan) -> str:
    """The fractional bits that activations keep, in words."""
    bits = [source.frac_bits for source in plan.sources]
    low, high = min(bits), max(bits)
    kept = str(low) if low == high else f"{low} to {high}"
    return f"activations of {kept} bits in a ring of {plan.output.ring}"


def _values(
    model: MaskedModel, x: torch.Tensor, roundings: Roundings | None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits, and every linear part's result in the network's units."""
    logits, trace = evaluate(model.plan, model.weights, x, roundings=roundings)
    return logits, [
        torch.from_numpy(z).double() * 2.0**-part.frac_bits
        for z, part in zip(trace, model.plan.parts, strict=True)
    ]


def _coins(plan: Plan, draws: Draws) -> Roundings:
    """Coins as the parties' masks and the dealer would give them."""

    def coins(number: int, z: Any) -> Rounding:
        act = plan.steps[number].activation
        first = [
            draws.ring(z.shape).numpy() & ((1 << 62) - 1) for _ in range(act.masks)
        ]
        second = draws.ring(z.shape).numpy() & ((1 << act.drop) - 1)
        return Rounding(first, second)

    return coins


def _beyond(
    part: Step | Output, name: str, expected: torch.Tensor
) -> tuple[Fault | None, float]:
    """The first value a linear part or its polynomial cannot hold; the headroom."""
    checks = [(expected, part.frac_bits, part.ring - 2)]
    if isinstance(part, Step):
        frac_bits = part.activation.value_frac_bits
        checks.append((_polynomial(part, expected), frac_bits, RING_BITS))
    fault, least = None, math.inf
    for values, frac_bits, limit in checks:
        magnitude = values.abs() * 2.0**frac_bits
        room = limit - math.log2(max(float(magnitude.max()), 1.0))
        least = min(least, room)
        if room <= 0 and fault is None:
            at = int((magnitude >= 2.0**limit).flatten().int().argmax())
            unit = 2.0**-frac_bits
            found = _fault("wraps", values * 2.0**frac_bits, at, unit, limit)
            fault = dataclasses.replace(found, layer=name)
    return fault, least


def _polynomial(step: Step, z: torch.Tensor) -> torch.Tensor:
    """A step's polynomial on real values, from its integer coefficients."""
    act = step.activation
    terms = [(g.shift, g.coeffs) for g in act.groups]
    if act.linear is not None:
        terms.append((act.linear.shift, (0, act.linear.coefficient)))
    result = torch.full_like(z, act.constant * 2.0**-act.value_frac_bits)
    for shift, coeffs in terms:
        bits = step.frac_bits - shift
        for k, c in enumerate(coeffs):
            if c:
                result += c * 2.0 ** (k * bits - act.value_frac_bits) * z**k
    return result


def _channels_last(values: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(channels_last(values.numpy()))
