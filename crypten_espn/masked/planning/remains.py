"""What is left of precision at the scales of a network: errors that a report states."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from ...errors import PlanError
from ..steps import VALUE_RING
from ..weights import Quantisation
from .scales import Scales

# So many weights of a layer tell how far rounding moves all of them.
_SAMPLED = 1 << 15


def part_error(scales: Scales, index: int, weights: Sequence[Quantisation]) -> float:
    """Standard deviation of z's error by this part's own roundings.

    Args:
        weights: as written, in the order of `readings.weighings`.
    """
    variance = 0.0
    for one, known in zip(scales.readings.weighings, weights, strict=True):
        if one.part != index:
            continue
        weight = scales.network.parameters[one.layer.weight]
        filters = weight.shape[0]
        square = scales.network.layers[one.layer.inputs[0]].mean_square
        off = square * weight.size / filters * _rounded_off(weight, known.factor)
        unit = max(_mean_unit(scales, s) for s in one.below.offsets)
        off += float(np.square(weight, dtype=np.float64).sum()) / filters * unit**2 / 6
        variance += off / one.divisor
    for source, readers in scales.readings.public.items():
        mine = sum(1 for reader in readers if reader.part == index)
        variance += mine * _mean_unit(scales, source) ** 2 / 6
    return math.sqrt(variance)


def _mean_unit(scales: Scales, source: int) -> float:
    """The unit of a source, or of the mean that its sums are read as."""
    name = list(scales.source_of)[source]
    return 2.0 ** -scales.frac_bits[source] / scales.summed(name)


def logits_error(
    scales: Scales, weights: Sequence[Quantisation]
) -> tuple[float, float]:
    """Standard deviation of a logit's error: by coins alone, and by all roundings.

    Effects count all logits together; this is the mean over logits and calibration
    inputs. The server's noise is not in it.
    """
    by_source = list(_source_errors(scales))
    coins = sum(one[0] for one in by_source)
    other = sum(one[1] for one in by_source)
    for one, known in zip(scales.readings.weighings, weights, strict=True):
        weight = scales.network.parameters[one.layer.weight]
        other += one.layer.weight_effect * _rounded_off(weight, known.factor)
    outputs = scales.calibration.outputs
    coins, other = coins / outputs, other / outputs
    scale = scales.scales[-1]
    # z is rounded to its unit, and the decoded logits to float32.
    output = scales.network.layers[scales.network.output]
    other += 2.0 ** (-2 * scale) / 12 + output.mean_square * 2.0**-50
    return math.sqrt(coins), math.sqrt(coins + other)


def check_powers(scales: Scales) -> None:
    """Refuse polynomials whose truncated powers move the logits too far.

    From three tenths of the logits on, errors carry later values out of the
    intervals where polynomials stand for anything, and no estimate of them holds.

    Raises: PlanError; a wider ring would not help, since powers share the 64 bits
        of the polynomial's value.
    """
    moved = 0.0
    for name, source in scales.source_of.items():
        if scales.network.layers[name].activates:
            found = scales.truncations(name, scales.frac_bits[source])
            assert found is not None
            moved += found.by_coins
    size = scales.network.layers[scales.network.output].mean_square
    moved /= scales.calibration.outputs
    if size and not moved < 0.09 * size:
        raise PlanError(
            f"The output: truncated powers would move a logit by {moved**0.5:.3g}, "
            f"logits are {size**0.5:.3g}. High powers have too few of {VALUE_RING} "
            "bits, the fewer the more a layer's channels differ: calibrate or "
            "train with polynomials of a lower degree."
        )


def _source_errors(scales: Scales) -> Iterator[tuple[float, float]]:
    """By source: what its coins do to all outputs, and what its roundings do."""
    for name, source in scales.source_of.items():
        layer, bits = scales.network.layers[name], scales.frac_bits[source]
        off = sum(
            scales.calibration.factor_error(
                layer, scales.multiplier_error(reader, bits)
            )
            for reader in scales.readings.public.get(source, [])
        )
        if not layer.activates:
            yield 0.0, off + scales.calibration.input_error(bits)
            continue
        found = scales.truncations(name, bits)
        assert found is not None
        rounding = scales.rounding(layer, bits)
        yield rounding + found.by_coins, off + found.by_coefficients


def _rounded_off(weight: np.ndarray, factor: float) -> float:
    """Mean square of what rounding takes from a layer's weights.

    Of a large layer some weights, evenly spaced, stand for all.
    """
    step = -(-weight.size // _SAMPLED) | 1  # odd: no power of two repeats a column
    weight = weight.reshape(-1)[::step].astype(np.float64)
    return float(np.square(np.rint(weight * factor) / factor - weight).mean())
