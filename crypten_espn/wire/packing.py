"""Ring elements packed to the bits their ring has."""

from __future__ import annotations

import numpy as np

from ..compiled import compiled, heats


@compiled
def _pack(values: np.ndarray, bits: int, out: np.ndarray) -> None:
    mask = (np.uint64(1) << np.uint64(bits)) - np.uint64(1)
    word = np.uint64(0)
    filled = 0
    position = 0
    for i in range(values.shape[0]):
        value = np.uint64(values[i]) & mask
        word |= value << np.uint64(filled)
        filled += bits
        if filled >= 64:
            out[position] = word
            position += 1
            filled -= 64
            # A shift by 64 is undefined, hence the second branch.
            word = value >> np.uint64(bits - filled) if filled > 0 else np.uint64(0)
    if filled > 0:
        out[position] = word


@compiled
def _unpack(words: np.ndarray, bits: int, out: np.ndarray) -> None:
    mask = (np.uint64(1) << np.uint64(bits)) - np.uint64(1)
    position = 0
    used = 0
    for i in range(out.shape[0]):
        value = words[position] >> np.uint64(used)
        used += bits
        if used >= 64:
            position += 1
            used -= 64
            if used > 0:
                value |= words[position] << np.uint64(bits - used)
        out[i] = value & mask


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` elements of the ring modulo 2**bits take on the wire."""
    return (count * bits + 7) // 8


def pack(values: np.ndarray, *, bits: int) -> memoryview:
    """Pack ring elements to `bits` bits each, little-endian, without gaps.

    Args:
        values: int32 or int64, any shape; each stands for itself modulo 2**bits.
        bits: width of the ring, 1 to 64.

    Returns: `packed_bytes(values.size, bits)` bytes. Widths equal to the type's own
        are not copied: the view shares memory with a contiguous `values`.
    """
    flat = np.ascontiguousarray(values).reshape(-1)
    if flat.size == 0:
        return memoryview(b"")
    if bits == flat.dtype.itemsize * 8:
        return flat.data.cast("B")
    if bits == 32:
        return flat.astype(np.int32).data.cast("B")
    words = np.empty((flat.size * bits + 63) // 64, dtype=np.uint64)
    _pack(flat, bits, words)
    return words.data.cast("B")[: packed_bytes(flat.size, bits)]


def unpack(data: memoryview | bytes, count: int, *, bits: int) -> np.ndarray:
    """Undo `pack`: int32 for up to 32 bits, int64 for more.

    Values lie in [0, 2**bits), save that a 32-bit or 64-bit ring fills its type.
    """
    if bits in (32, 64):
        dtype = np.int32 if bits == 32 else np.int64
        whole = np.frombuffer(data, dtype=dtype, count=count)
        # A part of a message may start at any byte; kernels want it aligned.
        return whole if whole.flags.aligned else whole.copy()
    # One word more than the data needs, so the last element may read past its end.
    words = np.zeros((count * bits + 63) // 64 + 1, dtype=np.uint64)
    words.view(np.uint8)[: len(data)] = np.frombuffer(data, dtype=np.uint8)
    out = np.empty(count, dtype=np.int32 if bits < 32 else np.int64)
    _unpack(words, bits, out)
    return out


@heats
def _pack_and_unpack() -> None:
    for bits in (7, 33):
        for dtype in (np.int32, np.int64):
            values = np.ones(3, dtype=dtype)
            unpack(pack(values, bits=bits), 3, bits=bits)
            values.flags.writeable = False  # what `unpack` may return: another type
            pack(values, bits=bits)
