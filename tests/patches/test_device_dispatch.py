"""torch's functions of CrypTen's integers; tests/test_cuda.py has them on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from crypten_espn.patches.device_dispatch import wrapped

from .cases import without

X, Y = torch.tensor([1, -2, 3]), torch.tensor([4, 5, -6])


def plain(value: Any) -> torch.Tensor:
    tensor: torch.Tensor = value.tensor()
    return tensor


def test_functions_of_one_and_of_lists() -> None:
    x, y = wrapped(X), wrapped(Y)
    assert torch.equal(plain(torch.add(x, y)), X + Y)
    assert torch.equal(plain(torch.stack([x, y])), torch.stack([X, Y]))
    assert torch.equal(plain(torch.cat([x, y], dim=0)), torch.cat([X, Y]))
    assert torch.equal(plain(torch.add(X, other=y)), X + Y)
    assert torch.equal(plain(torch.lt(x, y)), (X < Y).long())
    low, high = torch.aminmax(x)
    assert (plain(low), plain(high)) == (-2, 3)
    assert torch.numel(x) == 3


def test_without_it_a_list_never_returns_and_torch_warns() -> None:
    with without("device_dispatch"):
        with pytest.warns(UserWarning, match="plain method"):
            torch.numel(wrapped(X))
        with pytest.raises(RecursionError):
            torch.stack([wrapped(X), wrapped(Y)])
