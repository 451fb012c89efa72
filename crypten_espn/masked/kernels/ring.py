"""Ring elements as numpy integers: types, masks, representatives."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ...errors import PlanError

_WORDS = {np.dtype(np.int32), np.dtype(np.int64)}


def ring_dtype(bits: int) -> type[np.signedinteger]:
    """int32 for rings of at most 32 bits, int64 for wider ones."""
    return np.int32 if bits <= 32 else np.int64


def ring_mask(bits: int) -> int:
    """2**bits - 1 as the int64 with the same 64 bits."""
    return -1 if bits == 64 else (1 << bits) - 1


def reduce_ring(values: np.ndarray, bits: int) -> np.ndarray:
    """Representatives in [0, 2**bits), or the type's own wrap for 32 and 64 bits."""
    if bits in (32, 64) and values.dtype == ring_dtype(bits):
        return values
    if bits == 32:
        return values.astype(np.int32)
    return (values & ring_mask(bits)).astype(ring_dtype(bits))


def centred(values: np.ndarray, bits: int) -> np.ndarray:
    """Representatives in [-2**(bits-1), 2**(bits-1)) as int64."""
    if bits == 64:
        return values.astype(np.int64)
    shift = 64 - bits
    return (values.astype(np.int64) << shift) >> shift


def same_ring(*arrays: np.ndarray) -> bool:
    """Whether all have one type that kernels were written for, int32 or int64."""
    dtypes = {array.dtype for array in arrays}
    return len(dtypes) == 1 and dtypes <= _WORDS


class Shaped(Protocol):
    """An array, or what stands for one."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...


def within(low: int, values: np.ndarray, high: int) -> bool:
    """Whether low <= v < high for each of a few numbers; numpy's own take longer."""
    return all(low <= value < high for value in values.tolist())


def require(fits: bool, kernel: str, *arrays: Shaped) -> None:
    """Refuse a kernel's arguments whose shapes do not belong together.

    Raises: PlanError with the shapes; nothing was read or written.
    """
    if not fits:
        shapes = ", ".join(f"{a.dtype}{list(a.shape)}" for a in arrays)
        raise PlanError(
            f"{kernel} was given {shapes}, which do not belong together: the plan and "
            "the material are not of one network."
        )
