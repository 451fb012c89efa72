"""Graphs in which a value is used twice."""

from __future__ import annotations

import crypten
import pytest
import torch
from torch import nn

from .cases import assert_private_agrees, convert, without


def test_graph_inputs() -> None:
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x * x
            return x + x

    x = torch.randn(2, 3)
    with without("graph_inputs"), pytest.raises(ValueError, match="forward"):
        convert(Twice(), x)(x)
    assert torch.allclose(convert(Twice(), x)(x), 2 * x * x)
    assert_private_agrees(Twice(), x)


def test_graph_that_is_not_connected_names_what_is_missing() -> None:
    graph = crypten.nn.Graph("input", "output")
    graph.add_module("output", crypten.nn.module.Add(), ["input", "ghost"])
    with pytest.raises(ValueError, match="ghost"):
        graph(torch.ones(1))
    with pytest.raises(ValueError, match="2 inputs"):
        graph(torch.ones(1), torch.ones(1))
