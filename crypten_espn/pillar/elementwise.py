"""A polynomial, its slope and the penalties, each in one pass over the memory.

On a processor, tensors of float32 and bfloat16 go through compiled loops that widen,
compute and round block by block in the first-level cache; every other tensor goes
through torch operations with the same meaning. Values are float32 inside either way,
float64 for a float64 tensor. Nothing here knows gradients.

A number is one for all elements, or an array with one for each channel, the second axis
of a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..polynomial import across
from . import loops

Number = float | np.ndarray

_WIDTH = 512  # of a table with a column an element, so that it stays there too
_PLANE = 128  # elements of a channel side by side that are worth a loop of their own


def polynomial(
    x: Tensor, coeffs: Sequence[Number], interval: tuple[Number, Number] | None
) -> Tensor:
    """Return p(x), or p(clip(x)) if an interval is given, of the type of x.

    Args:
        x: any shape; (batch, channels, ...) if a number is an array.
        coeffs: coeffs[k] multiplies x^k; at least one.
        interval: where to clip x.
    """
    numbers = (*(interval or (-math.inf, math.inf)), *coeffs)
    if not _readable(x):
        value = _widened(x)
        low, high, *columns = _columns(value, numbers)
        return _horner(columns, _clipped(value, low, high)).to(x.dtype)
    out = torch.empty_like(x)
    loops.polynomial(_elements(x), _elements(out), *_table(x, numbers))
    return out


def slope(
    x: Tensor,
    gradient: Tensor,
    coeffs: Sequence[Number],
    interval: tuple[Number, Number] | None,
) -> Tensor:
    """Return gradient * q(x), zero where x is not inside the interval.

    Args:
        x: as in `polynomial`.
        gradient: of the shape of x.
        coeffs: of q, as in `polynomial`.
        interval: outside it, and at its ends, a clip passes no gradient.
    """
    numbers = (*(interval or (-math.inf, math.inf)), *coeffs)
    if not _readable(x, gradient):
        value, passed = _widened(x), _widened(gradient)
        low, high, *columns = _columns(value, numbers)
        product = _horner(columns, value).mul_(passed)
        return product.masked_fill_((value <= low) | (value >= high), 0).to(x.dtype)
    out = torch.empty_like(x)
    loops.slope(_elements(x), _elements(gradient), _elements(out), *_table(x, numbers))
    return out


def power_sum(x: Tensor, unit: Number, power: int, bend: float = math.inf) -> Tensor:
    """Return the sum of |x / unit|^power, power even, as a float64 scalar.

    Beyond `bend`, an element's |x / unit| counts by the power's tangent there.
    """
    if not _readable(x):
        value = _widened(x)
        (inverse,) = _columns(value, (1 / unit,))
        t = value.mul(inverse).abs_()
        if math.isinf(bend):
            return t.pow_(power).sum(dtype=torch.float64)
        beyond = t.sub(bend).clamp_(min=0).mul_(power / bend)
        return (
            t.clamp_(max=bend).pow_(power).mul_(beyond.add_(1)).sum(dtype=torch.float64)
        )
    table, run = _table(x, (1 / unit,))
    total = loops.power_sum(_elements(x), table, run, power // 2, np.float32(bend))
    return torch.tensor(total, dtype=torch.float64)


def power_slope(
    x: Tensor, unit: Number, power: int, scale: Tensor, bend: float = math.inf
) -> Tensor:
    """Return scale / unit * t^(power - 1), power even, of the type of x.

    There t = x / unit, at most `bend` in magnitude.
    """
    if not _readable(x):
        value = _widened(x)
        (inverse,) = _columns(value, (1 / unit,))
        result = value.mul(inverse).clamp_(-bend, bend).pow_(power - 1)
        return result.mul_(inverse).mul_(scale).to(x.dtype)
    out = torch.empty_like(x)
    table, run = _table(x, (1 / unit, float(scale) / unit))
    half = power // 2 - 1
    loops.power_slope(_elements(x), _elements(out), table, run, half, np.float32(bend))
    return out


def excess_sum(x: Tensor, centre: Number, radius: Number, margin: float) -> Tensor:
    """Return the sum of max(|x - centre| / radius - margin, 0)^2, a float64 scalar."""
    if not _readable(x):
        value = _widened(x)
        middle, half = _columns(value, (centre, radius))
        t = value.sub(middle).abs_().div_(half).sub_(margin)
        return t.clamp_(min=0).square_().sum(dtype=torch.float64)
    numbers = (centre, 1 / radius)
    total = loops.excess_sum(_elements(x), *_table(x, numbers), np.float32(margin))
    return torch.tensor(total, dtype=torch.float64)


def excess_slope(
    x: Tensor, centre: Number, radius: Number, margin: float, scale: Tensor
) -> Tensor:
    """Return scale / radius * max(|t| - margin, 0) * sign(t).

    There t = (x - centre) / radius; the type is that of x.
    """
    if not _readable(x):
        value = _widened(x)
        middle, half = _columns(value, (centre, radius))
        t = value.sub(middle).div_(half)
        return (t - t.clamp(-margin, margin)).div_(half).mul_(scale).to(x.dtype)
    out = torch.empty_like(x)
    numbers = (centre, 1 / radius, float(scale) / radius)
    loops.excess_slope(
        _elements(x), _elements(out), *_table(x, numbers), np.float32(margin)
    )
    return out


def _readable(*tensors: Tensor) -> bool:
    """Whether compiled loops can read tensors side by side.

    They cannot where tensors are on a device, of another type, with gaps, laid out
    differently, or without values, as in a trace.
    """
    first = tensors[0]
    return (
        first.device.type == "cpu"
        and first.dtype in (torch.float32, torch.bfloat16)
        and all(type(x) is Tensor for x in tensors)
        and all(x.stride() == first.stride() for x in tensors[1:])
        and all(x.dtype == first.dtype for x in tensors[1:])
        and _dense(first)
        and not torch.jit.is_tracing()
        and not torch.compiler.is_compiling()
    )


def _elements(x: Tensor) -> np.ndarray:
    """Return the elements in the order of their memory; bfloat16 as its 16 bits."""
    flat = x.detach().as_strided((x.numel(),), (1,))
    if x.dtype == torch.bfloat16:
        return flat.view(torch.int16).numpy().view(np.uint16)
    return flat.numpy()


def _dense(x: Tensor) -> bool:
    return x.is_contiguous() or (
        x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    )


def _table(x: Tensor, numbers: Sequence[Number]) -> tuple[np.ndarray, int]:
    """The numbers for compiled loops, and for how many elements its columns stand.

    Returns:
        float32 (numbers, channels), a column for `run` elements one after another, then
        the next channel's; or (numbers, 1, run), a column for each of `run` elements.
    """
    rows = np.array(np.broadcast_arrays(*numbers), dtype=np.float32)
    if rows.ndim == 1:
        return rows[:, None], max(x.numel(), 1)
    beside = math.prod(x.shape[2:]) if x.is_contiguous() else 1
    if beside >= _PLANE:
        return rows, beside
    rows = np.repeat(rows, max(beside, 1), axis=1)
    width = rows.shape[1]
    rows = np.tile(rows, max(1, min(_WIDTH, x.numel()) // width))
    return rows[:, None], rows.shape[1]


def _columns(x: Tensor, numbers: Sequence[Number]) -> list[float | Tensor]:
    """The numbers for torch operations: arrays as tensors that broadcast over x."""
    return [
        across(torch.tensor(number, dtype=x.dtype), x)
        if isinstance(number, np.ndarray)
        else number
        for number in numbers
    ]


def _clipped(x: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """x.clamp, which takes two tensors or none."""
    if isinstance(low, Tensor) and isinstance(high, Tensor):
        return x.clamp(low, high)
    assert not isinstance(low, Tensor) and not isinstance(high, Tensor)
    return x.clamp(low, high)


def _widened(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _horner(coeffs: Sequence[float | Tensor], x: Tensor) -> Tensor:
    """Return sum coeffs[k] x^k in a new tensor; x is left alone."""
    result = torch.zeros_like(x).add_(coeffs[-1])
    for coeff in reversed(coeffs[:-1]):
        result.mul_(x).add_(coeff)
    return result
