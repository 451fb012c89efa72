"""Ring elements packed to the bits their ring has."""

from __future__ import annotations

from collections.abc import Sequence

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
def _unpack(words: np.ndarray, bits: int, first: int, out: np.ndarray) -> None:
    # Every element on its own, so that several are under way at once. It lies in two
    # words at most; a shift by 64 is undefined, hence the second one's two shifts.
    mask = (np.uint64(1) << np.uint64(bits)) - np.uint64(1)
    for i in range(out.shape[0]):
        place = first + i * bits
        position, used = place >> 6, np.uint64(place & 63)
        value = words[position] >> used
        value |= (words[position + 1] << np.uint64(1)) << (np.uint64(63) - used)
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


def unpack(
    data: memoryview | bytes, count: int, *, bits: int, out: np.ndarray | None = None
) -> np.ndarray:
    """Undo `pack`: int32 for up to 32 bits, int64 for more.

    Values lie in [0, 2**bits), save that a 32-bit or 64-bit ring fills its type.

    Args:
        data: `packed_bytes(count, bits)` bytes.
        out: (count,) contiguous, of that type; a new array if None.
    """
    dtype = np.dtype(np.int32 if bits <= 32 else np.int64)
    if bits in (32, 64):
        whole = np.frombuffer(data, dtype=dtype, count=count)
        if out is not None:
            out[:] = whole
            return out
        # A part of a message may start at any byte; kernels want it aligned.
        return whole if whole.flags.aligned else whole.copy()
    if out is None:
        out = np.empty(count, dtype=dtype)
    # An element may end in the word after its first: the last ones are read from a
    # copy with a word more.
    words = np.frombuffer(data, dtype=np.uint64, count=len(data) // 8)
    if not words.flags.aligned:
        words = words.copy()
    words.flags.writeable = False  # one type, whatever the bytes lie in
    whole_count = min(count, max(0, len(words) - 1) * 64 // bits)
    _unpack(words, bits, 0, out[:whole_count])
    start = whole_count * bits // 64
    rest = np.zeros(-(-count * bits // 64) - start + 1, dtype=np.uint64)
    tail = np.frombuffer(data, dtype=np.uint8)[8 * start :]
    rest.view(np.uint8)[: len(tail)] = tail
    rest.flags.writeable = False
    _unpack(rest, bits, whole_count * bits - 64 * start, out[whole_count:])
    return out


def unpack_parts(
    buffers: Sequence[memoryview | bytes],
    parts: Sequence[tuple[int, int]],
    out: Sequence[np.ndarray] | None = None,
) -> list[np.ndarray]:
    """A message's parts, each of so many elements and bits; see `unpack`."""
    places = [None] * len(parts) if out is None else out
    return [
        unpack(data, count, bits=bits, out=place)
        for data, (count, bits), place in zip(buffers, parts, places, strict=True)
    ]


@heats
def _pack_and_unpack() -> None:
    for bits in (7, 33):
        for dtype in (np.int32, np.int64):
            values = np.ones(3, dtype=dtype)
            unpack(pack(values, bits=bits), 3, bits=bits)
            values.flags.writeable = False  # what `unpack` may return: another type
            pack(values, bits=bits)
