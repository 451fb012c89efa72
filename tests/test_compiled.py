"""Kernels are compiled before a protocol's time-outs start, all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


def test_a_cached_kernel_is_not_used_once_a_module_beside_it_has_changed(
    tmp_path: Path,
) -> None:
    """It has the other's function inlined, in machine code from before."""
    inner, outer = tmp_path / "inner.py", tmp_path / "outer.py"
    header = "from crypten_espn.compiled import compiled\n"
    outer.write_text(
        f"{header}from inner import one\n"
        "@compiled\ndef two():\n    return one() + 1\n"
        "print(two(), sum(two.stats.cache_hits.values()))\n"
    )

    def outcome(value: int) -> str:
        text = f"{header}@compiled\ndef one():\n    return {value}\n"
        if not inner.exists() or inner.read_text() != text:
            inner.write_text(text)
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
        env.pop("NUMBA_CACHE_DIR", None)
        done = subprocess.run(
            [sys.executable, str(outer)], env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.strip()

    assert [outcome(value) for value in (1, 1, 41)] == ["2 0", "2 1", "42 0"]
