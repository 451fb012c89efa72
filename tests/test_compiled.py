"""Kernels are compiled before a protocol's time-outs start, all of them."""

from __future__ import annotations

import numpy as np
import pytest

from crypten_espn.compiled import heat, heats, variants
from crypten_espn.wire import packing


def test_after_heating_packing_at_any_width_compiles_nothing() -> None:
    heat()
    before = variants(packing.__name__)
    kernels = {"_pack", "_unpack", "_pack_groups", "_unpack_groups"}
    assert set(before) == kernels and all(before.values())
    for dtype in (np.int32, np.int64):
        values = np.arange(2 * packing.GROUP + 10, dtype=dtype)
        values.flags.writeable = False
        for given in (values, values.copy(), values[::2]):
            for bits in range(1, 65):
                packed = packing.pack(given, bits=bits)
                for data in (packed, bytes(packed)):
                    packing.unpack(data, given.size, bits=bits)
    assert variants(packing.__name__) == before


def test_heating_calls_what_was_registered_once() -> None:
    heat()
    calls: list[int] = []
    heats(lambda: calls.append(1))
    heat()
    heat()
    assert calls == [1]


def test_a_failure_while_heating_is_not_forgotten() -> None:
    heat()
    calls: list[int] = []

    @heats
    def fails_once() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError

    with pytest.raises(MemoryError):
        heat()
    heat()
    assert len(calls) == 2
