"""What rounding coins do to the logits, by trying them.

Effects say what coins do on average. A logit that hangs on few activations may have far
more than the average, and the noise that hides its coins has to fit it.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from ...layers import Reals
from .layers import Layer
from .products import Dropped, OfRow
from .scales import Scales

# Inputs, runs of each, and about how many values may be computed in all.
_INPUTS = 4
_RUNS = range(12, 49)
_VALUES = 1 << 21
_MARGIN = 1.5
# A ring whose units float32 still tells apart, and computes in half the time.
_SINGLE = 32


def largest_deviation(scales: Scales, average: float) -> float:
    """The largest standard deviation of a logit between runs of one input.

    1. Compute calibration inputs, again and again, every truncation with a
       coin of its own.
    2. Take each logit's standard deviation over the runs, and the largest of them.

    Where 12 runs of one input would compute more than a few million values, `average`
    with a margin instead: there every logit hangs on many activations.

    Args:
        scales: as chosen.
        average: of the logits, from effects.

    Error: 12 to 48 runs, as the network's size allows; of many logits the largest is
        found some tens of percent too large.
    """
    network = scales.network
    if len(scales.ends) == 1 or network.layers[network.output].largest == 0.0:
        return 0.0  # nothing is truncated, or it all ends in weights of zero
    size = sum(math.prod(network.layers[name].shape) for name in network.order)
    x = scales.calibration.samples[:_INPUTS]
    if scales.ring <= _SINGLE:
        x = x.float()
    if size * _RUNS[0] > _VALUES:
        return _MARGIN * average
    x = x[: _VALUES // (size * _RUNS[0])]
    runs = min(max(_VALUES // (size * len(x)), _RUNS[0]), _RUNS[-1])
    random = torch.Generator().manual_seed(0)
    # One input at a time, so that memory is that of its runs.
    largest = 0.0
    with torch.no_grad():
        for row in x.split(1):
            logits = _run(scales, row.expand(runs, *row.shape[1:]), random)
            deviation = float(logits.flatten(1).std(0).max())
            if not math.isfinite(deviation):
                return math.inf
            largest = max(largest, deviation)
    return largest


def _run(scales: Scales, x: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    network = scales.network

    def compute(layer: Layer, inputs: list[torch.Tensor]) -> torch.Tensor:
        if not layer.activates:
            return network.compute(layer, inputs)
        return _activated(scales, layer, inputs[0], random)

    return network.walk(x, [network.output], compute)[network.output]


def _activated(
    scales: Scales, layer: Layer, z: torch.Tensor, random: torch.Generator
) -> torch.Tensor:
    """A polynomial whose powers and result are truncated with coins."""
    part = scales.source_of[layer.name] - 1
    found = scales.truncations(layer.name, scales.frac_bits[part + 1])
    assert found is not None
    if isinstance(found, Dropped):
        assert isinstance(layer.kind, OfRow)
        kept = [scales.scales[part] - dropped for dropped in found.bits]
        halves = zip(layer.kind.split(z), kept, strict=True)
        first, second = (_truncated(x, bits, random) for x, bits in halves)
        return _truncated(first * second, scales.frac_bits[part + 1], random)
    y = torch.zeros_like(z)
    for shift, real in found.terms:
        columns = torch.from_numpy(real).to(z)
        columns = columns.reshape(*real.shape, *[1] * (z.dim() - 2))
        base = _truncated(z, scales.scales[part] - shift, random) if shift else z
        power, reached = base, 1
        for k in np.flatnonzero(real.any(1)).tolist():
            if k == 0:
                y.add_(columns[0])
                continue
            for _ in range(reached, k):
                power = power * base
            reached = k
            y.addcmul_(power, columns[k])
    pool = scales.pools.get(layer.name)
    if pool is None:
        return _truncated(y, scales.frac_bits[part + 1], random)
    sums = _truncated(
        Reals().window_sums(y, pool, pool), scales.frac_bits[part + 1], random
    )
    # All readers take means of these windows: each value is its window's.
    means = sums / scales.summed(layer.name)
    return means.repeat_interleave(pool[0], 2).repeat_interleave(pool[1], 3)


def _truncated(x: torch.Tensor, bits: int, random: torch.Generator) -> torch.Tensor:
    coin = torch.rand(x.shape, generator=random)
    return (x * 2.0**bits).add_(coin).floor_().mul_(2.0**-bits)
