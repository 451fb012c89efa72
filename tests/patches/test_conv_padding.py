"""Convolutions padded differently in each dimension, or at the two ends."""

from __future__ import annotations

import io

import crypten
import onnx
import torch
from torch import nn

from .cases import assert_private_agrees, convert, private, without


def test_conv_padding() -> None:
    model, x = nn.Conv2d(2, 3, 3, padding=(1, 0)).eval(), torch.randn(1, 2, 6, 5)
    with without("conv_padding"):
        assert private(convert(model, x), x).shape != model(x).shape
    assert_private_agrees(model, x)


def test_conv_padding_differs_at_the_two_ends() -> None:
    weight = torch.randn(3, 2, 2, 3)
    node = onnx.helper.make_node(
        "Conv",
        ["x", "w"],
        ["y"],
        strides=[1, 2],
        dilations=[1, 1],
        pads=[1, 0, 0, 2],
        kernel_shape=[2, 3],
    )
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [value("x", onnx.TensorProto.FLOAT, [1, 2, 4, 5])],
        [value("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(weight.numpy(), "w")],
    )
    model = onnx.helper.make_model(graph)
    x = torch.randn(1, 2, 4, 5)
    padded = nn.functional.pad(x, (0, 2, 1, 0))
    expected = nn.functional.conv2d(padded, weight, stride=(1, 2))
    converted = crypten.nn.from_onnx(io.BytesIO(model.SerializeToString())).eval()
    assert (private(converted, x) - expected).abs().max() < 2e-3
