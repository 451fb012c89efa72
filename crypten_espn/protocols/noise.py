"""Noise on logits before they are revealed.

CrypTen's truncation lets each party know the low bits of its own share, so a party that
learns the answers to one input often enough can average over its own roundings and read
rows of the last layer's weights. Noise that only the other party knows hides exact
answers; it does not hide the average, so it makes the attack cost more queries, not
impossible: with noise of sigma times the roundings' standard deviation, about sigma**2
times as many.
"""

from __future__ import annotations

import crypten.communicator as comm
import torch
from crypten.mpc import MPCTensor

from ..errors import RangeError
from ..randomness import Keystream
from .shares import shared

MOST_BITS = 40


def with_noise(x: MPCTensor, *, noise_bits: int) -> MPCTensor:
    """[x + e] with e uniform in [-2**(d-1), 2**(d-1)) units, known to rank 0 alone.

    Reveal the result to rank 1: rank 0 can take its own noise off again.

    Args:
        x: arithmetic sharing, any shape.
        noise_bits: d, in units of x's encoder; 0 adds nothing.

    Returns:
        MPCTensor of the same shape and scale.

    Cost: nothing is sent.

    Error: below 2**(d - 1 - f) at f fractional bits, the same in every element's
    expectation.

    Raises:
        RangeError: noise_bits outside 0 to 40.
    """
    checked_noise_bits(noise_bits)
    if noise_bits == 0:
        return x
    share = x.share
    if comm.get().get_rank() == 0:
        share = share + noise(tuple(x.size()), noise_bits=noise_bits).to(share.device)
    return shared(share, frac_bits=x.encoder._precision_bits)


def noise(size: tuple[int, ...], *, noise_bits: int) -> torch.Tensor:
    """What `with_noise` adds: int64, uniform in [-2**(d-1), 2**(d-1)), fresh.

    Args:
        size: the shape.
        noise_bits: d, checked; 0 gives zeros.
    """
    if noise_bits == 0:
        return torch.zeros(size, dtype=torch.int64)
    return Keystream().ring(size, bits=noise_bits) - (1 << (noise_bits - 1))


def checked_noise_bits(noise_bits: int) -> int:
    """The number given, if it is one of bits.

    Raises:
        RangeError: it is not a whole number of 0 to 40.
    """
    if isinstance(noise_bits, bool) or not isinstance(noise_bits, int):
        raise RangeError(f"noise_bits={noise_bits!r}: give a whole number of bits")
    if not 0 <= noise_bits <= MOST_BITS:
        raise RangeError(
            f"noise_bits={noise_bits}: give 0 (none) to {MOST_BITS}; a logit's unit is "
            "2**-precision_bits, and noise stays below half of 2**noise_bits units"
        )
    return noise_bits
