"""Convolution and pooling on ring elements, exact modulo 2**32 or 2**64.

Tensors are channels-last, (batch, height, width, channels), so vectors run over output
channels. Kernels run on one thread and release the GIL.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core.base import BaseContext
from numba.core.typing.context import BaseContext as Context
from numba.core.typing.templates import Signature
from numba.extending import intrinsic

from ...compiled import compiled, heats
from .ring import require, same_ring


def _vector_bytes() -> int:
    """Bytes of this processor's widest integer vector."""
    try:
        features = binding.get_host_cpu_features()
    except RuntimeError:  # unknown to LLVM: a width every processor can emulate
        return 32
    return 64 if features.get("avx512f") else 32


VECTOR = _vector_bytes()
# Output pixels a tile keeps in registers beside 4 vectors of filters each.
PIXELS = 6 if VECTOR == 64 else 3
_DEPTH = 64  # input channels per visit to a tile: their weights stay in the cache
_STRIP = 96  # output pixels that share them; a multiple of PIXELS


def _tile(pixels: int, vectors: int) -> Callable[..., None]:
    """An intrinsic: out[p, v] += sum over c of x[p, c] * weight[c, v], in registers.

    LLVM does not keep an accumulator array in registers by itself, so the tile is
    written as vector instructions: one load of each weight serves all its pixels, and
    the sums meet memory once.

    Args:
        pixels, vectors: size of the tile.
    """

    @intrinsic
    def tile(
        context: Context,
        like: types.Array,
        x: types.Type,
        offsets: types.Type,
        weight: types.Type,
        row: types.Type,
        out: types.Type,
        step: types.Type,
        count: types.Type,
    ) -> tuple[Signature, Callable[..., ir.Value]]:
        """Addresses and strides in bytes; offsets holds each pixel's place in x.

        `like` is any array of the elements' type, in which the sums wrap.
        """
        bits = like.dtype.bitwidth
        lanes, size = VECTOR * 8 // bits, bits // 8

        def emit(
            context: BaseContext,
            builder: ir.IRBuilder,
            signature: Signature,
            arguments: Sequence[ir.Value],
        ) -> ir.Value:
            index, element = ir.IntType(64), ir.IntType(bits)
            vector = ir.VectorType(element, lanes)
            half = ir.IntType(32)
            _, x, offsets, weight, row, out, step, count = arguments

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

        return types.void(like, *[types.intp] * 7), emit

    return cast(Callable[..., None], tile)


# Numba keys its on-disk cache by what a closure holds, and an intrinsic has no stable
# key: the tiles are globals.
_WIDE4, _PAIR4, _ONE4 = (_tile(pixels, 4) for pixels in (PIXELS, 2, 1))
_WIDE2, _PAIR2, _ONE2 = (_tile(pixels, 2) for pixels in (PIXELS, 2, 1))
_WIDE1, _PAIR1, _ONE1 = (_tile(pixels, 1) for pixels in (PIXELS, 2, 1))


