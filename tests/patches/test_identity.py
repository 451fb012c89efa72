"""Constants that the exporter shares between layers."""

from __future__ import annotations

import io

import crypten
import onnx
import pytest
import torch
from torch import nn

from .cases import assert_private_agrees, convert, without


def test_identity() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    model.eval()
    x = torch.randn(1, 1, 5, 5)
    with without("identity"), pytest.raises(ValueError, match="ONNX op Identity"):
        convert(model, x)
    graph = convert(model, x)
    stored = {n for n, m in graph._modules.items() if type(m).__name__ == "Parameter"}
    counters = "num_batches_tracked"  # no inference needs them
    assert stored == {n for n in model.state_dict() if not n.endswith(counters)}
    values = [graph._modules[n].data.data_ptr() for n in stored]
    assert len(set(values)) == len(values)
    # CrypTen's inverse square root is good to about two parts in a thousand.
    assert_private_agrees(model, x, tolerance=2e-2)
    assert graph.to_pytorch() is not None


def test_identity_of_an_activation_passes_through() -> None:
    node = onnx.helper.make_node
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node("Identity", ["x"], ["a"]), node("Add", ["a", "x"], ["y"])],
        "g",
        [value("x", onnx.TensorProto.FLOAT, [2])],
        [value("y", onnx.TensorProto.FLOAT, [2])],
    )
    model = crypten.nn.from_onnx(
        io.BytesIO(onnx.helper.make_model(graph).SerializeToString())
    )
    assert model(torch.ones(2)).tolist() == [2, 2]
