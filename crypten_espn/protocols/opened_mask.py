"""Polynomial of a shared value from one opened element and shared powers of its mask.

Source: Lu, Yurek, Kulshreshtha, Govind, Mahadev, Kate, Miller, HoneyBadgerMPC, ACM CCS
2019.
"""

from __future__ import annotations

import math

import crypten.communicator as comm
import torch

from ..correlated import powers
from ..cost import RING_BYTES, Cost
from ..polynomial import Form
from .protocol import Protocol


def evaluate(x: torch.Tensor, p: torch.Tensor, form: Form) -> torch.Tensor:
    """Share of c_0 + c_1 X + sum_{k>=2} c_k P^k modulo 2^64.

    1. Obtain [r], [r^2], ..., [r^n] for r uniform in the ring.
    2. Open epsilon = [P] - [r].
    3. P^k = (epsilon + r)^k, so the sum is sum_j T_j(epsilon) [r^j] with public
       T_j(epsilon) = sum_{k >= max(j, 2)} c_k C(k,j) epsilon^(k-j); party 0 adds T_0.
    4. Add c_1 [X]; party 0 adds c_0.

    Args:
        x: int64 share of X at scale 2**form.frac_bits; any shape that the form's
            `check` takes.
        p: int64 share of P, same shape.
        form: the polynomial's integers.

    Returns:
        int64 share of the result at scale 2**form.out_bits, same shape.

    Cost: 1 round and 8 bytes per element and party for n >= 2, else nothing; offline
    n - 1 corrections per element.

    Error: exact modulo 2^64.
    """
    rank = comm.get().get_rank()
    n = form.degree
    result = form.linear_share(x, rank)
    if n < 2:
        return result

    mask_powers = powers(x.size(), n).to(x.device)
    epsilon = comm.get().all_reduce(p - mask_powers[0])
    if rank == 0:
        result += _multiplier(epsilon, form, 0)
    for j in range(1, n + 1):
        result += _multiplier(epsilon, form, j) * mask_powers[j - 1]
    return result


def _multiplier(epsilon: torch.Tensor, form: Form, j: int) -> torch.Tensor:
    """T_j(epsilon), by Horner's rule."""
    t = torch.zeros_like(epsilon)
    for k in range(form.degree, max(j, 2) - 1, -1):
        t = t * epsilon
        c = form.multiple(k, math.comb(k, j), t)
        if c is not None:
            t += c
    for _ in range(max(j, 2) - j):
        t = t * epsilon
    return t


def cost(form: Form, elements: int) -> Cost:
    """Declared cost of `evaluate` for one party."""
    if form.degree < 2:
        return Cost()
    return Cost(1, RING_BYTES * elements, (form.degree - 1) * elements)


def _stored_words(degree: int) -> int:
    """n powers of the mask."""
    return degree if degree >= 2 else 0


OPENED_MASK = Protocol("opened_mask", evaluate, cost, _stored_words)
