"""Tiles: a few pixels against a few vectors of filters, summed in registers.

What both convolutions, direct and Winograd's, spend their time in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils, codegen, config
from numba.core.base import BaseContext
from numba.core.typing.context import BaseContext as Context
from numba.core.typing.templates import Signature
from numba.extending import intrinsic

from ...compiled import compiled


def _features() -> frozenset[str]:
    """What numba may use of this processor, which a user can restrict."""
    given = config.CPU_FEATURES
    listed = codegen.get_host_cpu_features() if given is None else given
    names = listed.split(",")
    return frozenset(name[1:] for name in names if name.startswith("+"))


FEATURES = _features()
#: Bytes of the widest integer vector; one of 32 every processor can emulate.
VECTOR = 64 if "avx512f" in FEATURES else 32
#: By bytes of a vector, the instruction that multiplies two pairs of halves and adds.
PAIRED = {32: "llvm.x86.avx2.pmadd.wd", 64: "llvm.x86.avx512.pmaddw.d.512"}
#: Of a convolution; see `halves`.
Phases = tuple[tuple[int, int], ...]
# A tile's output pixels and vectors of filters: their sums, a pixel, the filters and a
# product fill the registers, of which there are 32 or 16; more would go through memory.
PIXELS, WIDE = (6, 4) if VECTOR == 64 else (4, 2)
# Fewer vectors leave room for more pixels, whose sums do not wait for each other.
_PIXELS_OF_FEWER = 8
# Input channels per visit to a tile: their weights stay in the first-level cache.
DEPTH = 64 if VECTOR == 64 else 128
# Bytes of weights that are fetched ahead, or 0: the processor itself stops at a page's
# end, and a small image's pass over many weights waits for the third-level cache.
AHEAD = 4096 if VECTOR == 64 else 0
STRIP = 96  # output pixels that share them; a multiple of both numbers of pixels


@intrinsic
def _tile(
    context: Context,
    down: types.UniTuple,
    across: types.UniTuple,
    phases: types.UniTuple,
    like: types.Array,
    x: types.Type,
    offsets: types.Type,
    weight: types.Type,
    row: types.Type,
    out: types.Type,
    step: types.Type,
    first: types.Type,
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
        phases: as `halves` says; ((0, 0),) where x is as it came.
        like: any array of x's type: elements in which the sums wrap, or halves of 16
            bits, of which two channels are multiplied and added at once.
        first, count: which channels.
    """
    paired = like.dtype.bitwidth == 16
    bits = 32 if paired else like.dtype.bitwidth
    lanes, size = VECTOR * 8 // bits, bits // 8
    aligned = like.dtype.bitwidth // 8
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
        _, _, phases, _, x, offsets, weight, row, out, step, first, count = arguments

        def constant(value: int) -> ir.Constant:
            return ir.Constant(index, value)

        def pointer(address: ir.Value, kind: ir.Type) -> ir.Instruction:
            return builder.inttoptr(address, kind.as_pointer())

        def load(address: ir.Value, kind: ir.Type) -> ir.Instruction:
            value = builder.load(pointer(address, kind))
            value.align = aligned
            return value

        nothing = ir.Constant(vector, ir.Undefined)
        zeros = ir.Constant(ir.VectorType(half, lanes), [0] * lanes)

        def added(
            sums: list[list[ir.Value]],
            places: list[ir.Value],
            start: ir.Value,
            turns: ir.Value,
        ) -> list[list[ir.Value]]:
            """The sums after a loop over channels, two of them a turn if paired."""
            entry = builder.block
            loop = builder.append_basic_block("tile")
            done = builder.append_basic_block("tile_done")
            builder.branch(loop)
            # The counter and the sums come from before, or from the turn just ended.
            builder.position_at_end(loop)
            c = builder.phi(index)
            c.add_incoming(constant(0), entry)
            phis = [[builder.phi(vector) for _ in line] for line in sums]
            for line, values in zip(phis, sums, strict=True):
                for phi, value in zip(line, values, strict=True):
                    phi.add_incoming(value, entry)
            # One load of each weight vector, for all pixels of the tile.
            here = builder.add(start, builder.mul(c, row))
            weights = [
                load(builder.add(here, constant(v * VECTOR)), vector)
                for v in range(vectors)
            ]
            if AHEAD:
                for v in range(vectors):
                    fetch(builder.add(here, constant(AHEAD + v * VECTOR)))
            # A pixel's one channel in every lane, times each of the weight vectors.
            away = builder.mul(c, constant(size))
            results = []
            for place, line in zip(places, phis, strict=True):
                one = load(builder.add(place, away), element)
                lane = builder.insert_element(nothing, one, ir.Constant(half, 0))
                many = builder.shuffle_vector(lane, nothing, zeros)
                products = [
                    (paired_product if paired else builder.mul)(*pair)
                    for pair in ((many, w) for w in weights)
                ]
                results.append(list(map(builder.add, line, products)))
                for phi, result in zip(line, results[-1], strict=True):
                    phi.add_incoming(result, loop)
            following = builder.add(c, constant(1))
            c.add_incoming(following, loop)
            more = builder.icmp_signed("<", following, turns)
            builder.cbranch(more, loop, done)
            builder.position_at_end(done)
            return results

        def fetch(address: ir.Value) -> None:
            """Ask for a line to be read, for all levels of the cache."""
            line = ir.IntType(8).as_pointer()
            kind = ir.FunctionType(ir.VoidType(), [line, half, half, half])
            prefetch = builder.module.declare_intrinsic("llvm.prefetch", (line,), kind)
            options = [ir.Constant(half, option) for option in (0, 3, 1)]
            builder.call(prefetch, [builder.inttoptr(address, line), *options])

        def paired_product(many: ir.Value, w: ir.Value) -> ir.Value:
            """Of 16-bit halves: lane by lane the sum of two products."""
            pairs = ir.VectorType(ir.IntType(16), 2 * lanes)
            kind = ir.FunctionType(vector, [pairs, pairs])
            multiply = builder.module.declare_intrinsic(PAIRED[VECTOR], (), kind)
            return builder.call(
                multiply, [builder.bitcast(value, pairs) for value in (many, w)]
            )

        pixel = [
            builder.add(x, load(builder.add(offsets, constant(8 * p)), index))
            for p in range(pixels)
        ]
        one = ir.IntType(64)(1)
        turns = builder.ashr(count, one) if paired else count
        before = builder.ashr(first, one) if paired else first
        skipped = builder.mul(before, constant(size))
        sums = [[ir.Constant(vector, [0] * lanes)] * vectors for _ in range(pixels)]
        parts = cgutils.unpack_tuple(builder, phases)
        for number, part in enumerate(parts):
            inside, rows = cgutils.unpack_tuple(builder, part)
            if 0 < number == len(parts) - 1:  # what came before counts 2**16 times
                by = ir.Constant(vector, [16] * lanes)
                sums = [[builder.shl(value, by) for value in line] for line in sums]
            places = [
                builder.add(place, builder.add(inside, skipped)) for place in pixel
            ]
            start = builder.add(weight, builder.mul(builder.add(rows, before), row))
            sums = added(sums, places, start, turns)
        # The sums meet memory.
        for p, line in enumerate(sums):
            for v, value in enumerate(line):
                away = builder.add(builder.mul(step, constant(p)), constant(v * VECTOR))
                address = pointer(builder.add(out, away), vector)
                old = builder.load(address)
                old.align = size
                builder.store(builder.add(old, value), address).align = size
        return context.get_dummy_value()

    signature = types.void(down, across, phases, like, *[types.intp] * 8)
    return signature, emit


