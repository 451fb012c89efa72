"""Pools with padding, and with a kernel for each dimension."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from .cases import assert_private_agrees, convert, private, without


@pytest.mark.parametrize("include", [True, False])
def test_average_pool(include: bool) -> None:
    model = nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=include)
    x = torch.randn(2, 2, 6, 6) + 1
    if not include:
        with without("average_pool"):
            wrong = private(convert(model, x), x)
        assert (wrong - model(x)).abs().max() > 0.1
    assert_private_agrees(model, x)


@pytest.mark.parametrize("kind", [nn.AvgPool2d, nn.MaxPool2d])
def test_pools_keep_every_dimension(kind: type[nn.Module]) -> None:
    model = kind((2, 3), stride=(1, 2), padding=1)
    x = torch.randn(1, 2, 5, 7)
    with without("average_pool"), pytest.raises(AssertionError):
        convert(model, x)
    assert_private_agrees(model, x)


def test_average_pool_pads_each_dimension_and_max_pool_refuses() -> None:
    x = torch.randn(1, 2, 5, 7)
    assert_private_agrees(nn.AvgPool2d(3, stride=2, padding=(0, 1)), x)
    with pytest.raises(ValueError, match="one padding for both"):
        convert(nn.MaxPool2d(3, stride=2, padding=(0, 1)), x)
