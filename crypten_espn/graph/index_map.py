"""A public index map: which element of its inputs each element of a value is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

NOTHING = -1


@dataclass(frozen=True, eq=False)
class IndexMap:
    """Slices, transposes, shuffles, concatenations and zero pads, all in one.

    Args:
        index: int64, of the shape of the result without the batch. Elements of the
            inputs are counted through, one input after the other, each in torch's
            order without the batch; -1 stands for zero.
    """

    index: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the result, without the batch."""
        return tuple(self.index.shape)

    @property
    def has_zeros(self) -> bool:
        """Whether some elements are of no input."""
        return bool((self.index == NOTHING).any())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IndexMap) and np.array_equal(self.index, other.index)

    def __hash__(self) -> int:
        return hash((self.shape, self.index.tobytes()))

    def __repr__(self) -> str:
        return f"IndexMap{self.shape}"


def counted(shape: tuple[int, ...]) -> np.ndarray:
    """Each element's own number, of a value of this shape without the batch."""
    return np.arange(math.prod(shape), dtype=np.int64).reshape(shape)
