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

# exact() adds 2**62 so that a value below it in magnitude becomes non-negative.
OFFSET_BITS = 62


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


def exact(share: torch.Tensor, shift: int) -> torch.Tensor:
    """Share of y / 2^shift without failures, for |y| < 2^62. Any number of parties.

    1. Obtain [r] for r uniform, and its two negated right shifts [t].
    2. Open c = [y] + 2^62 + [r].
    3. y + 2^62 < 2^63, so the sum passed 2^64 exactly when r's top bit is 1 and c's is
       0: take t logical if c's top bit is 1, arithmetic if it is 0.
    4. [y / 2^shift] = (c >> shift) - 2^(62 - shift) + [t], the public part at party 0.

    Args:
        share: int64 share of y, any shape.
        shift: bits to drop, 0 to 62.

    Returns:
        int64 share of the quotient, same shape.

    Cost: 1 round, 8 bytes per element and party; offline 2 corrections per element.

    Error: floor(y / 2^shift) or that plus one, unbiased; no failure for |y| < 2^62.
    """
    if shift == 0:
        return share
    mask, logical, arithmetic = rescaling(share.size(), shift).to(share.device)
    masked = share + mask
    first = comm.get().get_rank() == 0
    opened = comm.get().all_reduce(masked + 2**OFFSET_BITS if first else masked)
    quotient = torch.where(opened < 0, logical, arithmetic)
    if first:
        quotient += logical_shift(opened, shift) - 2 ** (OFFSET_BITS - shift)
    return quotient


def exact_cost(shift: int, elements: int) -> Cost:
    """Declared cost of `exact` for one party."""
    return Cost(1, RING_BYTES * elements, 2 * elements) if shift else Cost()


def failure_probability(magnitude: float, out_bits: int) -> float:
    """Chance per element that `local` fails on this magnitude at scale 2^out_bits."""
    return min(1.0, magnitude * 2.0 ** (out_bits - 64))
