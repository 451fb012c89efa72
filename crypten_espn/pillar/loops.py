"""Compiled loops over tensors of float32 and bfloat16, read as they lie in memory.

A loop knows of channels by a table of their numbers. Where a channel's elements lie
beside each other it is (numbers, channels): a column stands for `run` elements, then
comes the next. Else it is (numbers, 1, run): a column an element, for as many elements
as it takes until the channels begin again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from ..compiled import compiled

BLOCK = 1024  # elements whose intermediate values stay in the first-level cache


def _read(part: np.ndarray, bits: np.ndarray) -> None:
    """Put a block of elements, widened to float32, into the memory of bits."""


@overload(_read, strict=False)  # the loops are annotated as what they get
def _(part: types.Array, bits: types.Array) -> Callable[[np.ndarray, np.ndarray], None]:
    if part.dtype.name == "uint16":

        def read(part: np.ndarray, bits: np.ndarray) -> None:
            for k in range(part.size):
                bits[k] = np.uint32(part[k]) << np.uint32(16)

    else:

        def read(part: np.ndarray, bits: np.ndarray) -> None:
            value = bits.view(np.float32)
            for k in range(part.size):
                value[k] = part[k]

    return read


def _write(bits: np.ndarray, part: np.ndarray) -> None:
    """Put float32 values into a block of elements, rounded to nearest, ties even."""


@overload(_write, strict=False)
def _(bits: types.Array, part: types.Array) -> Callable[[np.ndarray, np.ndarray], None]:
    if part.dtype.name == "uint16":

        def write(bits: np.ndarray, part: np.ndarray) -> None:
            for k in range(part.size):
                odd = (bits[k] >> np.uint32(16)) & np.uint32(1)
                part[k] = np.uint16(
                    (bits[k] + np.uint32(0x7FFF) + odd) >> np.uint32(16)
                )

    else:

        def write(bits: np.ndarray, part: np.ndarray) -> None:
            value = bits.view(np.float32)
            for k in range(part.size):
                part[k] = value[k]

    return write


def _row(table: np.ndarray, which: int, start: int, run: int, count: int) -> Any:
    """A number for `count` elements from `start` on: one, or one for each."""


@overload(_row, strict=False)
def _(
    table: types.Array, which: int, start: int, run: int, count: int
) -> Callable[..., Any]:
    if table.ndim == 2:

        def row(table: np.ndarray, which: int, start: int, run: int, count: int) -> Any:
            return table[which, (start // run) % table.shape[1]]

    else:

        def row(table: np.ndarray, which: int, start: int, run: int, count: int) -> Any:
            place = start % run
            return table[which, 0, place : place + count]

    return row


def _at(row: Any, k: int) -> Any:
    """A row's number for element k."""


@overload(_at, strict=False)
def _(row: types.Type, k: int) -> Callable[..., Any]:
    if isinstance(row, types.Array):

        def at(row: Any, k: int) -> Any:
            return row[k]

    else:

        def at(row: Any, k: int) -> Any:
            return row

    return at


@compiled
def _count(size: int, start: int, run: int) -> int:
    """Elements from `start` on that a block takes: it ends where a run does."""
    return min(BLOCK, size - start, run - start % run)


@compiled
def _horner_block(
    total: np.ndarray,
    value: np.ndarray,
    table: np.ndarray,
    start: int,
    run: int,
    count: int,
) -> None:
    """Sum the terms whose coefficients are the rows of a table after its first two."""
    top = _row(table, table.shape[0] - 1, start, run, count)
    for k in range(count):
        total[k] = _at(top, k)
    for power in range(table.shape[0] - 2, 1, -1):
        # The compiler cannot know that a number stays the same.
        coeff = _row(table, power, start, run, count)
        for k in range(count):
            total[k] = total[k] * value[k] + _at(coeff, k)


@compiled
def polynomial(x: np.ndarray, out: np.ndarray, table: np.ndarray, run: int) -> None:
    """p(x) of x clipped; rows: low, high, coefficients from the constant on."""
    bits, sums = np.empty(BLOCK, np.uint32), np.empty(BLOCK, np.uint32)
    value, total = bits.view(np.float32), sums.view(np.float32)
    start = 0
    while start < x.size:
        count = _count(x.size, start, run)
        _read(x[start : start + count], bits)
        low = _row(table, 0, start, run, count)
        high = _row(table, 1, start, run, count)
        for k in range(count):
            v = value[k]
            v = _at(low, k) if v < _at(low, k) else v
            value[k] = _at(high, k) if v > _at(high, k) else v
        _horner_block(total, value, table, start, run, count)
        _write(sums, out[start : start + count])
        start += count