# As long as a tile has pixels, or vectors.
_MANY, _MORE = (0,) * PIXELS, (0,) * _PIXELS_OF_FEWER
_WIDTH, _PAIR, _ONE = (0,) * WIDE, (0,) * 2, (0,)


@compiled
def _strip(
    down: tuple[int, ...],
    across: tuple[int, ...],
    phases: Phases,
    like: np.ndarray,
    x: int,
    offsets: int,
    weight: int,
    row: int,
    out: int,
    step: int,
    first: int,
    count: int,
    start: int,
    stop: int,
) -> None:
    """One strip of pixels against some vectors of filters, tile by tile."""
    p, most = start, len(down)
    while p + most <= stop:
        at, to = offsets + 8 * p, out + p * step
        _tile(down, across, phases, like, x, at, weight, row, to, step, first, count)
        p += most
    while p + 2 <= stop:
        at, to = offsets + 8 * p, out + p * step
        _tile(_PAIR, across, phases, like, x, at, weight, row, to, step, first, count)
        p += 2
    if p < stop:
        at, to = offsets + 8 * p, out + p * step
        _tile(_ONE, across, phases, like, x, at, weight, row, to, step, first, count)


@compiled
def strip(
    vectors: int,
    phases: Phases,
    like: np.ndarray,
    x: int,
    offsets: int,
    weight: int,
    row: int,
    out: int,
    step: int,
    first: int,
    count: int,
    start: int,
    stop: int,
) -> None:
    """Add to `out` the products of pixels' channels with some vectors of filters.

    Addresses, strides and offsets in bytes.

    Args:
        vectors: WIDE, 2 or 1; see `widest`.
        phases: as `halves` says.
        like: any array of x's type.
        x: the first channel; a pixel's is at its place in `offsets` from here.
        weight: the first channel's filters; each further row's `row` after.
        out: of the first pixel; each further pixel's is `step` after.
        first, count: which channels; even ones of halves.
        start, stop: which pixels.
    """
    if vectors == WIDE:
        _strip(
            _MANY, _WIDTH, phases, like, x, offsets, weight, row, out, step, first,
            count, start, stop,
        )  # fmt: skip
    elif vectors == 2:
        _strip(
            _MORE, _PAIR, phases, like, x, offsets, weight, row, out, step, first,
            count, start, stop,
        )  # fmt: skip
    else:
        _strip(
            _MORE, _ONE, phases, like, x, offsets, weight, row, out, step, first,
            count, start, stop,
        )  # fmt: skip


@compiled
def widest(left: int, lanes: int) -> int:
    """How many vectors of filters a tile takes next, so many filters left."""
    return WIDE if left >= WIDE * lanes else (2 if left >= 2 * lanes else 1)