@compiled
def _strip4(
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
    """One strip of pixels against 4 vectors of filters, tile by tile."""
    p = start
    while p + PIXELS <= stop:
        _WIDE4(like, x, offsets + 8 * p, weight, row, out + p * step, step, count)
        p += PIXELS
    while p + 2 <= stop:
        _PAIR4(like, x, offsets + 8 * p, weight, row, out + p * step, step, count)
        p += 2
    if p < stop:
        _ONE4(like, x, offsets + 8 * p, weight, row, out + p * step, step, count)


@compiled
def _strip2(
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
    """One strip of pixels against 2 vectors of filters, tile by tile."""
    p = start
    while p + PIXELS <= stop:
        _WIDE2(like, x, offsets + 8 * p, weight, row, out + p * step, step, count)
        p += PIXELS
    while p + 2 <= stop:
        _PAIR2(like, x, offsets + 8 * p, weight, row, out + p * step, step, count)
        p += 2
    if p < stop:
        _ONE2(like, x, offsets + 8 * p, weight, row, out + p * step, step, count)


@compiled
def _strip1(
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
    """One strip of pixels against 1 vector of filters, tile by tile."""
    p = start
    while p + PIXELS <= stop:
        _WIDE1(like, x, offsets + 8 * p, weight, row, out + p * step, step, count)
        p += PIXELS
    while p + 2 <= stop:
        _PAIR1(like, x, offsets + 8 * p, weight, row, out + p * step, step, count)
        p += 2
    if p < stop:
        _ONE1(like, x, offsets + 8 * p, weight, row, out + p * step, step, count)


@compiled
def _convolve_rest(
    x: np.ndarray,
    weight: np.ndarray,
    out: np.ndarray,
    stride: tuple[int, int],
    dilation: tuple[int, int],
    group: int,
    first: int,
) -> None:
    """The filters of a group that fill no vector, from `first` on."""
    batch, height, width, _ = out.shape
    _, kernel_h, kernel_w, depth, filters = weight.shape
    for p in range(batch * height * width):
        n = p // (height * width)
        h = p // width % height
        w = p % width
        y = out[n, h, w, group * filters : (group + 1) * filters]
        for i in range(kernel_h):
            for j in range(kernel_w):
                line = x[n, h * stride[0] + i * dilation[0]]
                values = line[w * stride[1] + j * dilation[1]]
                for c in range(depth):
                    value = values[group * depth + c]
                    taps = weight[group, i, j, c]
                    for o in range(first, filters):
                        y[o] += value * taps[o]


@compiled
def _convolve(
    x: np.ndarray,
    weight: np.ndarray,
    out: np.ndarray,
    stride: tuple[int, int],
    dilation: tuple[int, int],
    offsets: np.ndarray,
) -> None:
    """out += conv(x, weight); x is padded, weight (groups, kh, kw, c, o)."""
    batch, height, width, total = out.shape
    _, rows, columns, channels = x.shape
    groups, kernel_h, kernel_w, depth, filters = weight.shape
    size = x.itemsize
    lanes = VECTOR // size
    pixels = 0
    for n in range(batch):
        for h in range(height):
            for w in range(width):
                line = (n * rows + h * stride[0]) * columns + w * stride[1]
                offsets[pixels] = line * channels * size
                pixels += 1
    vectored = filters - filters % lanes
    row, step = filters * size, total * size
    at = offsets.ctypes.data
    for group in range(groups):
        first = 0
        while first < vectored:
            left = vectored - first
            vectors = 4 if left >= 4 * lanes else (2 if left >= 2 * lanes else 1)
            to = out.ctypes.data + (group * filters + first) * size
            for start in range(0, pixels, _STRIP):
                stop = min(pixels, start + _STRIP)
                for i in range(kernel_h):
                    for j in range(kernel_w):
                        for c in range(0, depth, _DEPTH):
                            count = min(_DEPTH, depth - c)
                            tap = i * dilation[0] * columns + j * dilation[1]
                            here = (tap * channels + group * depth + c) * size
                            a = x.ctypes.data + here
                            tap = (group * kernel_h + i) * kernel_w + j
                            here = ((tap * depth + c) * filters + first) * size
                            b = weight.ctypes.data + here
                            if vectors == 4:
                                _strip4(x, a, at, b, row, to, step, count, start, stop)
                            elif vectors == 2:
                                _strip2(x, a, at, b, row, to, step, count, start, stop)
                            else:
                                _strip1(x, a, at, b, row, to, step, count, start, stop)
            first += vectors * lanes
        if vectored < filters:
            _convolve_rest(x, weight, out, stride, dilation, group, vectored)


@compiled
def _convolve_depthwise(
    x: np.ndarray,
    weight: np.ndarray,
    out: np.ndarray,
    stride: tuple[int, int],
    dilation: tuple[int, int],
) -> None:
    """out += one filter per channel; weight (kh, kw, channels)."""
    batch, height, width, channels = out.shape
    for n in range(batch):
        for h in range(height):
            for w in range(width):
                y = out[n, h, w]
                for i in range(weight.shape[0]):
                    for j in range(weight.shape[1]):
                        a = x[
                            n,
                            h * stride[0] + i * dilation[0],
                            w * stride[1] + j * dilation[1],
                        ]
                        b = weight[i, j]
                        for c in range(channels):
                            y[c] += a[c] * b[c]


@compiled
def _pool_sum(
    x: np.ndarray, kernel: tuple[int, int], stride: tuple[int, int], out: np.ndarray
) -> None:
    """out += sums over windows; x is padded."""
    batch, height, width, channels = out.shape
    for n in range(batch):
        for h in range(height):
            for w in range(width):
                y = out[n, h, w]
                for i in range(kernel[0]):
                    for j in range(kernel[1]):
                        a = x[n, h * stride[0] + i, w * stride[1] + j]
                        for c in range(channels):
                            y[c] += a[c]


def pad(x: np.ndarray, pads: tuple[int, int, int, int]) -> np.ndarray:
    """Zeros around (batch, height, width, channels): top, left, bottom, right.

    Raises: PlanError for another shape, or negative pads.
    """
    top, left, bottom, right = pads
    require(x.ndim == 4 and min(pads) >= 0, "pad", x)
    if not any(pads):
        return np.ascontiguousarray(x)
    n, h, w, c = x.shape
    out = np.zeros((n, h + top + bottom, w + left + right, c), dtype=x.dtype)
    out[:, top : top + h, left : left + w] = x
    return out


def windows(
    size: tuple[int, ...],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    pads: tuple[int, int, int, int],
) -> tuple[int, int]:
    """How many windows fit, vertically and horizontally; 0 or less if none does."""
    top, left, bottom, right = pads
    rows = size[0] + top + bottom - dilation[0] * (kernel[0] - 1) - 1
    columns = size[1] + left + right - dilation[1] * (kernel[1] - 1) - 1
    return rows // stride[0] + 1, columns // stride[1] + 1


def _require_convolution(
    x: np.ndarray,
    weight: np.ndarray,
    out: np.ndarray,
    stride: tuple[int, int],
    dilation: tuple[int, int],
    pads: tuple[int, int, int, int],
) -> None:
    fits = x.ndim == out.ndim == 4 and same_ring(x, weight, out)
    fits = fits and min(pads) >= 0 and min(*stride, *dilation) >= 1
    if fits and weight.ndim == 3:
        kernel = weight.shape[:2]
        fits = x.shape[3] == out.shape[3] == weight.shape[2]
    elif fits and weight.ndim == 5:
        groups, *_, depth, filters = weight.shape
        kernel = weight.shape[1:3]
        fits = x.shape[3] == groups * depth and out.shape[3] == groups * filters
    else:
        fits = False
    require(
        fits
        and x.shape[0] == out.shape[0]
        and min(out.shape) >= 1
        and out.shape[1:3] == windows(x.shape[1:3], kernel, stride, dilation, pads),
        "convolve",
        x,
        weight,
        out,
    )


def convolve(
    x: np.ndarray,
    weight: np.ndarray,
    out: np.ndarray,
    *,
    stride: tuple[int, int],
    dilation: tuple[int, int],
    pads: tuple[int, int, int, int],
) -> None:
    """Add the convolution of `x` with `weight` to `out`, exactly in its ring.

    Args:
        x: (batch, height, width, channels), ring elements of any scale.
        weight: (groups, kh, kw, channels / groups, filters / groups), or (kh, kw,
            channels) for one filter per channel.
        out: (batch, oh, ow, filters), accumulated in place; same dtype as both.
        stride, dilation: (vertical, horizontal).
        pads: zeros at top, left, bottom, right.

    Raises: PlanError where the shapes do not belong together.
    """
    _require_convolution(x, weight, out, stride, dilation, pads)
    padded = pad(x, pads)
    if weight.ndim == 3:
        _convolve_depthwise(padded, weight, out, stride, dilation)
        return
    if not out.flags.c_contiguous:  # tiles are addressed, not indexed
        whole = np.zeros(out.shape, dtype=out.dtype)
        convolve(x, weight, whole, stride=stride, dilation=dilation, pads=pads)
        out += whole
        return
    offsets = np.empty(math.prod(out.shape[:3]), dtype=np.int64)
    weight = np.ascontiguousarray(weight)
    _convolve(padded, weight, out, stride, dilation, offsets)


def pool_sum(
    x: np.ndarray,
    out: np.ndarray,
    *,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    pads: tuple[int, int, int, int],
) -> None:
    """Add the sums over pooling windows to `out`, in its ring.

    Raises: PlanError where the shapes do not belong together.
    """
    fits = x.ndim == 4 and same_ring(x, out) and min(pads) >= 0
    fits = fits and min(*kernel, *stride) >= 1
    fits = fits and out.shape == (
        x.shape[0],
        *windows(x.shape[1:3], kernel, stride, (1, 1), pads),
        x.shape[3],
    )
    require(fits, "pool_sum", x, out)
    _pool_sum(pad(x, pads), kernel, stride, out)


@heats
def _all_types() -> None:
    for dtype in (np.int32, np.int64):
        x = np.zeros((1, 2, 2, 2), dtype)
        one, none = (1, 1), (0, 0, 0, 0)
        for shape in ((1, 1, 1, 2, 2), (1, 1, 2)):
            weight, out = np.zeros(shape, dtype), np.zeros_like(x)
            convolve(x, weight, out, stride=one, dilation=one, pads=none)
        pool_sum(x, np.zeros_like(x), kernel=one, stride=one, pads=none)
