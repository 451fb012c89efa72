"""Packing to the bits of a ring is exact and without gaps, whole or by blocks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crypten_espn.wire.packing import (
    BLOCK,
    GROUP,
    pack,
    packed_bytes,
    packing,
    unpack,
    unpacking,
)

WIDTHS = (1, 7, 17, 24, 31, 32, 33, 48, 63, 64)


def random(count, dtype=np.int64, seed=0):
    words = np.random.default_rng(seed).bytes(np.dtype(dtype).itemsize * count)
    return np.frombuffer(words, dtype=dtype)


def as_integer(values, bits):
    """Elements one after the other as one integer, little-endian."""
    mask = (1 << bits) - 1
    text = "".join(f"{int(v) & mask:0{bits}b}" for v in reversed(values))
    return int(text or "0", 2)


@settings(max_examples=80, deadline=None)
@given(bits=st.integers(1, 64), count=st.integers(0, 200), seed=st.integers(0, 2**31))
def test_pack_is_exact_and_tight(bits, count, seed):
    values = random(count, seed=seed)
    packed = bytes(pack(values, bits=bits))
    assert len(packed) == packed_bytes(count, bits)
    number = as_integer(values, bits)
    assert packed == number.to_bytes(packed_bytes(count, bits), "little")
    back = unpack(packed, count, bits=bits)
    mask = (1 << bits) - 1
    assert [int(v) & mask for v in back] == [int(v) & mask for v in values]
    # Into a given array, from bytes that start anywhere.
    place = np.zeros_like(back)
    shifted = memoryview(b"." + packed)[1:]
    assert unpack(shifted, count, bits=bits, out=place) is place
    assert np.array_equal(place, back)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("bits", [1, 7, 17, 24, 31, 33, 48, 63])
def test_a_group_s_columns_are_packed_each_by_itself(bits, dtype):
    values = random(2 * GROUP + 9, dtype)
    packed = bytes(pack(values, bits=bits))
    whole = packed_bytes(GROUP, bits)
    for group in range(2):
        words = np.frombuffer(packed[group * whole : (group + 1) * whole], np.uint64)
        elements = values[group * GROUP : (group + 1) * GROUP]
        for column in (0, 5, 63):
            number = as_integer(elements[column::64], bits)
            assert words[column::64].tobytes() == number.to_bytes(8 * bits, "little")
    assert packed[2 * whole :] == bytes(pack(values[2 * GROUP :], bits=bits))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("count", [GROUP - 1, GROUP, BLOCK + 1, 2 * BLOCK + GROUP + 70])
def test_blocks_give_the_bytes_of_the_whole_and_are_read_into_their_place(bits, count):
    for dtype in (np.int32, np.int64):
        values = random(count, dtype, seed=bits)
        packed = bytes(pack(values, bits=bits))
        assert len(packed) == packed_bytes(count, bits)
        parts = [(values[:5], 3), (values, bits), (values[:0], bits)]
        message = b"".join(bytes(block) for block in packing(parts))
        assert message == bytes(pack(values[:5], bits=3)) + packed
        place = [
            np.empty(5, np.int64),
            np.empty(count, np.int64),
            np.empty(0, np.int64),
        ]
        for out in (None, place):
            reading = unpacking([(v.size, width) for v, width in parts], out)
            found = read(reading, message)
            assert out is None or all(a is b for a, b in zip(found, out, strict=True))
            for got, (given_values, width) in zip(found, parts, strict=True):
                mask = np.int64(-1) if width == 64 else np.int64((1 << width) - 1)
                assert np.array_equal(
                    got.astype(np.int64) & mask, given_values.astype(np.int64) & mask
                )


def read(reading, data):
    """Fill the buffers that are asked for; what the reading returns."""
    start = 0
    try:
        while True:
            buffer = next(reading)
            buffer[:] = data[start : start + len(buffer)]
            start += len(buffer)
    except StopIteration as end:
        assert start == len(data)
        return end.value


def test_a_message_is_never_in_memory_as_a_whole():
    values = random(20 * BLOCK)
    largest = packed_bytes(BLOCK, 40)
    assert all(len(block) <= largest for block in packing([(values, 40)]))
    reading = unpacking([(values.size, 40)], [np.empty(values.size, np.int64)])
    assert all(len(buffer) <= largest for buffer in reading)
