"""Dropping low bits of a shared value: locally with a chance of failure, or exactly.

Source: local truncation, Mohassel and Zhang, SecureML, IEEE S&P 2017; with a known top
bit, Escudero et al., CRYPTO 2020, and Dalskov et al., Fantastic Four, USENIX Security
2021.
"""

from __future__ import annotations

import crypten.communicator as comm
import torch

from ..correlated import logical_shift, rescaling
from ..cost import RING_BYTES, Cost


def local(share: torch.Tensor, shift: int) -> torch.Tensor:
    """Share of y / 2^shift: each party shifts its own share. Two parties, or one.

    1. Shift the share right, rounding down.
    2. Party 0 adds one unit, so that the error is centred.

    Args:
        share: int64 share of y, any shape.
        shift: bits to drop, 0 to 62.

    Returns:
        int64 share of the quotient, same shape.

    Cost: no communication, no randomness.

    Error: within one unit (-1, 1]; off by 2^(64 - shift) units with probability
    |y| / 2^64 per element, see `failure_probability`.
    """
    if shift == 0:
        return share
    quotient = share >> shift
    return quotient + 1 if comm.get().get_rank() == 0 else quotient


def exact(share: torch.Tensor, shift: int, *, ring_bits: int = 64) -> torch.Tensor:
    """Share of y / 2^shift without failures, for |y| < 2^(m-2). Any number of parties.

    1. Obtain [r] for r uniform, and the two negated right shifts [t] of its m low bits.
    2. Open c = [y] + 2^(m-2) + [r], of which the m low bits count.
    3. y + 2^(m-2) < 2^(m-1), so the sum passed 2^m exactly when r's top bit is 1 and
       c's is 0: take t logical if c's top bit is 1, arithmetic if it is 0.
    4. [y / 2^shift] = (c >> shift) - 2^(m-2-shift) + [t], the public part at party 0.

    Args:
        share: int64 share of y modulo 2^m, any shape.
        shift: bits to drop, 0 to m - 2.
        ring_bits: m; a ring below 64 bits is lifted to 64 on the way.

    Returns:
        int64 share of the quotient modulo 2^64, same shape.

    Cost: 1 round, 8 bytes per element and party; offline 2 corrections per element.

    Error: floor(y / 2^shift) or that plus one, unbiased; no failure for |y| < 2^(m-2).
    """
    if shift == 0 and ring_bits == 64:
        return share
    stack = rescaling(share.size(), shift, ring_bits=ring_bits).to(share.device)
    mask, logical, arithmetic = stack
    masked = share + mask
    first = comm.get().get_rank() == 0
    offset = ring_bits - 2
    opened = comm.get().all_reduce(masked + 2**offset if first else masked)
    # The m low bits, moved to the top, so that their sign is c's top bit.
    opened = opened << (64 - ring_bits)
    quotient = torch.where(opened < 0, logical, arithmetic)
    if first:
        quotient += logical_shift(opened, 64 - ring_bits + shift)
        quotient -= 2 ** (offset - shift)
    return quotient


def exact_cost(shift: int, elements: int) -> Cost:
    """Declared cost of `exact` for one party."""
    return Cost(1, RING_BYTES * elements, 2 * elements) if shift else Cost()


def failure_probability(magnitude: float, out_bits: int) -> float:
    """Chance per element that `local` fails on this magnitude at scale 2^out_bits."""
    return min(1.0, magnitude * 2.0 ** (out_bits - 64))
