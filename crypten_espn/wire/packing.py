"""Ring elements packed to the bits their ring has.

Elements travel in groups of 64 rows of 64, as a group of `bits` rows of 64 words. A
column of words holds a column of elements one after the other, little-endian, without
gaps. So a row of words comes from two or three rows of elements and the same shifts for
all 64, which is what vectors compute. What is left after the last whole group follows
one element after the other, likewise without gaps. A ring of 32 or 64 bits travels as
its type lies in memory.

Source: Lemire, Boytsov, "Decoding billions of integers per second through
vectorization", 2015, for words that lie across elements.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence

import numpy as np

from ..compiled import compiled, heats

_ACROSS = 64  # elements of a row, and rows of a group: one for each bit of a word
GROUP = _ACROSS**2
BLOCK = 8 * GROUP  # elements that stay in the second-level cache, packed and unpacked


@compiled
def _pack_groups(values: np.ndarray, bits: int, out: np.ndarray) -> None:
    """Groups of elements (n, 64, 64) into words (n, bits, 64)."""
    mask = np.uint64(0xFFFFFFFFFFFFFFFF) >> np.uint64(64 - bits)
    for g in range(out.shape[0]):
        for row in range(bits):
            words = out[g, row]
            i = 64 * row // bits
            # Bits of the first element that the word before has.
            taken = 64 * row - i * bits
            line, down = values[g, i], np.uint64(taken)
            for k in range(words.shape[0]):
                words[k] = (np.uint64(line[k]) & mask) >> down
            filled = bits - taken
            while filled < 64:
                i += 1
                line, up = values[g, i], np.uint64(filled)
                for k in range(words.shape[0]):
                    words[k] |= (np.uint64(line[k]) & mask) << up
                filled += bits


@compiled
def _unpack_groups(words: np.ndarray, bits: int, out: np.ndarray) -> None:
    """Undo `_pack_groups`."""
    mask = np.uint64(0xFFFFFFFFFFFFFFFF) >> np.uint64(64 - bits)
    for g in range(out.shape[0]):
        for i in range(out.shape[1]):
            line, row, used = out[g, i], i * bits // 64, i * bits % 64
            low, down = words[g, row], np.uint64(used)
            if used + bits <= 64:
                for k in range(line.shape[0]):
                    line[k] = (low[k] >> down) & mask
            else:
                high, up = words[g, row + 1], np.uint64(64 - used)
                for k in range(line.shape[0]):
                    line[k] = ((low[k] >> down) | (high[k] << up)) & mask


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
    # An element lies in two words at most, and the last one in the word before a spare
    # one; a shift by 64 is undefined, hence the second word's two shifts.
    mask = (np.uint64(1) << np.uint64(bits)) - np.uint64(1)
    for i in range(out.shape[0]):
        position, used = i * bits >> 6, np.uint64(i * bits & 63)
        value = words[position] >> used
        value |= (words[position + 1] << np.uint64(1)) << (np.uint64(63) - used)
        out[i] = value & mask


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` elements of the ring modulo 2**bits take on the wire."""
    return (count * bits + 7) // 8


def _type(bits: int) -> np.dtype:
    return np.dtype(np.int32 if bits <= 32 else np.int64)


