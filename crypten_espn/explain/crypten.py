"""A network as two CrypTen parties compute it, against float64, layer by layer."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from crypten.encoder import FixedPointEncoder

from ..convert import PrivateNetwork, nearest
from ..layers import Reals
from ..masked.planning import layer_title
from ..masked.planning.network import parameters_of
from ..protocols import Settings
from .shares import CHUNK, Draws, Shared, Shares
from .words import Explanation, Fault, LayerError


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


def explain_shares(
    private: PrivateNetwork,
    x: torch.Tensor,
    encoder: FixedPointEncoder,
    chosen: Settings,
    runs: int,
    draws: Draws,
) -> Explanation:
    """The errors of a network on shares, drawn as CrypTen draws them."""
    a, reals = Shares(encoder, chosen, draws), Reals()
    real: dict[str, torch.Tensor] = {}
    held: dict[str, Shared] = {}
    for name, array in parameters_of(private).items():
        tensor = torch.from_numpy(array)
        real[name] = tensor.double()
        held[name] = a.share(encoder.encode(nearest(tensor, frac_bits=a.bits)))
    tallies = {
        name: _Tally(type(private._modules[name]).__name__) for name in private.layers
    }
    logits, clear = [], []
    for start in range(0, len(x), CHUNK):
        part = x[start : start + CHUNK]
        logit, expected = _run(
            private, part, start, runs, a, reals, real, held, tallies
        )
        logits.append(encoder.decode(logit))
        clear.append(expected)
    # What only moves values around has no line of its own.
    kept = {n: t for n, t in tallies.items() if not private.layers[n].moves}
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
    a: Shares,
    reals: Reals,
    real_parameters: dict[str, torch.Tensor],
    parameters: dict[str, Shared],
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
    last_use = {n: name for name in private.layers for n in private._graph[name]}
    for name, layer in private.layers.items():
        inputs = private._graph[name]
        real[name] = expected = layer.apply(reals, [real[i] for i in inputs])
        a.start()
        held[name] = value = layer.apply(a, [held[i] for i in inputs])
        tally = tallies[name]
        given = value.total[:batch].double() * unit
        # The same layer on what the parties really hold: the rest is its own error.
        alone = layer.apply(
            reals,
            [
                real[i]
                if i in real_parameters
                else held[i].total[:batch].double() * unit
                for i in inputs
            ],
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
