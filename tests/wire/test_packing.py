"""Packing to the bits of a ring is exact and without gaps."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from crypten_espn.wire.packing import pack, packed_bytes, unpack


@settings(max_examples=80, deadline=None)
@given(bits=st.integers(1, 64), count=st.integers(0, 200), seed=st.integers(0, 2**31))
def test_pack_is_exact_and_tight(bits, count, seed):
    words = np.random.default_rng(seed).bytes(8 * count)
    values = np.frombuffer(words, dtype=np.int64)
    packed = bytes(pack(values, bits=bits))
    assert len(packed) == packed_bytes(count, bits)
    # Oracle: one Python integer, little-endian.
    mask = (1 << bits) - 1
    number = sum((int(v) & mask) << (i * bits) for i, v in enumerate(values))
    assert packed == number.to_bytes(packed_bytes(count, bits), "little")
    back = unpack(packed, count, bits=bits)
    assert [int(v) & mask for v in back] == [int(v) & mask for v in values]
    # Into a given array, from bytes that start anywhere.
    place = np.zeros_like(back)
    shifted = memoryview(b"." + packed)[1:]
    assert unpack(shifted, count, bits=bits, out=place) is place
    assert np.array_equal(place, back)
