"""The rewritten graph computes what the module computes, on every layer it accepts."""

from __future__ import annotations

import onnx
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import crypten_espn as espn
from crypten_espn.errors import ConversionError, ShapeError
from crypten_espn.graph import Node, export, layer_name, read, simplify
from crypten_espn.polynomial import Polynomial
from tests import oracle

POLYNOMIAL = Polynomial.fit(torch.relu, degree=4)


def settle(model, example):
    """Batch-norm statistics that are not those of a fresh layer."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = None
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()
    with torch.no_grad():
        model(example)
    return model.eval()


def compare(model, example, *, batch=2):
    """Trace with one image, compare on several."""
    graph = read(model, example[:1])
    simplify(graph)
    with torch.no_grad():
        expected = model(example[:batch])
    got = oracle.run_graph(graph, example[:batch])
    scale = expected.abs().max().item()
    torch.testing.assert_close(got, expected, atol=2e-5 * max(scale, 1), rtol=1e-4)
    return graph


class Everything(nn.Module):
    """Each construct that the passes treat specially, once."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=(1, 0), bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.pad = nn.ZeroPad2d((1, 2, 0, 1))
        self.same = nn.Conv2d(8, 8, (5, 3), padding="same", groups=2)
        self.dilated = nn.Conv2d(8, 8, 3, dilation=2, stride=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pool = nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False)
        self.before = nn.BatchNorm2d(16)
        self.act = espn.PolynomialActivation(POLYNOMIAL)
        self.drop = nn.Dropout()
        self.hidden = nn.Linear(16, 12)
        self.flat_norm = nn.BatchNorm1d(12)
        self.last = nn.Linear(12, 5, bias=False)

    def forward(self, x):
        x = self.pad(self.norm(self.stem(x)))
        x = self.dilated(self.same(x))
        x = torch.cat([x, self.depthwise(x)], 1)
        x = self.act(self.before(self.pool(x)))
        x = x.mean([2, 3])
        x = self.drop(x.view(x.size(0), -1))
        return self.last(self.flat_norm(self.hidden(x))) + 0.5


def test_every_special_construct():
    example = torch.randn(4, 3, 19, 17)
    model = settle(Everything(), example)
    graph = compare(model, example, batch=3)
    again = read(export(model, example[:1]), example[:1])
    simplify(again)
    assert again.nodes == graph.nodes and again.shapes == graph.shapes
    kinds = [node.op for node in graph.nodes]
    assert "BatchNormalization" not in kinds and "Reshape" not in kinds
    assert set(kinds) <= {
        "Conv",
        "Pad",
        "Mix",
        "Move",
        "Concat",
        "AveragePool",
        "PolynomialActivation",
        "GlobalAveragePool",
        "Flatten",
        "Gemm",
        "Add",
    }
    assert any("folded" in change for change in graph.changes)
    assert any("depthwise" in change for change in graph.changes)


@pytest.mark.slow
@settings(deadline=None, max_examples=25)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
)
def test_any_convolution(kernel, stride, padding, dilation, groups, bias):
    model = nn.Sequential(
        nn.Conv2d(
            4, 8, kernel, stride, padding, dilation=dilation, groups=groups, bias=bias
        ),
        nn.BatchNorm2d(8),
    )
    example = torch.randn(3, 4, 12, 11)
    compare(settle(model, example), example)


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.integers(1, 3),
    padded=st.booleans(),
    ceil_mode=st.booleans(),
    include=st.booleans(),
)
def test_any_average_pool(kernel, stride, padded, ceil_mode, include):
    padding = (kernel[0] // 2, kernel[1] // 2) if padded else (0, 0)
    model = nn.AvgPool2d(kernel, stride, padding, ceil_mode, include)
    example = torch.randn(2, 3, 11, 10)
    if ceil_mode:
        # A last window wholly outside the image: refused, not computed wrongly.
        graph = read(model, example)
        simplify(graph)
        if any(node.problem for node in graph.nodes):
            assert not espn.check(model, example).ok
            return
    compare(model, example)


def torchvision_network(name):
    build = getattr(torchvision.models, name)
    extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    extra |= {"aux_logits": False} if extra else {}
    model = build(**extra)
    # Nearly linear: an untrained network must not run out of the interval.
    tame = Polynomial((0, 512, 8), 10, (-5.0, 5.0))
    model = espn.replace_activations(model, {nn.ReLU: tame, nn.ReLU6: tame})
    model = espn.replace_pooling(model)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", 64),
        ("resnet34", 64),
        ("resnet50", 64),
        ("mobilenet_v2", 64),
        ("densenet121", 64),
        ("googlenet", 64),
        ("inception_v3", 96),
        ("vgg16_bn", 224),
    ],
)
def test_torchvision_networks(name, size):
    example = torch.randn(2, 3, size, size)
    model = settle(torchvision_network(name), example)
    # In float32 a deep network amplifies its own rounding beyond any fixed tolerance.
    graph = compare(model.double(), example.double())
    kinds = {node.op for node in graph.nodes}
    assert "Relu" not in kinds and "Clip" not in kinds and "MaxPool" not in kinds


def test_layer_names_are_module_paths():
    assert layer_name(Node("Conv", [], "v", {}, "/layer1/0/conv1/Conv")) == (
        "layer1.0.conv1"
    )
    assert layer_name(Node("Relu", [], "v", {}, "/layer1/0/relu_1/Relu_2")) == (
        "layer1.0.relu_1"
    )
    assert layer_name(Node("Add", [], "value", {}, "")) == "value"


def test_onnx_file_on_disk(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
    example = torch.randn(2, 3, 2, 2)
    path = tmp_path / "model.onnx"
    path.write_bytes(export(model, example))
    graph = read(path, example)
    simplify(graph)
    torch.testing.assert_close(oracle.run_graph(graph, example), model(example))


class TwoInputs(nn.Module):
    def forward(self, x, y=None):
        return x, x + 1


class Branching(nn.Module):
    def forward(self, x):
        raise RuntimeError("no trace today")


def test_unreadable_sources_are_named(tmp_path):
    example = torch.randn(1, 4)
    with pytest.raises(ConversionError, match="one of each"):
        read(TwoInputs(), example)
    with pytest.raises(ConversionError, match="no trace today"):
        read(Branching(), example)
    with pytest.raises(ConversionError, match=r"no file .*missing\.onnx"):
        read(tmp_path / "missing.onnx", example)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not onnx at all")
    with pytest.raises(ConversionError, match="not an ONNX model"):
        read(broken, example)
    with pytest.raises(ShapeError, match="wants"):
        read(export(nn.Linear(4, 2), example), torch.randn(1, 5))


def test_fixed_shape_file_takes_any_batch():
    data = export(nn.Linear(4, 2), torch.randn(1, 4))
    assert read(data, torch.randn(7, 4)).shapes["input"] == (7, 4)
    assert onnx.load_model_from_string(data).opset_import[0].version == 17
