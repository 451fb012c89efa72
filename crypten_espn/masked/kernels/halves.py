"""Products modulo 2**32 out of halves of 16 bits.

Some processors multiply two pairs of 16-bit integers and add both products to a sum of
32 bits in one instruction, where one product of 32 bits and its addition take three.
With x = 2**16 h + l, both halves signed, and weights likewise,

    x * w = l * w_l + 2**16 * (h * w_l + l * w_h)    modulo 2**32.

So a tile first sums what counts 2**16 times, two channels at once, shifts, and goes
on with the lower products: two phases where all weights fit 16 bits (w_h is 0), else
three.

Layout. A pixel's channels are their low halves, then their high ones. A tap's filters
are rows, a row two channels' halves for every filter: w_l of all channels, then w_h. A
phase is where it starts: bytes into a pixel, rows into a tap.
"""

from __future__ import annotations

import numpy as np
from llvmlite import binding

from ...compiled import compiled
from .tiles import FEATURES, VECTOR, Phases

#: Elements as they came: one phase.
WHOLE: Phases = ((0, 0),)
_FUSED = ("avx512vnni" if VECTOR == 64 else "avxvnni") in FEATURES
# Weights of 16 bits take 2 instructions for two products, wider ones 3. Against those a
# processor that does 32 bits in one multiplication, as AMD's do, is as fast with it.
SHORT = _FUSED
LONG = _FUSED and not binding.get_host_cpu_name().startswith("znver")


def phases(weight: np.ndarray) -> Phases:
    """How a layer's products are computed on this processor.

    Args:
        weight: (groups, ..., channels, filters) ring elements.
    """
    groups, *_, channels, filters = weight.shape
    if weight.dtype != np.int32 or filters % (VECTOR // 4):
        return WHOLE
    if (channels % 2 and groups > 1) or channels == 1:  # no pairs
        return WHOLE
    inside = 2 * even(groups * channels)  # bytes of the low halves
    if SHORT and weight.min() >= -(1 << 15) and weight.max() < 1 << 15:
        return (inside, 0), (0, 0)
    if LONG:
        return (inside, 0), (0, even(channels) // 2), (0, 0)
    return WHOLE


def rows(weight: np.ndarray, phases: Phases) -> np.ndarray:
    """The weights as a tile reads them: (..., rows, filters)."""
    if len(phases) == 1:
        return weight
    if weight.shape[-2] % 2:
        last = [(0, 0)] * (weight.ndim - 2) + [(0, 1), (0, 0)]
        weight = np.pad(weight, last)
    half = weight.shape[-2] // 2
    shape = *weight.shape[:-2], half * (len(phases) - 1), weight.shape[-1]
    out = np.empty(shape, dtype=np.int32)
    for k in range(len(phases) - 1):
        part = weight if k == 0 else _high(weight)
        here = out[..., k * half : (k + 1) * half, :]
        np.left_shift(part[..., 1::2, :], 16, out=here)
        here |= part[..., 0::2, :] & 0xFFFF
    return out


def split(x: np.ndarray, pads: tuple[int, int, int, int]) -> np.ndarray:
    """A padded pixel's channels in halves, an odd last channel beside a zero.

    Args:
        x: (batch, height, width, channels) int32.
        pads: zeros at top, left, bottom, right.

    Returns: (batch, *padded, 2 * channels) int16, of an odd number 2 more.
    """
    top, left, bottom, right = pads
    n, h, w, c = x.shape
    shape = n, h + top + bottom, w + left + right, 2 * even(c)
    out = np.zeros(shape, dtype=np.int16)
    _split(np.ascontiguousarray(x), top, left, out)
    return out


@compiled
def _split(x: np.ndarray, top: int, left: int, out: np.ndarray) -> None:
    batch, height, width, channels = x.shape
    high = out.shape[3] // 2
    for n in range(batch):
        for h in range(height):
            for w in range(width):
                pixel, halves = x[n, h, w], out[n, top + h, left + w]
                for c in range(channels):
                    value = np.int64(pixel[c])
                    halves[c] = np.int16(value)
                    halves[high + c] = np.int16((value + (1 << 15)) >> 16)


def even(channels: int) -> int:
    """Channels with the one that fills up a pair."""
    return channels + channels % 2


def _high(weight: np.ndarray) -> np.ndarray:
    """What is left of an element without its low half, which has a sign."""
    high: np.ndarray = ((weight >> 15) + 1) >> 1
    return high
