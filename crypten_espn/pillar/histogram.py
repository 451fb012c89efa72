"""What each channel of an activation sees, counted in bounded memory."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# A bin is a float32's exponent and first bits after it: 1.6 % wide anywhere.
_BITS_KEPT = 6
_SHIFT = 23 - _BITS_KEPT
# From 2**-24 to 2**40; what is smaller or larger is counted in the first or last bin.
_FIRST = (127 - 24) << _BITS_KEPT
_BINS = 64 << _BITS_KEPT


class ChannelHistogram:
    """Counts of each channel's values by sign and size; channels are axis 1.

    Counted where the values are, on a device too; everything read is on the processor.
    """

    def __init__(self) -> None:
        self.channels = 0
        self._counts = torch.zeros(0, dtype=torch.int64)
        self._low = self._high = torch.zeros(0)

    def add(self, x: Tensor) -> None:
        """Count (batch, channels, ...), all finite, of as many channels as before."""
        x = x.detach().float().transpose(0, 1).flatten(1).contiguous()
        if not self.channels:
            self.channels, bins = len(x), 2 * len(x) * _BINS
            self._counts = torch.zeros(bins, dtype=torch.int64, device=x.device)
            self._low, self._high = x.amin(1), x.amax(1)
        self._low = torch.minimum(self._low, x.amin(1))
        self._high = torch.maximum(self._high, x.amax(1))
        size = (x.abs().view(torch.int32) >> _SHIFT).sub_(_FIRST).clamp_(0, _BINS - 1)
        channel = torch.arange(self.channels, device=x.device).unsqueeze(1)
        index = ((channel * 2 + (x < 0).int()) * _BINS + size).flatten()
        self._counts += torch.bincount(index, minlength=len(self._counts))

    @property
    def counts(self) -> Tensor:
        """(channels, 2, bins) int64: how many values, positive ones first."""
        return self._counts.cpu().view(self.channels, 2, _BINS)

    @property
    def constant(self) -> Tensor:
        """(channels,) whether all values of a channel are the same."""
        return (self._low == self._high).cpu()

    @property
    def largest(self) -> np.ndarray:
        """(channels,) float64: the largest |x|."""
        ends = torch.maximum(self._low.abs(), self._high.abs())
        return np.asarray(ends.cpu().double().numpy())

    def percentile(self, percent: float) -> np.ndarray:
        """(channels,) float64: |x| that `percent` of a channel's values do not exceed.

        The upper end of a bin, at most 1.6 % above the truth; never above the largest.
        """
        both = self.counts.sum(1)
        running = both.cumsum(1)
        rank = (running[:, -1:].double() * percent / 100).ceil().long()
        index = torch.searchsorted(running, rank).squeeze(1).numpy()
        return np.asarray(np.minimum(_edges()[index + 1], self.largest))

    def shares(self, radii: np.ndarray, count: int) -> np.ndarray:
        """(channels, count) float64: the share of values in each cell of [-R, R].

        What lies outside counts in the cell at that end.
        """
        edges = _edges()
        middle = (edges[:-1] + edges[1:]) / 2
        counts = self.counts.numpy()
        result = np.zeros((self.channels, count))
        for c, radius in enumerate(radii):
            for side, sign in enumerate((1.0, -1.0)):
                used = np.flatnonzero(counts[c, side])
                place = (sign * middle[used] / radius + 1.0) * (count / 2)
                place = np.clip(place.astype(np.int64), 0, count - 1)
                np.add.at(result[c], place, counts[c, side, used])
        total = result.sum(1, keepdims=True)
        shares: np.ndarray = result / np.maximum(total, 1.0)
        return shares


def _edges() -> np.ndarray:
    """(bins + 1,) float64: where the bins of |x| begin and end."""
    bits = (np.arange(_BINS + 1, dtype=np.int32) + _FIRST) << _SHIFT
    edges = bits.astype(np.int32).view(np.float32).astype(np.float64)
    edges[0] = 0.0
    return edges
