"""Values that a fixed-point encoding cannot hold."""

from __future__ import annotations

import math

import pytest
import torch
from crypten.encoder import FixedPointEncoder

from crypten_espn.errors import RangeError

from .cases import without


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([1.0, math.nan]),
        torch.tensor([math.inf]),
        torch.tensor([-(2.0**48)]),
        torch.tensor([2**47]),
        1e20,
    ],
)
def test_encoder_range(value: torch.Tensor | float) -> None:
    encoder = FixedPointEncoder(precision_bits=16)
    with without("encoder_range"):
        encoder.encode(value if torch.is_tensor(value) else torch.tensor([value]))
    with pytest.raises(RangeError, match=r"finite and below 2\*\*47"):
        encoder.encode(value)


def test_encoder_range_lets_everything_else_pass() -> None:
    encoder = FixedPointEncoder(precision_bits=16)
    edge = torch.tensor([2.0**46, -(2.0**47), 0.0])
    assert encoder.encode(edge).tolist() == [2**62, -(2**63), 0]
    assert encoder.encode(torch.empty(0)).numel() == 0
    assert encoder.encode(3) == 3 * 2**16
    whole = torch.tensor([2**63 - 1, -(2**63)])
    assert torch.equal(FixedPointEncoder(precision_bits=0).encode(whole), whole)
