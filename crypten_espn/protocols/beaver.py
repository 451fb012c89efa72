"""CrypTen's own way: a tree of Beaver products, about log2(degree) rounds. A baseline.

Source: Beaver, CRYPTO 1991; the tree is that of CrypTen's `polynomial`, with the powers
kept in the ring between products, so that nothing is truncated on the way.
"""

from __future__ import annotations

import crypten.communicator as comm
import torch
from crypten.mpc.primitives import ArithmeticSharedTensor, beaver

from ..cost import RING_BYTES, Cost
from ..polynomial import Form
from .protocol import Protocol


def evaluate(x: torch.Tensor, p: torch.Tensor, form: Form) -> torch.Tensor:
    """Share of c_0 + c_1 X + sum_{k>=2} c_k P^k modulo 2^64.

    1. [P^2] by one Beaver square.
    2. While powers are missing, multiply those known so far by the highest known.
    3. Combine the powers with the public coefficients; party 0 adds c_0.

    Args:
        x: int64 share of X at scale 2**form.frac_bits; any shape that the form's
            `check` takes.
        p: int64 share of P, same shape.
        form: the polynomial's integers.

    Returns:
        int64 share of the result at scale 2**form.out_bits, same shape.

    Cost: ceil(log2 n) rounds; 8 bytes per element and party for the square and for each
    missing power, and 8 more for each further round; offline as many corrections as
    powers.

    Error: exact modulo 2^64.
    """
    n = form.degree
    result = form.linear_share(x, comm.get().get_rank())
    if n < 2:
        return result

    base = ArithmeticSharedTensor.from_shares(p, precision=0)
    known = torch.stack([p, beaver.square(base).share.data])
    for missing in _batches(n):
        factors = ArithmeticSharedTensor.from_shares(known[:missing], precision=0)
        highest = ArithmeticSharedTensor.from_shares(known[-1:], precision=0)
        known = torch.cat([known, beaver.mul(factors, highest).share.data])
    for k in range(2, n + 1):
        c = form.multiple(k, 1, p)
        if c is not None:
            result += known[k - 1] * c
    return result


def _batches(degree: int) -> list[int]:
    """How many powers each round after the square adds."""
    batches, known = [], 2
    while known < degree:
        batches.append(min(known, degree - known))
        known += batches[-1]
    return batches


def cost(form: Form, elements: int) -> Cost:
    """Declared cost of `evaluate` for one party."""
    if form.degree < 2:
        return Cost()
    batches = _batches(form.degree)
    opened = 1 + sum(batch + 1 for batch in batches)
    corrections = 1 + sum(batches)
    return Cost(
        1 + len(batches), RING_BYTES * opened * elements, corrections * elements
    )


def product_cost(first: int, second: int) -> Cost:
    """Declared cost of CrypTen's own product of two private values for one party.

    Args:
        first: elements of the product.
        second: of the other factor, which may have one element for many.

    Both factors are opened under masks in one message; the dealer corrects the product
    of the masks. What is rounded afterwards each party rounds alone.
    """
    return Cost(1, RING_BYTES * (first + second), first)


def _stored_words(degree: int) -> int:
    """A triple for each product of the tree; a square's is a pair."""
    if degree < 2:
        return 0
    words, known = 2, 2
    while known < degree:
        added = min(known, degree - known)
        words += 2 * added + 1
        known += added
    return words


BEAVER = Protocol("beaver", evaluate, cost, _stored_words)
