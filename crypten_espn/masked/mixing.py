"""Public weighted sums along an axis, as a plan writes them."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from msgspec import Meta

# By element of a result: the first element it reads, and their weights.
Weights = Annotated[
    tuple[Annotated[int, Meta(ge=-(1 << 16), le=1 << 16)], ...],
    Meta(min_length=1, max_length=1 << 12),
]
Windows = Annotated[
    tuple[tuple[Annotated[int, Meta(ge=0, le=1 << 26)], Weights], ...],
    Meta(min_length=1, max_length=1 << 12),
]


def weigh(x: np.ndarray, windows: Windows, axis: int, out: np.ndarray) -> None:
    """Add weighted sums along an axis, a tap of every window at once."""
    longest = max(len(weights) for _, weights in windows)
    shape = [-1 if a == axis else 1 for a in range(x.ndim)]
    for tap in range(longest):
        here = [i for i, (_, weights) in enumerate(windows) if tap < len(weights)]
        places = [windows[i][0] + tap for i in here]
        factors = np.array([windows[i][1][tap] for i in here]).astype(out.dtype)
        into = (slice(None),) * axis + (here,)
        out[into] += x.take(places, axis) * factors.reshape(shape)
