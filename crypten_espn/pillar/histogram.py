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


class CellMeans:
    """What a function was meant to give where a channel's input fell, cell by cell.

    Args:
        radii: (channels,) float64, R of every channel; its cells divide [-R, R].
        cells: how many.
    """

    def __init__(self, radii: np.ndarray, cells: int) -> None:
        self.radii, self.cells = radii, cells
        self._counts = torch.zeros(len(radii) * cells, dtype=torch.float64)
        self._sums = self._counts.clone()

    def add(self, x: Tensor, meant: Tensor) -> None:
        """Count inputs (batch, channels, ...) and what was meant there, that shape.

        What lies outside [-R, R] counts in the cell at that end.
        """
        radii = torch.from_numpy(self.radii).to(x.device, torch.float32)
        flat = x.detach().float().transpose(0, 1).flatten(1) / radii.unsqueeze(1)
        cell = flat.add_(1).mul_(self.cells / 2).long().clamp_(0, self.cells - 1)
        cell += torch.arange(len(radii), device=x.device).unsqueeze(1) * self.cells
        index, size = cell.flatten(), len(self._counts)
        values = meant.detach().double().transpose(0, 1).flatten()
        self._counts += torch.bincount(index, minlength=size).cpu()
        self._sums += torch.bincount(index, values, minlength=size).cpu()

    def shares(self) -> np.ndarray:
        """(channels, cells) float64: the share of a channel's inputs in each cell."""
        counts = self._counts.view(-1, self.cells)
        return np.asarray((counts / counts.sum(1, keepdim=True).clamp_min(1)).numpy())

    def means(self, otherwise: np.ndarray) -> np.ndarray:
        """(channels, cells) float64: the mean of what was meant in each cell.

        Args:
            otherwise: the same shape, for cells where no input fell.
        """
        counts, sums = (t.view(-1, self.cells) for t in (self._counts, self._sums))
        means = torch.where(counts > 0, sums / counts, torch.from_numpy(otherwise))
        return np.asarray(means.numpy())


def _edges() -> np.ndarray:
    """(bins + 1,) float64: where the bins of |x| begin and end."""
    bits = (np.arange(_BINS + 1, dtype=np.int32) + _FIRST) << _SHIFT
    edges = bits.astype(np.int32).view(np.float32).astype(np.float64)
    edges[0] = 0.0
    return edges
