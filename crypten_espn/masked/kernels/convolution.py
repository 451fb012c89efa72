"""Convolution and pooling on ring elements, exact modulo 2**32 or 2**64.

Tensors are channels-last, (batch, height, width, channels), so vectors run over output
channels. Kernels run on one thread and release the GIL.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from ...compiled import compiled, heats
from . import winograd
from .filters import Filters
from .halves import WHOLE, even, split
from .ring import require, same_ring
from .tiles import DEPTH, STRIP, VECTOR, Phases, strip, widest

_CACHE = 1 << 17  # bytes of weights that a small second-level cache keeps


@compiled
def _convolve_rest(
    x: np.ndarray,
    weight: np.ndarray,
    out: np.ndarray,
    groups: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
) -> None:
    """The filters of each group that fill no vector; they are packed last."""
    batch, height, width, total = out.shape
    filters, depth = total // groups, x.shape[3] // groups
    taps = kernel[0] * kernel[1] * depth
    count = filters % (VECTOR // out.itemsize)
    for group in range(groups):
        stop = (group + 1) * filters
        rest = weight[taps * (stop - count) : taps * stop].reshape(taps, count)
        for p in range(batch * height * width):
            n = p // (height * width)
            h = p // width % height
            w = p % width
            y = out[n, h, w, stop - count : stop]
            for i in range(kernel[0]):
                for j in range(kernel[1]):
                    line = x[n, h * stride[0] + i * dilation[0]]
                    values = line[w * stride[1] + j * dilation[1]]
                    for c in range(depth):
                        value = values[group * depth + c]
                        row = rest[(i * kernel[1] + j) * depth + c]
                        for o in range(count):
                            y[o] += value * row[o]


@compiled
def _convolve(
    x: np.ndarray,
    weight: np.ndarray,
    out: np.ndarray,
    phases: Phases,
    groups: int,
    depth: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    offsets: np.ndarray,
) -> None:
    """out += conv(x, weight) of the filters that fill vectors.

    Args:
        x: padded; elements or their halves, as `phases` says.
        weight: packed as `filters` says.
        depth: channels of a group, as they are packed.
    """
    batch, height, width, total = out.shape
    _, rows, columns, elements = x.shape
    filters, size = total // groups, out.itemsize
    lanes, inside = VECTOR // size, elements * x.itemsize
    pixels = 0
    for n in range(batch):
        for h in range(height):
            for w in range(width):
                line = (n * rows + h * stride[0]) * columns + w * stride[1]
                offsets[pixels] = line * inside
                pixels += 1
    vectored = filters - filters % lanes
    step = total * size
    spots = kernel[0] * kernel[1]
    # Rows of a tap; of whole elements one a channel.
    taps = weight.size // (spots * total)
    # Few weights stay in the cache while pixels pass once; of many, one block does.
    span = STRIP if spots * taps * filters * size <= _CACHE else pixels
    for group in range(groups):
        for begin in range(0, pixels, span):
            end, first = min(pixels, begin + span), 0
            while first < vectored:
                vectors = widest(vectored - first, lanes)
                row = vectors * VECTOR
                to = out.ctypes.data + (group * filters + first) * size
                block = (group * filters + first) * spots * taps * size
                block += weight.ctypes.data
                for start in range(begin, end, STRIP):
                    stop = min(end, start + STRIP)
                    for i in range(kernel[0]):
                        for j in range(kernel[1]):
                            for c in range(0, depth, DEPTH):
                                tap = i * dilation[0] * columns + j * dilation[1]
                                here = tap * inside + group * depth * x.itemsize
                                tap = (i * kernel[1] + j) * taps
                                strip(
                                    vectors, phases, x, x.ctypes.data + here,
                                    offsets.ctypes.data, block + tap * row, row, to,
                                    step, c, min(DEPTH, depth - c), start, stop,
                                )  # fmt: skip
                first += vectors * lanes


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
    weight: Filters,
    out: np.ndarray,
    stride: tuple[int, int],
    dilation: tuple[int, int],
    pads: tuple[int, int, int, int],
) -> None:
    fits = x.ndim == out.ndim == 4 and same_ring(x, out) and x.dtype == weight.dtype
    fits = fits and min(pads) >= 0 and min(*stride, *dilation) >= 1
    if fits and len(weight.shape) == 3:
        kernel = weight.shape[:2]
        fits = x.shape[3] == out.shape[3] == weight.shape[2]
    elif fits:
        groups, *_, depth, filters = weight.shape
        kernel = weight.shape[1:3]
        fits = x.shape[3] == groups * depth and out.shape[3] == groups * filters
        fits = fits and (not weight.fast or (1, 1) == stride == dilation)
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
    weight: Filters,
    out: np.ndarray,
    *,
    stride: tuple[int, int],
    dilation: tuple[int, int],
    pads: tuple[int, int, int, int],
) -> None:
    """Add the convolution of `x` with `weight` to `out`, exactly in its ring.

    Args:
        x: (batch, height, width, channels), ring elements of any scale.
        weight: of x's type; (groups, kh, kw, channels / groups, filters / groups), or
            (kh, kw, channels) for one filter per channel.
        out: (batch, oh, ow, filters), accumulated in place; same dtype as both. With
            fast filters it is exact modulo 2**30.
        stride, dilation: (vertical, horizontal).
        pads: zeros at top, left, bottom, right.

    Raises: PlanError where the shapes do not belong together.
    """
    _require_convolution(x, weight, out, stride, dilation, pads)
    if len(weight.shape) == 3:
        _convolve_depthwise(pad(x, pads), weight.packed, out, stride, dilation)
        return
    whole = out  # tiles are addressed, not indexed
    if not out.flags.c_contiguous:
        whole = np.zeros(out.shape, dtype=out.dtype)
    if weight.fast:
        top, left, bottom, right = pads
        odd = (bottom + out.shape[1] % 2, right + out.shape[2] % 2)
        padded = pad(x, (top, left, *odd))
        winograd.convolve(padded, weight.packed, weight.phases, whole)
    else:
        _convolve_direct(x, weight, whole, stride, dilation, pads)
    if whole is not out:
        out += whole


def _convolve_direct(
    x: np.ndarray,
    weight: Filters,
    out: np.ndarray,
    stride: tuple[int, int],
    dilation: tuple[int, int],
    pads: tuple[int, int, int, int],
) -> None:
    """Into contiguous memory."""
    groups, *kernel, depth, filters = weight.shape
    offsets = np.empty(math.prod(out.shape[:3]), dtype=np.int64)
    lanes = VECTOR // out.itemsize
    halved = weight.phases != WHOLE  # and then all filters fill vectors
    padded = split(x, pads) if halved else pad(x, pads)
    channels = even(depth) if halved else depth
    if filters >= lanes:
        _convolve(
            padded, weight.packed, out, weight.phases, groups, channels, tuple(kernel),
            stride, dilation, offsets,
        )  # fmt: skip
    if filters % lanes:
        _convolve_rest(
            padded, weight.packed, out, groups, tuple(kernel), stride, dilation
        )


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
    one, none = (1, 1), (0, 0, 0, 0)
    for dtype in (np.int32, np.int64):
        lanes = VECTOR // np.dtype(dtype).itemsize
        x = np.zeros((1, 2, 2, 2), dtype)
        # Weights of 16 bits and wider ones, filters that fill vectors and others.
        shapes = (1, 1, 1, 2, lanes), (1, 1, 1, 2, lanes + 1), (1, 1, 2)
        for value, shape in itertools.product((1, 1 << 20), shapes):
            weight = Filters(np.full(shape, value, dtype))
            out = np.zeros((1, 2, 2, shape[-1]), dtype)
            convolve(x, weight, out, stride=one, dilation=one, pads=none)
        pool_sum(x, np.zeros_like(x), kernel=one, stride=one, pads=none)
    channels = winograd.LANES
    x = np.zeros((1, 2, 2, channels), np.int32)
    for value in (1, 1 << 20):
        weight = Filters(
            np.full((1, 3, 3, channels, channels), value, np.int32), fast=True
        )
        convolve(x, weight, x.copy(), stride=one, dilation=one, pads=(1, 1, 1, 1))
