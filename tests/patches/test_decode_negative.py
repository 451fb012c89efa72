"""Negative values next to a whole number."""

from __future__ import annotations

import pytest
import torch
from crypten.encoder import FixedPointEncoder

from .cases import without


@pytest.mark.parametrize("bits", [8, 12, 16, 20])
def test_decode_negative(bits: int) -> None:
    encoder = FixedPointEncoder(precision_bits=bits)
    ends = torch.arange(-9, 10)[:, None] * 2**bits + torch.arange(-20, 20)
    exact = ends.double() / 2**bits
    assert (encoder.decode(ends) - exact).abs().max() < 1e-6
    assert encoder.decode(ends).dtype == torch.float32
    with without("decode_negative"):
        wrong = (encoder.decode(ends) - exact).abs() > 0.9
        # k - 1 of the values next to each -k, here up to 9.
        assert int(wrong.sum()) == sum(range(9))
        assert bool((exact[wrong] < -1).all())


def test_decode_negative_leaves_integers_alone() -> None:
    values = torch.tensor([-5, -1, 0, 7])
    assert FixedPointEncoder(precision_bits=0).decode(values).tolist() == [-5, -1, 0, 7]
