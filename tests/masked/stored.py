"""Folders of material for the tests of the store, and mutations of their files."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np

from crypten_espn.errors import MaterialError
from crypten_espn.masked.header import PAGE, Header, Identity, Layout
from crypten_espn.masked.store import DATA, MaterialStore
from crypten_espn.masked.store_writer import MaterialWriter

PLAN, SESSION = bytes(range(32)), b"s" * 16

#: Odd sizes, so that padding matters; one array is empty.
LAYOUT: Layout = (
    ((2, 3, 5), np.dtype(np.int32)),
    ((0, 4), np.dtype(np.int64)),
    ((1021,), np.dtype(np.int64)),
    ((16,), np.dtype(np.uint8)),
)


def arrays(index: int) -> list[np.ndarray]:
    """The content of a record, another one for each index."""
    draws = np.random.default_rng(index)
    return [
        draws.integers(0, 100, shape, dtype=np.int64).astype(dtype)
        for shape, dtype in LAYOUT
    ]


def identity(count: int = 3, **changes: object) -> Identity:
    fields = {
        "session": SESSION, "rank": 0, "batch": 2, "count": count, "plan": PLAN
    }  # fmt: skip
    return Identity(**{**fields, **changes})  # type: ignore[arg-type]


def write(folder: Path, count: int = 3, **changes: object) -> Path:
    """A folder with records of `identity(count, **changes)`; its data file."""
    made_for = identity(count, **changes)
    with MaterialWriter(folder, identity=made_for, layout=LAYOUT) as writer:
        for index in made_for.indices:
            writer.add(index, arrays(index))
    return folder / DATA


def store(folder: Path, **changes: object) -> MaterialStore:
    options = {"rank": 0, "plan": PLAN, "layout": lambda batch: LAYOUT}
    return MaterialStore(folder, **{**options, **changes})  # type: ignore[arg-type]


def equal(index: int, found: list[np.ndarray]) -> bool:
    """Whether a record holds what was written for the index."""
    return all(
        one.dtype == two.dtype and np.array_equal(one, two)
        for one, two in zip(arrays(index), found, strict=True)
    )


def refused(folder: Path, *, count: int, seed: int) -> int:
    """Mutate a folder's file `count` times and use it; how often that was refused.

    Half of the mutations hit the header or the journal. Record 0 was used; what is not
    refused must be records 1 and 2 as they were written.

    Raises:
        AssertionError: another record came.
        Exception: anything but a MaterialError.
    """
    draws = random.Random(seed)
    path = write(folder)
    store(folder).take()
    original = path.read_bytes()
    found = 0
    for _ in range(count):
        path.write_bytes(_mutated(original, draws))
        try:
            opened = store(folder)
            opened.read_ahead()
            for index in (1, 2):
                record = opened.take()
                assert record.index == index and equal(index, record.arrays)
        except MaterialError:
            found += 1
    return found


def _mutated(original: bytes, draws: random.Random) -> bytes:
    data = bytearray(original)
    header = len(Header.from_page(original[:PAGE], Path()).text) + 28
    kind = draws.randrange(6)
    if kind == 0:
        return bytes(data[: draws.randrange(len(data))])
    if kind == 1:
        return bytes(data) + bytes(draws.randrange(1, 2 * PAGE))
    if kind == 2:  # a number of another size, somewhere in the header
        at = draws.randrange(8, header)
        data[at : at + 8] = draws.randbytes(8)
        return bytes(data[: len(original)])
    if kind == 3:
        at = PAGE + draws.randrange(24)
    else:
        at = draws.randrange(header if kind == 4 else len(data))
    for _ in range(draws.randrange(1, 4)):
        data[at] = draws.randrange(256)
        at = (at + draws.randrange(3)) % len(data)
    return bytes(data)


def run_and_wait(function: Callable[..., None], *args: object) -> int | None:
    """Run a module's function in a process of its own; its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["crypten_espn"])
    process = context.Process(target=function, args=args)
    process.start()
    process.join()
    return process.exitcode
