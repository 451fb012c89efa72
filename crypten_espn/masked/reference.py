"""A plan in the clear: the engine's arithmetic, integer for integer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from . import kernels
from .linear import Operands, accumulate
from .plan import INPUT, Plan, part_shape
from .steps import Step
from .weights import Weights


@dataclass(frozen=True)
class Rounding:
    """What decides the roundings of one step; each broadcasts to z's shape.

    Args:
        first: by mask, what is added to z before group k's shift: r_k modulo 2**s_k.
            The linear term uses the first one's low bits.
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
    for number, part in enumerate(plan.parts):
        z = np.zeros(
            (len(x), *part_shape(plan, number)), dtype=kernels.ring_dtype(part.ring)
        )
        operands = Operands(plan.shapes, values, weights.integers, weights.biases)
        accumulate(part.root, operands, z)
        z = kernels.centred(z, part.ring)
        trace.append(z)
        if isinstance(part, Step):
            coins = None if roundings is None else roundings(number, z)
            values[number + 1] = activate(part, z, coins)
        for dead in plan.last_reads[number]:
            del values[dead]
    return plan.decode(trace[-1]), trace


def activate(step: Step, z: np.ndarray, coins: Rounding | None) -> np.ndarray:
    """A step's polynomial of integers z, truncated to the next source's integers."""
    act = step.activation
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
    if coins is None:
        return _truncated(y, act.drop, None)
    rounded: np.ndarray = y + coins.second
    return rounded >> act.drop


def _truncated(z: np.ndarray, shift: int, coin: np.ndarray | None) -> np.ndarray:
    if shift == 0:
        return z
    low = np.int64(1 << (shift - 1)) if coin is None else coin & ((1 << shift) - 1)
    return (z + low) >> shift
