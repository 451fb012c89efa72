"""A plan in the clear: the engine's arithmetic, integer for integer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from . import kernels
from .evaluation import Evaluation, OfProduct
from .linear import Operands, accumulate
from .plan import INPUT, Plan
from .steps import Activation
from .weights import Weights


@dataclass(frozen=True)
class Rounding:
    """What decides the roundings of one step; each broadcasts to z's shape or y's.

    Args:
        first: by mask, what is added to z before group k's shift: r_k modulo 2**s_k.
            The linear term uses the first one's low bits; each factor of a product
            those of its own elements.
        second: added to y before s bits are dropped: the dealer's coin, less what the
            client drops of its share.
    """

    first: list[np.ndarray]
    second: np.ndarray


Roundings = Callable[[int, np.ndarray], Rounding]


def evaluate(
    plan: Plan,
    weights: Weights,
    x: torch.Tensor,
    *,
    roundings: Roundings | None = None,
) -> tuple[torch.Tensor, list[np.ndarray]]:
    """A plan's logits in the clear, without the server's noise.

    Args:
        plan, weights: the model.
        x: (batch, *input.shape).
        roundings: gives a step's coins from its number and z; with the parties' own the
            integers are theirs, bit for bit. None rounds to nearest.

    Returns:
        The logits, and the integers z of every linear part, to compare layer by layer.

    Raises: as `Plan.encode`; nothing is sent here, so no guard is asked.
    """
    values: dict[int, np.ndarray] = {INPUT: plan.encode(x, force=True)}
    trace = []
    filters = [kernels.Filters(array) for array in weights.integers]  # direct ones
    for number, part in enumerate(plan.parts):
        z = np.zeros(
            (len(x), *plan.part_shapes[number]), dtype=kernels.ring_dtype(part.ring)
        )
        operands = Operands(plan.shapes, values, filters, weights.biases)
        accumulate(part.root, operands, z)
        z = kernels.centred(z, part.ring)
        trace.append(z)
        if number < len(plan.steps):
            coins = None if roundings is None else roundings(number, z)
            values[number + 1] = activate(plan.evaluations[number], z, coins)
        for dead in plan.last_reads[number]:
            del values[dead]
    return plan.decode(trace[-1]), trace


def activate(between: Evaluation, z: np.ndarray, coins: Rounding | None) -> np.ndarray:
    """A step's value of integers z, truncated to the next source's integers."""
    act = between.step.activation
    if isinstance(act, Activation):
        y = _sums(act, _polynomial(act, z, coins))
    else:
        assert isinstance(between, OfProduct)
        y = _product(between, act.dropped, z, coins)
    if coins is None:
        return _truncated(y, act.drop, None)
    rounded: np.ndarray = y + coins.second
    return rounded >> act.drop


def _product(
    between: OfProduct, dropped: tuple[int, int], z: np.ndarray, coins: Rounding | None
) -> np.ndarray:
    size = between.sizes[0]
    r = None if coins is None else coins.first[0]
    first, second = (
        _truncated(z[:, part], shift, None if r is None else r[:, part]).reshape(
            len(z), *shape
        )
        for part, shift, shape in zip(
            (slice(size), slice(size, None)), dropped, between.factors, strict=True
        )
    )
    y: np.ndarray = (first * second) << between.lift
    return y


def _polynomial(act: Activation, z: np.ndarray, coins: Rounding | None) -> np.ndarray:
    y = np.empty(z.shape, dtype=np.int64)
    y[:] = act.constant  # by channel, the last axis
    if act.linear is not None:
        base = _truncated(
            z, act.linear.shift, None if coins is None else coins.first[0]
        )
        y += base * np.array(act.linear.coefficient)
    for k, group in enumerate(act.groups):
        base = _truncated(z, group.shift, None if coins is None else coins.first[k])
        power = base.copy()
        for coefficients in np.array(group.coeffs).T[1:]:
            y += power * coefficients
            power *= base
    return y


def _sums(act: Activation, y: np.ndarray) -> np.ndarray:
    if act.pool is None:
        return y
    height, width, channels = act.pooled(y.shape[1:])
    first, second = act.pool
    windows = y.reshape(len(y), height, first, width, second, channels)
    total: np.ndarray = windows.sum((2, 4))
    return total


def _truncated(z: np.ndarray, shift: int, coin: np.ndarray | None) -> np.ndarray:
    if shift == 0:
        return z
    low = np.int64(1 << (shift - 1)) if coin is None else coin & ((1 << shift) - 1)
    return (z + low) >> shift
