"""Memory of large arrays: used again, or asked for in one piece.

Fresh memory is cleared by the kernel page by page before it is written, which takes
longer than most of what is computed there.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import DTypeLike

from .linear import Shape
from .messages import AHEAD

_LINE = 64  # arrays start at multiples of it: a line of any processor's cache


class Space:
    """Memory that is used again: a name's array takes that of the one before."""

    def __init__(self) -> None:
        self._held: dict[str, np.ndarray] = {}
        # By name, which message each piece of memory was last for.
        self._last: dict[str, list[int]] = {}
        self._messages = 0

    def array(self, name: str, shape: Shape, dtype: DTypeLike) -> np.ndarray:
        """An array with whatever was there; the last one of this name is given up."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        held = self._held.get(name)
        if held is None or held.size < size:
            held = self._held[name] = np.empty(size, dtype=np.uint8)
        return held[:size].view(dtype).reshape(shape)

    def message(self, name: str, shape: Shape, dtype: DTypeLike) -> np.ndarray:
        """An array for the next message, while `AHEAD` before it may still be read."""
        self._messages += 1
        last = self._last.setdefault(name, [])
        free = (k for k, when in enumerate(last) if when < self._messages - AHEAD)
        place = next(free, len(last))
        last[place:] = [self._messages, *last[place + 1 :]]
        return self.array(f"{name} {place}", shape, dtype)


def in_one_piece(layout: tuple[tuple[Shape, np.dtype], ...]) -> list[np.ndarray]:
    """New arrays of these shapes and types, side by side.

    Large memory comes in large pages, which are cleared several times as fast as many
    small ones: what is kept for an inference is asked for at once.
    """
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in layout]
    rooms = [-(-size // _LINE) * _LINE for size in sizes]
    whole = np.empty(sum(rooms), dtype=np.uint8)
    found, start = [], 0
    for (shape, dtype), size, room in zip(layout, sizes, rooms, strict=True):
        found.append(whole[start : start + size].view(dtype).reshape(shape))
        start += room
    return found
