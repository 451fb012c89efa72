"""Tiles: a few pixels against a few vectors of filters, summed in registers.

What both convolutions, direct and Winograd's, spend their time in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core.base import BaseContext
from numba.core.typing.context import BaseContext as Context
from numba.core.typing.templates import Signature
from numba.extending import intrinsic

from ...compiled import compiled


def _vector_bytes() -> int:
    """Bytes of this processor's widest integer vector."""
    try:
        features = binding.get_host_cpu_features()
    except RuntimeError:  # unknown to LLVM: a width every processor can emulate
        return 32
    return 64 if features.get("avx512f") else 32


VECTOR = _vector_bytes()
# A tile's output pixels and vectors of filters: their sums, a pixel, the filters and a
# product fill the registers, of which there are 32 or 16; more would go through memory.
PIXELS, WIDE = (6, 4) if VECTOR == 64 else (4, 2)
# Input channels per visit to a tile: their weights stay in the first-level cache.
DEPTH = 64 if VECTOR == 64 else 128
STRIP = 96  # output pixels that share them; a multiple of PIXELS


@intrinsic
def _tile(
    context: Context,
    down: types.UniTuple,
    across: types.UniTuple,
    like: types.Array,
    x: types.Type,
    offsets: types.Type,
    weight: types.Type,
    row: types.Type,
    out: types.Type,
    step: types.Type,
    count: types.Type,
) -> tuple[Signature, Callable[..., ir.Value]]:
    """out[p, v] += sum over c of x[p, c] * weight[c, v], in registers.

    LLVM does not keep an accumulator array in registers by itself, so the tile is
    written as vector instructions: one load of each weight serves all its pixels, and
    the sums meet memory once.

    Addresses and strides in bytes; offsets holds each pixel's place in x.

    Args:
        down, across: tuples as long as the tile has pixels, and vectors of filters: of
            a tuple the length is known when this is compiled.
        like: any array of the elements' type, in which the sums wrap.
    """
    bits = like.dtype.bitwidth
    lanes, size = VECTOR * 8 // bits, bits // 8
    pixels, vectors = down.count, across.count

    def emit(
        context: BaseContext,
        builder: ir.IRBuilder,
        signature: Signature,
        arguments: Sequence[ir.Value],
    ) -> ir.Value:
        index, element = ir.IntType(64), ir.IntType(bits)
        vector = ir.VectorType(element, lanes)
        half = ir.IntType(32)
        *_, x, offsets, weight, row, out, step, count = arguments

        def constant(value: int) -> ir.Constant:
            return ir.Constant(index, value)

        def pointer(address: ir.Value, kind: ir.Type) -> ir.Instruction:
            return builder.inttoptr(address, kind.as_pointer())

        def load(address: ir.Value, kind: ir.Type) -> ir.Instruction:
            value = builder.load(pointer(address, kind))
            value.align = size
            return value

        # Before the loop: where each pixel and each sum lies, and the sums so far.
        places = [
            builder.add(x, load(builder.add(offsets, constant(8 * p)), index))
            for p in range(pixels)
        ]
        outs = [
            [
                builder.add(
                    builder.add(out, builder.mul(step, constant(p))),
                    constant(v * VECTOR),
                )
                for v in range(vectors)
            ]
            for p in range(pixels)
        ]
        before = [[load(address, vector) for address in line] for line in outs]
        entry = builder.block
        loop = builder.append_basic_block("tile")
        done = builder.append_basic_block("tile_done")
        builder.branch(loop)

        # The loop over channels: its counter and its sums come from before, or from
        # the turn that has just ended.
        builder.position_at_end(loop)
        c = builder.phi(index)
        c.add_incoming(constant(0), entry)
        sums = [[builder.phi(vector) for _ in line] for line in before]
        for phis, values in zip(sums, before, strict=True):
            for phi, value in zip(phis, values, strict=True):
                phi.add_incoming(value, entry)
        # One load of each weight vector, for all pixels of the tile.
        start = builder.add(weight, builder.mul(c, row))
        weights = [
            load(builder.add(start, constant(v * VECTOR)), vector)
            for v in range(vectors)
        ]
        # A pixel's one channel in every lane, times each of the weight vectors.
        away = builder.mul(c, constant(size))
        nothing = ir.Constant(vector, ir.Undefined)
        first = ir.Constant(ir.VectorType(half, lanes), [0] * lanes)
        results: list[list[ir.Instruction]] = []
        for place, phis in zip(places, sums, strict=True):
            one = load(builder.add(place, away), element)
            many = builder.shuffle_vector(
                builder.insert_element(nothing, one, ir.Constant(half, 0)),
                nothing,
                first,
            )
            results.append(
                [
                    builder.add(phi, builder.mul(many, w))
                    for phi, w in zip(phis, weights, strict=True)
                ]
            )
            for phi, result in zip(phis, results[-1], strict=True):
                phi.add_incoming(result, loop)
        # The next channel, if there is one.
        following = builder.add(c, constant(1))
        c.add_incoming(following, loop)
        more = builder.icmp_signed("<", following, count)
        builder.cbranch(more, loop, done)

        # After the loop, the sums meet memory.
        builder.position_at_end(done)
        for line, values in zip(outs, results, strict=True):
            for address, result in zip(line, values, strict=True):
                builder.store(result, pointer(address, vector)).align = size
        return context.get_dummy_value()

    return types.void(down, across, like, *[types.intp] * 7), emit


# As long as a tile has pixels, or vectors.
_MANY, _WIDTH, _PAIR, _ONE = (0,) * PIXELS, (0,) * WIDE, (0,) * 2, (0,)


@compiled
def _strip(
    across: tuple[int, ...],
    like: np.ndarray,
    x: int,
    offsets: int,
    weight: int,
    row: int,
    out: int,
    step: int,
    count: int,
    start: int,
    stop: int,
) -> None:
    """One strip of pixels against some vectors of filters, tile by tile."""
    p = start
    while p + PIXELS <= stop:
        at, to = offsets + 8 * p, out + p * step
        _tile(_MANY, across, like, x, at, weight, row, to, step, count)
        p += PIXELS
    while p + 2 <= stop:
        at, to = offsets + 8 * p, out + p * step
        _tile(_PAIR, across, like, x, at, weight, row, to, step, count)
        p += 2
    if p < stop:
        at, to = offsets + 8 * p, out + p * step
        _tile(_ONE, across, like, x, at, weight, row, to, step, count)


@compiled
def strip(
    vectors: int,
    like: np.ndarray,
    x: int,
    offsets: int,
    weight: int,
    row: int,
    out: int,
    step: int,
    count: int,
    start: int,
    stop: int,
) -> None:
    """Add to `out` the products of pixels' channels with some vectors of filters.

    Addresses, strides and offsets in bytes.

    Args:
        vectors: WIDE, 2 or 1; see `widest`.
        like: any array of the elements' type.
        x: the first channel; a pixel's is at its place in `offsets` from here.
        weight: the first channel's filters; each further channel's `row` after.
        out: of the first pixel; each further pixel's is `step` after.
        count: channels.
        start, stop: which pixels.
    """
    if vectors == WIDE:
        _strip(_WIDTH, like, x, offsets, weight, row, out, step, count, start, stop)
    elif vectors == 2:
        _strip(_PAIR, like, x, offsets, weight, row, out, step, count, start, stop)
    else:
        _strip(_ONE, like, x, offsets, weight, row, out, step, count, start, stop)


@compiled
def widest(left: int, lanes: int) -> int:
    """How many vectors of filters a tile takes next, so many filters left."""
    return WIDE if left >= WIDE * lanes else (2 if left >= 2 * lanes else 1)
