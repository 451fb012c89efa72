"""Convolution and pooling on ring elements, exact modulo 2**32 or 2**64.

Tensors are channels-last, (batch, height, width, channels), so vectors run over output
channels. Kernels run on one thread and release the GIL.
"""

from __future__ import annotations

import math

import numpy as np

from ...compiled import compiled, heats
from . import winograd
from .filters import Filters
from .ring import require, same_ring
from .tiles import DEPTH, STRIP, VECTOR, strip, widest

_CACHE = 1 << 17  # bytes of weights that a small second-level cache keeps


@compiled
def _convolve_rest(
    x: np.ndarray,
    weight: np.ndarray,
    out: np.ndarray,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    start: int,
    first: int,
    stop: int,
) -> None:
    """The filters of a group that fill no vector, from `first` to `stop` on.

    Args:
        weight: (taps * channels, stop - first) of these filters.
        start: the group's first channel.
    """
    batch, height, width, _ = out.shape
    depth = len(weight) // (kernel[0] * kernel[1])
    for p in range(batch * height * width):
        n = p // (height * width)
        h = p // width % height
        w = p % width
        y = out[n, h, w, first:stop]
        for i in range(kernel[0]):
            for j in range(kernel[1]):
                line = x[n, h * stride[0] + i * dilation[0]]
                values = line[w * stride[1] + j * dilation[1]]
                for c in range(depth):
                    value = values[start + c]
                    taps = weight[(i * kernel[1] + j) * depth + c]
                    for o in range(stop - first):
                        y[o] += value * taps[o]


@compiled
def _convolve(
    x: np.ndarray,
    weight: np.ndarray,
    out: np.ndarray,
    groups: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    offsets: np.ndarray,
) -> None:
    """out += conv(x, weight); x is padded, weight packed as `filters` says."""
    batch, height, width, total = out.shape
    _, rows, columns, channels = x.shape
    depth, filters = channels // groups, total // groups
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
    step = total * size
    taps = kernel[0] * kernel[1] * depth
    # Few weights stay in the cache while pixels pass once; of many, one block does.
    span = STRIP if taps * filters * size <= _CACHE else pixels
    for group in range(groups):
        for begin in range(0, pixels, span):
            end, first = min(pixels, begin + span), 0
            while first < vectored:
                vectors = widest(vectored - first, lanes)
                row = vectors * VECTOR
                to = out.ctypes.data + (group * filters + first) * size
                block = weight.ctypes.data + taps * (group * filters + first) * size
                for start in range(begin, end, STRIP):
                    stop = min(end, start + STRIP)
                    for i in range(kernel[0]):
                        for j in range(kernel[1]):
                            for c in range(0, depth, DEPTH):
                                count = min(DEPTH, depth - c)
                                tap = i * dilation[0] * columns + j * dilation[1]
                                here = (tap * channels + group * depth + c) * size
                                tap = (i * kernel[1] + j) * depth + c
                                strip(
                                    vectors, x, x.ctypes.data + here,
                                    offsets.ctypes.data, block + tap * row, row, to,
                                    step, count, start, stop,
                                )  # fmt: skip
                first += vectors * lanes
        if vectored < filters:
            rest = weight[taps * (group * filters + vectored) :]
            rest = rest[: taps * (filters - vectored)]
            at = group * filters
            _convolve_rest(
                x, rest.reshape(taps, filters - vectored), out, kernel, stride,
                dilation, group * depth, at + vectored, at + filters,
            )  # fmt: skip


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
        winograd.convolve(pad(x, (top, left, *odd)), weight.packed, whole)
    else:
        groups, *kernel = weight.shape[:3]
        offsets = np.empty(math.prod(out.shape[:3]), dtype=np.int64)
        _convolve(
            pad(x, pads), weight.packed, whole, groups, tuple(kernel), stride, dilation,
            offsets,
        )  # fmt: skip
    if whole is not out:
        out += whole


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
            weight, out = Filters(np.zeros(shape, dtype)), np.zeros_like(x)
            convolve(x, weight, out, stride=one, dilation=one, pads=none)
        pool_sum(x, np.zeros_like(x), kernel=one, stride=one, pads=none)
    channels = winograd.LANES
    x = np.zeros((1, 2, 2, channels), np.int32)
    weight = Filters(np.zeros((1, 3, 3, channels, channels), np.int32), fast=True)
    convolve(x, weight, x.copy(), stride=one, dilation=one, pads=(1, 1, 1, 1))
