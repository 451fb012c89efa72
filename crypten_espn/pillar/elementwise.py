"""A polynomial, its slope and the penalties, each in one pass over the memory.

On a processor, tensors of float32 and bfloat16 go through compiled loops that widen,
compute and round block by block in the first-level cache; every other tensor goes
through torch operations with the same meaning. Values are float32 inside either way,
float64 for a float64 tensor. Nothing here knows gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numba import types
from numba.extending import overload
from torch import Tensor

from ..compiled import compiled

_BLOCK = 1024  # elements whose intermediate values stay in the first-level cache


def polynomial(
    x: Tensor, coeffs: Sequence[float], interval: tuple[float, float] | None
) -> Tensor:
    """Return p(x), or p(clip(x)) if an interval is given, of the type of x.

    Args:
        x: any shape.
        coeffs: coeffs[k] multiplies x^k; at least one.
        interval: where to clip x.
    """
    low, high = interval or (-math.inf, math.inf)
    if not _readable(x):
        return _horner(coeffs, _widened(x).clamp(low, high)).to(x.dtype)
    out = torch.empty_like(x)
    _polynomial(_elements(x), _elements(out), _float32(coeffs), *_float32((low, high)))
    return out


def slope(
    x: Tensor,
    gradient: Tensor,
    coeffs: Sequence[float],
    interval: tuple[float, float] | None,
) -> Tensor:
    """Return gradient * q(x), zero where x is not inside the interval.

    Args:
        x: any shape.
        gradient: of the shape of x.
        coeffs: of q, as in `polynomial`.
        interval: outside it, and at its ends, a clip passes no gradient.
    """
    low, high = interval or (-math.inf, math.inf)
    if not _readable(x, gradient):
        value, passed = _widened(x), _widened(gradient)
        product = _horner(coeffs, value).mul_(passed)
        return product.masked_fill_((value <= low) | (value >= high), 0).to(x.dtype)
    out = torch.empty_like(x)
    _slope(
        _elements(x),
        _elements(gradient),
        _elements(out),
        _float32(coeffs),
        *_float32((low, high)),
    )
    return out


def power_sum(x: Tensor, power: int) -> Tensor:
    """Return the sum of x^power, power even, as a float64 scalar."""
    if not _readable(x):
        return _widened(x).pow(power).sum(dtype=torch.float64)
    return torch.tensor(_power_sum(_elements(x), power // 2), dtype=torch.float64)


def power_slope(x: Tensor, power: int, scale: Tensor) -> Tensor:
    """Return scale * x^(power - 1), power even, of the type of x."""
    if not _readable(x):
        return _widened(x).pow(power - 1).mul_(scale).to(x.dtype)
    out = torch.empty_like(x)
    _power_slope(_elements(x), _elements(out), power // 2 - 1, np.float32(float(scale)))
    return out


def excess_sum(x: Tensor, centre: float, radius: float, margin: float) -> Tensor:
    """Return the sum of max(|x - centre| / radius - margin, 0)^2, a float64 scalar."""
    if not _readable(x):
        t = _widened(x).sub(centre).abs_().div_(radius).sub_(margin)
        return t.clamp_(min=0).square_().sum(dtype=torch.float64)
    total = _excess_sum(_elements(x), *_float32((centre, 1 / radius, margin)))
    return torch.tensor(total, dtype=torch.float64)


def excess_slope(
    x: Tensor, centre: float, radius: float, margin: float, scale: Tensor
) -> Tensor:
    """Return scale * max(|t| - margin, 0) * sign(t), t = (x - centre) / radius."""
    if not _readable(x):
        t = _widened(x).sub(centre).div_(radius)
        return (t - t.clamp(-margin, margin)).mul_(scale).to(x.dtype)
    out = torch.empty_like(x)
    numbers = _float32((centre, 1 / radius, margin, float(scale)))
    _excess_slope(_elements(x), _elements(out), *numbers)
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


def _float32(values: Sequence[float]) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def _widened(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _horner(coeffs: Sequence[float], x: Tensor) -> Tensor:
    """Return sum coeffs[k] x^k in a new tensor; x is left alone."""
    result = torch.full_like(x, coeffs[-1])
    for coeff in reversed(coeffs[:-1]):
        result.mul_(x).add_(coeff)
    return result


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


@compiled
def _horner_block(
    total: np.ndarray, value: np.ndarray, coeffs: np.ndarray, count: int
) -> None:
    total[:count] = coeffs[-1]
    for power in range(coeffs.size - 2, -1, -1):
        coeff = coeffs[power]  # the compiler cannot know that it stays the same
        for k in range(count):
            total[k] = total[k] * value[k] + coeff


@compiled
def _polynomial(
    x: np.ndarray,
    out: np.ndarray,
    coeffs: np.ndarray,
    low: np.float32,
    high: np.float32,
) -> None:
    bits, sums = np.empty(_BLOCK, np.uint32), np.empty(_BLOCK, np.uint32)
    value, total = bits.view(np.float32), sums.view(np.float32)
    for start in range(0, x.size, _BLOCK):
        part = x[start : start + _BLOCK]
        _read(part, bits)
        for k in range(part.size):
            v = value[k]
            v = low if v < low else v
            value[k] = high if v > high else v
        _horner_block(total, value, coeffs, part.size)
        _write(sums, out[start : start + _BLOCK])


@compiled
def _slope(
    x: np.ndarray,
    gradient: np.ndarray,
    out: np.ndarray,
    coeffs: np.ndarray,
    low: np.float32,
    high: np.float32,
) -> None:
    bits, sums = np.empty(_BLOCK, np.uint32), np.empty(_BLOCK, np.uint32)
    incoming = np.empty(_BLOCK, np.uint32)
    value, total = bits.view(np.float32), sums.view(np.float32)
    passed = incoming.view(np.float32)
    for start in range(0, x.size, _BLOCK):
        part = x[start : start + _BLOCK]
        _read(part, bits)
        _read(gradient[start : start + _BLOCK], incoming)
        _horner_block(total, value, coeffs, part.size)
        for k in range(part.size):
            stopped = value[k] <= low or value[k] >= high
            total[k] = np.float32(0) if stopped else total[k] * passed[k]
        _write(sums, out[start : start + _BLOCK])


@compiled
def _power_sum(x: np.ndarray, half: int) -> float:
    bits, products = np.empty(_BLOCK, np.uint32), np.empty(_BLOCK, np.float32)
    value = bits.view(np.float32)
    total = 0.0
    for start in range(0, x.size, _BLOCK):
        part = x[start : start + _BLOCK]
        _read(part, bits)
        products[: part.size] = 1
        for _ in range(half):
            for k in range(part.size):
                products[k] *= value[k] * value[k]
        subtotal = np.float32(0)
        for k in range(part.size):
            subtotal += products[k]
        total += float(subtotal)
    return total


@compiled
def _power_slope(x: np.ndarray, out: np.ndarray, half: int, scale: np.float32) -> None:
    bits, sums = np.empty(_BLOCK, np.uint32), np.empty(_BLOCK, np.uint32)
    value, product = bits.view(np.float32), sums.view(np.float32)
    for start in range(0, x.size, _BLOCK):
        part = x[start : start + _BLOCK]
        _read(part, bits)
        for k in range(part.size):
            product[k] = value[k] * scale
        for _ in range(half):
            for k in range(part.size):
                product[k] *= value[k] * value[k]
        _write(sums, out[start : start + _BLOCK])


@compiled
def _excess_sum(
    x: np.ndarray, centre: np.float32, inverse: np.float32, margin: np.float32
) -> float:
    bits = np.empty(_BLOCK, np.uint32)
    value = bits.view(np.float32)
    total = 0.0
    for start in range(0, x.size, _BLOCK):
        part = x[start : start + _BLOCK]
        _read(part, bits)
        subtotal = np.float32(0)
        for k in range(part.size):
            excess = abs(value[k] - centre) * inverse - margin
            excess = np.float32(0) if excess < 0 else excess
            subtotal += excess * excess
        total += float(subtotal)
    return total


@compiled
def _excess_slope(
    x: np.ndarray,
    out: np.ndarray,
    centre: np.float32,
    inverse: np.float32,
    margin: np.float32,
    scale: np.float32,
) -> None:
    bits = np.empty(_BLOCK, np.uint32)
    value = bits.view(np.float32)
    for start in range(0, x.size, _BLOCK):
        part = x[start : start + _BLOCK]
        _read(part, bits)
        for k in range(part.size):
            t = (value[k] - centre) * inverse
            if t < -margin:
                value[k] = (t + margin) * scale
            elif t > margin:
                value[k] = (t - margin) * scale
            else:
                value[k] = t * np.float32(0)
        _write(bits, out[start : start + _BLOCK])
