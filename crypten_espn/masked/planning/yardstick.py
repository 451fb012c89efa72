"""What a logit's error would be with CrypTen's layers and protocol "espn"."""

from __future__ import annotations

import math

import numpy as np

from ...errors import PolynomialError
from ...protocols import FAILURE_BITS
from .calibration import Calibration
from .layers import Layer
from .precision import squares

_VALUE_BITS = 64 - FAILURE_BITS


def espn_error(calibration: Calibration, *, frac_bits: int) -> float:
    """Standard deviation of a logit's error with protocol "espn", truncated locally.

    1. A share loses its low bits at each party: the sum is off by less than a unit, by
       two roundings, a sixth of its square on average.
    2. So are what layers with weights, pools and activations give, at `frac_bits`; and
       the powers' input, at the coarser scale of the polynomial's form.
    3. Weights and inputs are rounded to nearest.

    A failed truncation is not in it.

    Args:
        calibration: of the network.
        frac_bits: of CrypTen's encoder.

    Error: within a factor of 2 of what bundled networks show; rather too small.
    """
    unit = 4.0**-frac_bits
    moved = calibration.input_error(frac_bits)
    for layer in calibration.network.layers.values():
        if layer.weighted or layer.activates or layer.form.divisor != 1:
            moved += layer.effect.rounding * unit / 6
        moved += layer.weight_effect * unit / 12
        if layer.form.polynomial is not None:
            moved += _powers(layer, frac_bits)
    return math.sqrt(moved / calibration.outputs)


def _powers(layer: Layer, frac_bits: int) -> float:
    """What the truncated input of an activation's powers does to the outputs."""
    slopes, steps = [], []
    for row in layer.rows:
        try:
            form = row.ring_form(frac_bits=frac_bits, out_bits=_VALUE_BITS)
        except PolynomialError:
            return 0.0  # the protocol does not compute it
        steps.append(float(1 / form.power_scale) if form.shift else 0.0)
        slopes.append([k * a if k > 1 else 0.0 for k, a in enumerate(row.coeffs)])
    table = np.zeros((max(map(len, slopes)), len(slopes)))
    for channel, slope in enumerate(slopes):
        table[: len(slope), channel] = slope
    error = {k - 1: column for k, column in enumerate(table) if k > 1}
    by_channel = squares(error, layer.effect.independent)
    return float((by_channel * np.square(steps)).sum() / 6)
