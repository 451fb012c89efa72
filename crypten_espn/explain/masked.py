"""A network as the masked engine computes it, against float64, layer by layer."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch

from ..convert import PrivateNetwork
from ..engines import MASKED
from ..layers import Reals
from ..masked.evaluation import OfProduct
from ..masked.model import MaskedModel
from ..masked.plan import Plan, channels_last
from ..masked.planning.network import Network
from ..masked.reference import Rounding, Roundings, evaluate
from ..masked.steps import Activation, Output
from ..polynomial import RING_BITS
from .shares import CHUNK, Draws
from .words import Explanation, Fault, LayerError, fault_at


def explain_masked(
    private: PrivateNetwork,
    model: MaskedModel,
    x: torch.Tensor,
    runs: int,
    draws: Draws,
) -> Explanation:
    """The errors of a masked plan, with coins as its dealer would draw them."""
    network = Network(private)
    network.cut()
    ends = network.ends
    clear, exact = [], []
    results: list[list[list[torch.Tensor]]] = [[] for _ in range(runs)]
    logits = []
    for part in x.split(CHUNK):
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
        fault = _beyond(model.plan, index, names[index], expected)
        overflow = overflow or fault[0]
        unit = 2.0**-part_plan.frac_bits
        # Two private answers differ by the server's noise too, which no run here has.
        noise = 0.0
        if isinstance(part_plan, Output) and part_plan.noise_bits:
            noise = unit * 2.0**part_plan.noise_bits
        layers.append(
            LayerError(
                names[index],
                "rescaling" if names[index].endswith("(rescaled)") else "linear part",
                unit,
                float(expected.abs().max()),
                float(error.max()),
                float(error.mean()),
                math.nan,
                2 * max(span, unit) + noise if runs > 1 else math.nan,
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

    def coins(number: int, z: np.ndarray) -> Rounding:
        act = plan.steps[number].activation
        first = [
            draws.ring(z.shape).numpy() & ((1 << 62) - 1) for _ in range(act.masks)
        ]
        result = (len(z), *plan.shapes[number + 1])
        second = draws.ring(result).numpy() & ((1 << act.drop) - 1)
        return Rounding(first, second)

    return coins


def _beyond(
    plan: Plan, number: int, name: str, expected: torch.Tensor
) -> tuple[Fault | None, float]:
    """The first value a linear part, or what follows it, cannot hold; the headroom."""
    part = plan.parts[number]
    checks = [(expected, part.frac_bits, part.ring - 2)]
    if number < len(plan.steps):
        frac_bits = plan.steps[number].activation.value_frac_bits
        checks.append((_value(plan, number, expected), frac_bits, RING_BITS))
    fault, least = None, math.inf
    for values, frac_bits, limit in checks:
        magnitude = values.abs() * 2.0**frac_bits
        room = limit - math.log2(max(float(magnitude.max()), 1.0))
        least = min(least, room)
        if room <= 0 and fault is None:
            at = int((magnitude >= 2.0**limit).flatten().int().argmax())
            unit = 2.0**-frac_bits
            found = fault_at("wraps", values * 2.0**frac_bits, at, unit, limit)
            fault = dataclasses.replace(found, layer=name)
    return fault, least


def _value(plan: Plan, number: int, z: torch.Tensor) -> torch.Tensor:
    """A step's product, or polynomial, of real values; from integer coefficients."""
    step, between = plan.steps[number], plan.evaluations[number]
    act = step.activation
    if isinstance(between, OfProduct):
        halves = z.split(between.sizes, 1)
        pairs = zip(halves, between.factors, strict=True)
        first, second = (half.reshape(-1, *shape) for half, shape in pairs)
        product: torch.Tensor = first * second
        return product
    assert isinstance(act, Activation)
    terms = [
        (group.shift, k, column)
        for group in act.groups
        for k, column in enumerate(zip(*group.coeffs, strict=True))
    ]
    if act.linear is not None:
        terms.append((act.linear.shift, 1, act.linear.coefficient))
    terms.append((0, 0, act.constant))
    result = torch.zeros_like(z)
    for shift, k, column in terms:
        if any(column):
            exponent = k * (step.frac_bits - shift) - act.value_frac_bits
            # By channel, the last axis.
            result += torch.tensor(column).double() * 2.0**exponent * z**k
    if act.pool is None:
        return result
    return _channels_last(
        Reals().window_sums(result.movedim(-1, 1), act.pool, act.pool)
    )


def _channels_last(values: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(channels_last(values.numpy()))