def pack(values: np.ndarray, *, bits: int, out: np.ndarray | None = None) -> memoryview:
    """Pack ring elements to `bits` bits each; see the module's text.

    Args:
        values: int32 or int64, any shape; each stands for itself modulo 2**bits.
        bits: width of the ring, 1 to 64.
        out: uint64, where the bytes go if there is anything to pack; a new array if
            None.

    Returns: `packed_bytes(values.size, bits)` bytes. Widths equal to the type's own
        are not copied: the view shares memory with a contiguous `values`.
    """
    flat = np.ascontiguousarray(values).reshape(-1)
    if flat.size == 0:
        return memoryview(b"")
    if bits == flat.dtype.itemsize * 8:
        return flat.data.cast("B")
    if bits in (32, 64):
        return flat.astype(_type(bits)).data.cast("B")
    whole = flat.size // GROUP
    middle = whole * _ACROSS * bits
    words = np.empty(-(-flat.size * bits // 64), np.uint64) if out is None else out
    if whole:
        grouped = flat[: whole * GROUP].reshape(whole, _ACROSS, _ACROSS)
        _pack_groups(grouped, bits, words[:middle].reshape(whole, bits, _ACROSS))
    if flat.size % GROUP:
        _pack(flat[whole * GROUP :], bits, words[middle:])
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
    dtype = _type(bits)
    if bits in (32, 64):
        given = np.frombuffer(data, dtype=dtype, count=count)
        if out is not None:
            out[:] = given
            return out
        # A part of a message may start at any byte; kernels want it aligned.
        return given if given.flags.aligned else given.copy()
    if out is None:
        out = np.empty(count, dtype=dtype)
    whole = count // GROUP
    middle = whole * _ACROSS * bits
    if whole:
        words = np.frombuffer(data, dtype=np.uint64, count=middle)
        if not words.flags.aligned:
            words = words.copy()
        words.flags.writeable = False  # one type, whatever the bytes lie in
        grouped = out[: whole * GROUP].reshape(whole, _ACROSS, _ACROSS)
        _unpack_groups(words.reshape(whole, bits, _ACROSS), bits, grouped)
    if count % GROUP:
        rest = np.zeros(-(-(count % GROUP) * bits // 64) + 1, dtype=np.uint64)
        tail = np.frombuffer(data, dtype=np.uint8)[8 * middle :]
        rest.view(np.uint8)[: len(tail)] = tail
        _unpack(rest, bits, out[whole * GROUP :])
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


# ------------------------------------------------ without the whole of it in memory


def _blocks(count: int) -> Iterator[slice]:
    """So many elements in pieces that, packed one by one, give the whole's bytes."""
    for start in range(0, count, BLOCK):
        yield slice(start, min(start + BLOCK, count))


def packing(parts: Iterable[tuple[np.ndarray, int]]) -> Iterator[memoryview]:
    """What `pack` makes of each part, block by block; the next overwrites a block."""
    words = np.empty(0, dtype=np.uint64)
    for values, bits in parts:
        if bits == 8 * values.itemsize:
            yield pack(values, bits=bits)
            continue
        if len(words) < min(BLOCK, values.size):
            words = np.empty(min(BLOCK, values.size), dtype=np.uint64)
        flat = np.ascontiguousarray(values).reshape(-1)
        for piece in _blocks(flat.size):
            yield pack(flat[piece], bits=bits, out=words)


def unpacking(
    parts: Sequence[tuple[int, int]], out: Sequence[np.ndarray] | None
) -> Generator[memoryview, None, list[np.ndarray]]:
    """What `unpack` makes of each part, from the buffers that this asks to be filled.

    Args:
        parts: elements and bits of each.
        out: where the elements go; new arrays if None.
    """
    if out is None:
        out = [np.empty(count, dtype=_type(bits)) for count, bits in parts]
    largest = max((packed_bytes(min(BLOCK, n), bits) for n, bits in parts), default=0)
    block = np.empty(largest, dtype=np.uint8).data
    for place, (count, bits) in zip(out, parts, strict=True):
        if count and bits == 8 * place.itemsize:
            yield place.data.cast("B")
            continue
        for piece in _blocks(count):
            values = place[piece]
            data = block[: packed_bytes(values.size, bits)]
            yield data
            unpack(data, values.size, bits=bits, out=values)
    return list(out)


@heats
def _pack_and_unpack() -> None:
    for bits in (7, 33):
        for dtype in (np.int32, np.int64):
            values = np.ones(GROUP + 3, dtype=dtype)
            unpack(pack(values, bits=bits), values.size, bits=bits)
            values.flags.writeable = False  # what `unpack` may return: another type
            pack(values, bits=bits)