@compiled
def slope(
    x: np.ndarray, gradient: np.ndarray, out: np.ndarray, table: np.ndarray, run: int
) -> None:
    """gradient * q(x), zero where x is not inside; rows as of `polynomial`."""
    bits, sums = np.empty(BLOCK, np.uint32), np.empty(BLOCK, np.uint32)
    incoming = np.empty(BLOCK, np.uint32)
    value, total = bits.view(np.float32), sums.view(np.float32)
    passed = incoming.view(np.float32)
    start = 0
    while start < x.size:
        count = _count(x.size, start, run)
        _read(x[start : start + count], bits)
        _read(gradient[start : start + count], incoming)
        _horner_block(total, value, table, start, run, count)
        low = _row(table, 0, start, run, count)
        high = _row(table, 1, start, run, count)
        for k in range(count):
            stopped = value[k] <= _at(low, k) or value[k] >= _at(high, k)
            total[k] = np.float32(0) if stopped else total[k] * passed[k]
        _write(sums, out[start : start + count])
        start += count


@compiled
def power_sum(
    x: np.ndarray, table: np.ndarray, run: int, half: int, bend: np.float32
) -> float:
    """Sum of t**(2 * half), t = |x * inverse|; row: inverse.

    Beyond `bend`, which may be infinite, its tangent there goes on.
    """
    bits, products = np.empty(BLOCK, np.uint32), np.empty(BLOCK, np.float32)
    value = bits.view(np.float32)
    # What the tangent's rise is of the power's own value there.
    rise = np.float32(2 * half) / bend
    total = 0.0
    start = 0
    while start < x.size:
        count = _count(x.size, start, run)
        _read(x[start : start + count], bits)
        inverse = _row(table, 0, start, run, count)
        for k in range(count):
            t = abs(value[k] * _at(inverse, k))
            beyond = t - bend if t > bend else np.float32(0)
            products[k] = np.float32(1) + beyond * rise
            value[k] = bend if t > bend else t
        for _ in range(half):
            for k in range(count):
                products[k] *= value[k] * value[k]
        subtotal = np.float32(0)
        for k in range(count):
            subtotal += products[k]
        total += float(subtotal)
        start += count
    return total


@compiled
def power_slope(
    x: np.ndarray,
    out: np.ndarray,
    table: np.ndarray,
    run: int,
    half: int,
    bend: np.float32,
) -> None:
    """scale * t**(2 * half + 1), t = x * inverse, at most `bend` in magnitude.

    Rows: inverse, scale.
    """
    bits, sums = np.empty(BLOCK, np.uint32), np.empty(BLOCK, np.uint32)
    value, product = bits.view(np.float32), sums.view(np.float32)
    start = 0
    while start < x.size:
        count = _count(x.size, start, run)
        _read(x[start : start + count], bits)
        inverse = _row(table, 0, start, run, count)
        scale = _row(table, 1, start, run, count)
        for k in range(count):
            value[k] *= _at(inverse, k)
            value[k] = bend if value[k] > bend else value[k]
            value[k] = -bend if value[k] < -bend else value[k]
            product[k] = value[k] * _at(scale, k)
        for _ in range(half):
            for k in range(count):
                product[k] *= value[k] * value[k]
        _write(sums, out[start : start + count])
        start += count


@compiled
def excess_sum(x: np.ndarray, table: np.ndarray, run: int, margin: np.float32) -> float:
    """Sum of squares of what |t| exceeds margin by; rows: centre, inverse.

    There t = (x - centre) * inverse.
    """
    bits = np.empty(BLOCK, np.uint32)
    value = bits.view(np.float32)
    total = 0.0
    start = 0
    while start < x.size:
        count = _count(x.size, start, run)
        _read(x[start : start + count], bits)
        centre = _row(table, 0, start, run, count)
        inverse = _row(table, 1, start, run, count)
        subtotal = np.float32(0)
        for k in range(count):
            excess = abs(value[k] - _at(centre, k)) * _at(inverse, k) - margin
            excess = np.float32(0) if excess < 0 else excess
            subtotal += excess * excess
        total += float(subtotal)
        start += count
    return total


@compiled
def excess_slope(
    x: np.ndarray, out: np.ndarray, table: np.ndarray, run: int, margin: np.float32
) -> None:
    """scale times what |t| exceeds margin by, signed; rows: centre, inverse, scale."""
    bits = np.empty(BLOCK, np.uint32)
    value = bits.view(np.float32)
    start = 0
    while start < x.size:
        count = _count(x.size, start, run)
        _read(x[start : start + count], bits)
        centre = _row(table, 0, start, run, count)
        inverse = _row(table, 1, start, run, count)
        scale = _row(table, 2, start, run, count)
        for k in range(count):
            t = (value[k] - _at(centre, k)) * _at(inverse, k)
            if t < -margin:
                value[k] = (t + margin) * _at(scale, k)
            elif t > margin:
                value[k] = (t - margin) * _at(scale, k)
            else:
                value[k] = t * np.float32(0)
        _write(bits, out[start : start + count])
        start += count
