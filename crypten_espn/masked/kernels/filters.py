"""A layer's weights in the order in which the kernels of this processor read them.

Filters that one tile takes stand beside each other, channel after channel, so that a
small image's pass over many weights is one stream. How many those are is a matter of
the processor: nothing here is sent or stored.
"""

from __future__ import annotations

import numpy as np

from . import halves, winograd
from .ring import require, same_ring
from .tiles import VECTOR, widest


class Filters:
    """Weights made ready once, for any number of convolutions.

    Args:
        weight: (groups, kh, kw, channels / groups, filters / groups) ring elements, or
            (kh, kw, channels) for one filter per channel; int32 or int64.
        fast: whether by Winograd's F(2x2, 3x3), which is exact modulo 2**30 only; see
            `winograd.pays`.

    Attributes:
        shape, dtype: of `weight`.
        fast: as given.
        phases: how products are computed; see `halves`.
        packed: the elements, flat; of one filter per channel as they came.

    Raises: PlanError where the shape is none of these, or is not one for `fast`.
    """

    def __init__(self, weight: np.ndarray, *, fast: bool = False) -> None:
        fits = weight.ndim in (3, 5) and same_ring(weight)
        require(
            fits and (not fast or winograd.possible(weight.shape, weight.dtype)),
            "Filters",
            weight,
        )
        self.shape, self.dtype, self.fast = weight.shape, weight.dtype, fast
        self.packed, self.phases = weight, halves.WHOLE
        if weight.ndim == 5:
            taps = winograd.transformed(weight) if fast else weight
            self.phases = halves.phases(taps)
            self.packed = _packed(halves.rows(taps, self.phases))

    def __repr__(self) -> str:
        return f"Filters({self.dtype}{list(self.shape)})"


def _packed(weight: np.ndarray) -> np.ndarray:
    """By group and tile's width of filters, then by tap and channel."""
    groups, *_, filters = weight.shape
    lanes = VECTOR // weight.itemsize
    flat = np.ascontiguousarray(weight).reshape(groups, -1, filters)
    packed = np.empty_like(flat).reshape(groups, -1)
    taps = flat.shape[1]  # and channels
    vectored = filters - filters % lanes
    first = 0
    while first < filters:
        width = filters - vectored
        if first < vectored:
            width = widest(vectored - first, lanes) * lanes
        block = packed[:, taps * first : taps * (first + width)]
        block.reshape(groups, taps, width)[:] = flat[..., first : first + width]
        first += width
    return packed.reshape(-1)
