"""Parameters that may be written to."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from .cases import convert, without


def test_onnx_arrays() -> None:
    model, x = nn.Linear(3, 2), torch.randn(1, 3)
    with without("onnx_arrays"), pytest.raises(UserWarning, match="not writable"):
        convert(model, x)
    graph = convert(model, x)
    with torch.no_grad():
        graph._modules["weight"].data.add_(1)
    assert torch.equal(graph._modules["weight"].data, model.weight.data + 1)
