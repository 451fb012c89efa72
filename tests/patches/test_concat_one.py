"""A concatenation of a single value."""

from __future__ import annotations

import pytest
import torch
from crypten.nn.module import Concat

from crypten_espn import patches


def test_a_single_value_is_handed_on() -> None:
    x = torch.ones(2, 3)
    assert Concat(1)(x) is x
    patch = patches.get("concat_one")
    patch.revert()
    try:
        with pytest.raises(AssertionError, match="list or tuple"):
            Concat(1)(x)
    finally:
        patch.apply()
