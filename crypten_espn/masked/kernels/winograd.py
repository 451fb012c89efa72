"""Winograd's F(2x2, 3x3): 3x3 convolutions with 16 products for 36.

A tile of 2x2 results reads 4x4 inputs d. With g the 3x3 weights,

    B' = 1  0 -1  0    2G = 2  0  0    A' = 1  1  1  0
         0  1  1  0         1  1  1         0  1 -1 -1
         0 -1  1  0         1 -1  1
         0  1  0 -1         0  0  2

A' [(2G g 2G') * (B' d B)] A is four times the tile: integers all the way, so modulo
2**32 the result is exact in its lower 32 bits and, divided by four, modulo 2**30.

Channels are summed between the transforms, as 16 matrix products in the tiles of a
direct convolution.

Source: Winograd, Arithmetic Complexity of Computations, SIAM 1980; Lavin and Gray, Fast
Algorithms for Convolutional Neural Networks, CVPR 2016.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.base import BaseContext
from numba.core.typing.context import BaseContext as Context
from numba.core.typing.templates import Signature
from numba.extending import intrinsic

from ...compiled import compiled
from .halves import WHOLE
from .tiles import DEPTH, VECTOR, WIDE, Phases, strip, widest

RING = 30  # bits of the widest ring in which it is exact
LANES = VECTOR // 4
_POINTS = 16
# Transformed inputs of so many bytes stay in the second-level cache beside the weights.
_CACHE = 1 << 17
_AT_ONCE = 16  # tiles, at least, that a weight is read for
# Tiles of an image below which reading more weights costs what multiplying less saves.
_FEWEST = 4

_Lines = Sequence[Sequence[ir.Value]]
_Half = Callable[[ir.IRBuilder, Sequence[ir.Value]], list[ir.Value]]


def possible(shape: tuple[int, ...], dtype: np.dtype) -> bool:
    """Whether weights in kernel layout can be convolved so."""
    if len(shape) != 5 or dtype != np.int32:
        return False
    groups, kernel_h, kernel_w, channels, filters = shape
    return (
        groups == 1
        and kernel_h == kernel_w == 3
        and channels % LANES == filters % LANES == 0
        and min(channels, filters) > 0
    )


def pays(
    shape: tuple[int, ...],
    ring: int,
    *,
    stride: tuple[int, int],
    dilation: tuple[int, int],
    size: tuple[int, ...],
) -> bool:
    """Whether a layer is computed so: where it is exact, and faster.

    Args:
        shape: of the weights, in kernel layout.
        ring: bits.
        size: height and width of the result.
    """
    return (
        ring <= RING
        and possible(shape, np.dtype(np.int32))
        and stride == dilation == (1, 1)
        and min(shape[3:]) >= 2 * LANES
        and tiles(size) >= _FEWEST
    )


def tiles(size: tuple[int, ...]) -> int:
    """How many cover an image of this size."""
    return math.prod((side + 1) // 2 for side in size)


def transformed(weight: np.ndarray) -> np.ndarray:
    """2G g 2G' of every channel and filter: (1, 4, 4, channels, filters)."""
    rows = _doubled(*weight[0])
    columns = _doubled(*rows.transpose(1, 0, 2, 3))
    return np.ascontiguousarray(columns.transpose(1, 0, 2, 3))[None]


def _doubled(first: np.ndarray, middle: np.ndarray, last: np.ndarray) -> np.ndarray:
    outer = first + last
    return np.stack([2 * first, outer + middle, outer - middle, 2 * last])


# ------------------------------------------------------------ a vector of channels


def _load(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    vector = ir.VectorType(ir.IntType(32), LANES)
    value = builder.load(builder.inttoptr(address, vector.as_pointer()))
    value.align = 4
    return value


def _store(builder: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    place = builder.inttoptr(address, value.type.as_pointer())
    builder.store(value, place).align = value.type.element.width // 8


def _number(value: int) -> ir.Constant:
    return ir.Constant(ir.IntType(64), value)


def _square(
    builder: ir.IRBuilder, first: ir.Value, row: ir.Value, column: ir.Value
) -> _Lines:
    """The vectors at 4x4 places, from the first one's address and both strides on."""
    found = []
    for i in range(4):
        line = builder.add(first, builder.mul(row, _number(i)))
        places = [builder.mul(column, _number(j)) for j in range(4)]
        found.append([_load(builder, builder.add(line, place)) for place in places])
    return found


def _on_both_axes(half: _Half, builder: ir.IRBuilder, lines: _Lines) -> list[ir.Value]:
    """A transform of each line, then of each column of the results; row by row."""
    for _ in range(2):
        changed = [half(builder, line) for line in lines]
        lines = list(zip(*changed, strict=True))
    return [value for line in lines for value in line]


def _half_forward(builder: ir.IRBuilder, d: Sequence[ir.Value]) -> list[ir.Value]:
    return [
        builder.sub(d[0], d[2]),
        builder.add(d[1], d[2]),
        builder.sub(d[2], d[1]),
        builder.sub(d[1], d[3]),
    ]


def _half_backward(builder: ir.IRBuilder, m: Sequence[ir.Value]) -> list[ir.Value]:
    return [
        builder.add(builder.add(m[0], m[1]), m[2]),
        builder.sub(builder.sub(m[1], m[2]), m[3]),
    ]


@intrinsic
def _forward(
    context: Context,
    like: types.Array,
    x: types.Type,
    row: types.Type,
    column: types.Type,
    out: types.Type,
    plane: types.Type,
    high: types.Type,
) -> tuple[Signature, Callable[..., ir.Value]]:
    """B' d B of one vector of channels: 4x4 places of x to 16 planes of out.

    Args:
        like: any array of what out holds: elements, or halves, of which the high ones
            are `high` bytes after the low ones.
    """
    split = like.dtype.bitwidth == 16

    def emit(
        context: BaseContext,
        builder: ir.IRBuilder,
        signature: Signature,
        arguments: Sequence[ir.Value],
    ) -> ir.Value:
        _, x, row, column, out, plane, high = arguments
        values = _on_both_axes(_half_forward, builder, _square(builder, x, row, column))
        for point, value in enumerate(values):
            place = builder.add(out, builder.mul(plane, _number(point)))
            if not split:
                _store(builder, value, place)
                continue
            halves = ir.VectorType(ir.IntType(16), LANES)
            _store(builder, builder.trunc(value, halves), place)
            # The low half has a sign: what is left without it.
            raised = builder.add(value, ir.Constant(value.type, [1 << 15] * LANES))
            sixteen = ir.Constant(value.type, [16] * LANES)
            left = builder.trunc(builder.lshr(raised, sixteen), halves)
            _store(builder, left, builder.add(place, high))
        return context.get_dummy_value()

    return types.void(like, *[types.intp] * 6), emit


@intrinsic
def _backward(
    context: Context,
    m: types.Type,
    plane: types.Type,
    first: types.Type,
    right: types.Type,
    below: types.Type,
    last: types.Type,
) -> tuple[Signature, Callable[..., ir.Value]]:
    """A' m A / 4 of one vector of filters: 16 planes of m, added to four places."""

    def emit(
        context: BaseContext,
        builder: ir.IRBuilder,
        signature: Signature,
        arguments: Sequence[ir.Value],
    ) -> ir.Value:
        m, plane, *places = arguments
        planes = _square(builder, m, builder.mul(plane, _number(4)), plane)
        values = _on_both_axes(_half_backward, builder, planes)
        two = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [2] * LANES)
        for value, place in zip(values, places, strict=True):
            quarter = builder.ashr(value, two)
            _store(builder, builder.add(_load(builder, place), quarter), place)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 6), emit


