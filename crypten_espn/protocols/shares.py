"""An MPCTensor from this party's share."""

from __future__ import annotations

import crypten
import torch
from crypten.mpc import MPCTensor
from crypten.mpc.primitives import ArithmeticSharedTensor


def shared(share: torch.Tensor, *, frac_bits: int) -> MPCTensor:
    """The arithmetic sharing whose part at this party is `share`.

    Args:
        share: int64, any shape.
        frac_bits: of the value.
    """
    result = MPCTensor([])
    result._tensor = ArithmeticSharedTensor.from_shares(share, precision=frac_bits)
    result.ptype = crypten.mpc.arithmetic
    return result
