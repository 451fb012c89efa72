"""The ONNX exporter that CrypTen's converter is written for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from .cases import convert, without


def test_exporter() -> None:
    model, x = nn.Sequential(nn.Linear(3, 2), nn.Softmax(dim=1)), torch.randn(2, 3)
    with without("exporter"), pytest.raises(Exception):  # noqa: B017 - torch's own
        convert(model, x)
    graph = convert(model, x)
    # CrypTen's symbolic keeps softmax whole; its default would be a string of nodes.
    assert [type(m).__name__ for m in graph.modules()][-1] == "Softmax"