# ---------------------------------------------------------------- a convolution


@compiled
def _convolve(
    x: np.ndarray,
    weight: np.ndarray,
    phases: Phases,
    out: np.ndarray,
    offsets: np.ndarray,
    inputs: np.ndarray,
    sums: np.ndarray,
) -> None:
    """out += conv(x, weight), tile by tile; x is padded to whole tiles."""
    batch, height, width, filters = out.shape
    _, rows, columns, channels = x.shape
    down, across = (height + 1) // 2, (width + 1) // 2
    total, most = batch * down * across, len(offsets)
    taps = weight.size // (_POINTS * filters)  # rows of one
    inside = 4 * channels  # bytes of a tile's inputs to a point, whole or in halves
    for t in range(most):
        offsets[t] = t * inside
    nowhere = np.empty(LANES, np.int32)  # results beyond an odd edge
    away = nowhere.ctypes.data
    for start in range(0, total, most):
        count = min(most, total - start)
        plane = count * inside
        for t in range(count):
            n, place = divmod(start + t, down * across)
            i, j = 2 * (place // across), 2 * (place % across)
            a = x.ctypes.data + ((n * rows + i) * columns + j) * inside
            b = inputs.ctypes.data + t * inside
            for c in range(0, channels, LANES):
                to = b + c * inputs.itemsize
                _forward(
                    inputs, a + 4 * c, columns * inside, inside, to, plane, inside // 2
                )
        first = 0
        while first < filters:
            vectors = widest(filters - first, LANES)
            step = vectors * VECTOR
            block = weight.ctypes.data + _POINTS * taps * first * 4
            sums[: _POINTS * count * step // 4] = 0
            for k in range(_POINTS):
                a = inputs.ctypes.data + k * plane
                b = block + k * taps * step
                c = sums.ctypes.data + k * count * step
                for depth in range(0, channels, DEPTH):
                    strip(
                        vectors, phases, inputs, a, offsets.ctypes.data, b, step, c,
                        step, depth, min(DEPTH, channels - depth), 0, count,
                    )  # fmt: skip
            for t in range(count):
                n, place = divmod(start + t, down * across)
                i, j = 2 * (place // across), 2 * (place % across)
                pixel = filters * 4
                a = out.ctypes.data + ((n * height + i) * width + j) * pixel + first * 4
                right, below = j + 1 < width, i + 1 < height
                for v in range(0, step, VECTOR):
                    _backward(
                        sums.ctypes.data + t * step + v,
                        count * step,
                        a + v,
                        a + v + pixel if right else away,
                        a + v + width * pixel if below else away,
                        a + v + (width + 1) * pixel if right and below else away,
                    )
            first += step // 4


def convolve(
    x: np.ndarray, weight: np.ndarray, phases: Phases, out: np.ndarray
) -> None:
    """Add a 3x3 convolution to `out`, exactly modulo 2**30.

    Args:
        x: (batch, 2 * ceil(oh / 2) + 2, 2 * ceil(ow / 2) + 2, channels), padded.
        weight, phases: as `filters.Filters` has them.
        out: (batch, oh, ow, filters), contiguous; all int32.
    """
    batch, height, width, filters = out.shape
    channels = x.shape[3]
    fitting = max(_AT_ONCE, _CACHE // (_POINTS * channels * 4))
    most = min(batch * tiles((height, width)), fitting)
    inputs = np.empty(_POINTS * most * channels, dtype=np.int32)
    _convolve(
        x,
        weight,
        phases,
        out,
        np.empty(most, dtype=np.int64),
        inputs if phases == WHOLE else inputs.view(np.int16),
        np.empty(_POINTS * most * min(filters, WIDE * LANES), dtype=np.int32),
    )
