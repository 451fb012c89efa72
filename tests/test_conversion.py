"""Right in every engine, or refused by name: one test for each kind of fault."""

from __future__ import annotations

import itertools
import re

import crypten
import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn
from torch.nn import functional

import crypten_espn as espn
from crypten_espn.errors import ConversionError, ShapeError
from crypten_espn.graph import export
from crypten_espn.launch import run_parties
from tests import oracle
from tests.conversion_cases import (
    Function,
    activation,
    assert_right,
    constants,
    image,
    refusal,
    rewritten,
    settled,
    vector,
)


def file_of(nodes, shape, *, tensors=None, opset=17, kind=onnx.TensorProto.FLOAT):
    """An ONNX file whose input is x and whose output is y."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", kind, shape)],
        [value("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(a, name) for name, a in (tensors or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    return model.SerializeToString()


# Constants.


@pytest.mark.parametrize("name", list(constants()))
def test_public_constants_fold_or_become_layers(name):
    assert_right(*constants()[name])


def test_crypten_computes_what_constants_became():
    def run():
        errors = {}
        for name, (model, x) in constants().items():
            private = espn.convert(model, x, protocol="opened_mask")
            private.encrypt(src=0)
            y = private(crypten.cryptensor(x)).get_plain_text()
            errors[name] = (y - model(x)).abs().max().item()
        return errors

    (errors,) = run_parties(run, world_size=1)
    assert {name: e for name, e in errors.items() if e > 2e-3} == {}


def test_a_constant_that_no_layer_expresses_is_refused_by_name():
    rows = torch.randn(3, 1)
    assert "inputs of a batch" in refusal(Function(lambda x: x + rows), vector())
    zero = torch.zeros(6)
    assert "divide by zero" in refusal(Function(lambda x: x / zero), vector())
    stack = torch.ones(3, 6, 2)
    found = refusal(Function(lambda x: x[:, None] @ stack), vector())
    assert "a constant of 3 axes" in found
    assert "all inputs of a batch" in refusal(Function(torch.mean), image())
    many = torch.randn(1, 2, 200, 200)
    found = refusal(Function(lambda x: x + many), torch.randn(1, 2, 200, 200))
    assert "80000 constants that differ" in found


def test_constants_of_any_shape_are_taken():
    plane = torch.linspace(0, 1, 48).view(8, 6)
    assert_right(Function(lambda x: x + plane), image())
    assert_right(Function(lambda x: x * plane - 1), image())
    wide = torch.randn(1, 5)
    assert_right(Function(lambda x: x[:, :1] + wide), vector())


def test_an_offset_is_not_folded_through_zero_pads():
    model, x = constants()["normalised, then padded"]
    assert [node.op for node in rewritten(model, x).nodes] == ["Conv", "Conv"]
    model, x = constants()["normalised"]
    assert [node.op for node in rewritten(model, x).nodes] == ["Conv"]


# Attributes, opsets, casts.


@pytest.mark.parametrize(
    ("node", "named"),
    [
        (helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2],
                          dilations=[2, 2]),
         r"dilations=\[2, 2\]"),
        (helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[3, 3],
                          auto_pad="SAME_UPPER"),
         "auto_pad='SAME_UPPER'"),
        (helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2],
                          storage_order=1),
         "storage_order=1"),
        (helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[3, 3],
                          pads=[1, 0, 1, 0]),
         "rows and columns alike"),
        (helper.make_node("Pad", ["x", "pads"], ["y"], mode="mirror"), 
         "mode='mirror'"),
        (helper.make_node("BatchNormalization", ["x", *["one"] * 4], ["y"],
                          training_mode=1), "training_mode=1"),
        (helper.make_node("Dropout", ["x", "half", "true"], ["y"]), "training_mode"),
        (helper.make_node("Relu", ["x"], ["y"], beautiful=1), "beautiful=1"),
    ],
)  # fmt: skip
def test_every_attribute_is_read_or_refused(node, named):
    tensors = {
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
        "one": np.ones(4, np.float32),
        "half": np.array(0.5, np.float32),
        "true": np.array(True),
    }
    used = {name: array for name, array in tensors.items() if name in node.input}
    found = refusal(file_of([node], [3, 4, 8, 6], tensors=used), image())

    assert re.search(named, found), found


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("op", ["Conv", "AveragePool"])
def test_pads_chosen_by_the_operation_are_computed(op, auto_pad):
    weight = np.random.default_rng(0).normal(size=(4, 4, 3, 2)).astype(np.float32)
    given = {"kernel_shape": [3, 2], "strides": [2, 1], "auto_pad": auto_pad}
    inputs = ["x", "w"] if op == "Conv" else ["x"]
    data = file_of(
        [helper.make_node(op, inputs, ["y"], **given)],
        ["batch", 4, 8, 6],
        tensors={"w": weight} if op == "Conv" else {},
    )
    (expected,) = onnx.reference.ReferenceEvaluator(data).run(
        None, {"x": image().numpy()}
    )
    got = oracle.run_graph(rewritten(data, image()), image())
    torch.testing.assert_close(got, torch.from_numpy(expected), atol=1e-5, rtol=1e-4)
    assert espn.check(data, image()).ok


def test_gemm_with_factors_and_a_broadcast_bias():
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(6, 3)).astype(np.float32)
    for bias in (np.float32(0.5), np.ones((1, 3), np.float32)):
        node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], alpha=2.0, beta=0.5)
        tensors = {"w": weight, "b": np.asarray(bias, np.float32)}
        data = file_of([node], ["n", 6], tensors=tensors)
        got = oracle.run_graph(rewritten(data, vector()), vector())
        expected = 2 * vector().numpy() @ weight + 0.5 * bias
        np.testing.assert_allclose(got, expected, atol=1e-5)
    node = helper.make_node("Gemm", ["x", "w"], ["y"], transA=1)
    data = file_of([node], [3, 6], tensors={"w": weight[:3]})
    assert "transA=1" in refusal(data, vector())


@pytest.mark.parametrize("opset", [10, 12, 17, 21])
def test_each_file_is_read_at_its_own_opset(opset):
    axes = np.array([2, 3])
    nodes, tensors = [], {}
    if opset < 18:
        nodes += [helper.make_node("ReduceMean", ["x"], ["m"], axes=[2, 3], keepdims=1)]
    else:
        nodes += [helper.make_node("ReduceMean", ["x", "axes"], ["m"], keepdims=1)]
    if opset < 13:
        nodes += [helper.make_node("Squeeze", ["m"], ["y"], axes=[2, 3])]
    else:
        nodes += [helper.make_node("Squeeze", ["m", "axes"], ["y"])]
    if opset >= 13:
        tensors = {"axes": axes}
    data = file_of(nodes, ["n", 4, 8, 6], tensors=tensors, opset=opset)
    got = oracle.run_graph(rewritten(data, image()), image())
    torch.testing.assert_close(got, image().mean((2, 3)))


@pytest.mark.parametrize("opset", [6, 99])
def test_an_unknown_opset_is_refused(opset):
    data = file_of([helper.make_node("Relu", ["x"], ["y"])], [3, 6], opset=opset)
    with pytest.raises(ConversionError, match=f"version {opset} of ONNX"):
        espn.check(data, vector())


def test_casts_are_dropped_between_real_types_only():
    fc = nn.Linear(6, 3)
    assert_right(Function(lambda x, a: a(x.double().float()), fc), vector())
    found = refusal(Function(lambda x, a: a(x.long().float()), fc), vector())
    assert "Cast" in found and "INT64" in found
    whole = torch.randint(0, 9, (3, 6))
    assert espn.check(Function(lambda x, a: a(x.float()), fc), whole).ok
    assert "integers" in refusal(Function(lambda x, a: a((x * 2).float()), fc), whole)


def test_norms_fold_along_their_own_axis():
    x = torch.randn(3, 4, 4)
    model = settled(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), x)
    assert_right(model, x)
    model = settled(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), vector())
    assert len(assert_right(model, vector()).nodes) == 1


# What passes did not foresee.


def test_products_without_bias_and_with_a_computed_one():
    fc = nn.Linear(6, 3, bias=False)

    def twice(x, a):
        y = a(x)
        return y + y

    assert_right(Function(twice, fc), vector())
    assert_right(
        Function(lambda x, a: torch.addmm(a(x), x, torch.ones(6, 3)), fc), vector()
    )


def test_what_a_pass_did_not_foresee_is_the_nodes_problem():
    node = helper.make_node("Flatten", ["x"], ["f"], axis=1, name="/body/Flatten")
    odd = helper.make_node("Split", ["f"], ["y", "z"], name="/body/Split")
    data = file_of([node, odd], [3, 6])
    # A file that is not valid: split along an axis that does not divide.
    report = espn.check(data, torch.randn(3, 6))
    assert not report.ok
    broken = helper.make_node("Concat", ["x", "x"], ["y"], name="/head/Concat")
    found = refusal(file_of([broken], [3, 6]), vector())
    assert found.startswith("head (Concat)")


def test_nodes_that_run_other_graphs_are_refused():
    value = helper.make_tensor_value_info("b", onnx.TensorProto.FLOAT, None)
    branch = helper.make_graph(
        [helper.make_node("Mul", ["x", "x"], ["b"])], "branch", [], [value]
    )
    node = helper.make_node(
        "If", ["yes"], ["y"], then_branch=branch, else_branch=branch
    )
    data = file_of([node], [3, 6], tensors={"yes": np.array(True)})
    assert "If" in refusal(data, vector())
    bag = nn.EmbeddingBag(9, 3)
    assert "Loop" in refusal(bag, torch.randint(0, 9, (2, 5)))


def test_constants_with_several_outputs_are_evaluated():
    def standardised(x, a):
        flat = a.weight.view(1, 4, -1)
        weight = functional.batch_norm(flat, None, None, training=True)
        return functional.conv2d(x, weight.view_as(a.weight))

    assert len(assert_right(Function(standardised, nn.Conv2d(4, 4, 3)), image()).nodes)
    node = helper.make_node("Split", ["w"], ["a", "b"], axis=0)
    add = helper.make_node("Add", ["x", "b"], ["y"])
    data = file_of([node, add], [3, 6], tensors={"w": np.ones((2, 6), np.float32)})
    assert_file_right(data, vector(), vector() + 1)


def assert_file_right(data, x, expected):
    assert espn.check(data, x).ok
    torch.testing.assert_close(oracle.run_graph(rewritten(data, x), x), expected)


def test_random_numbers_are_not_constants():
    assert "drawn anew" in refusal(Function(lambda x: x + torch.randn(6)), vector())


@pytest.mark.parametrize(
    ("model", "x", "named"),
    [
        (nn.AvgPool3d(2), (2, 3, 8, 8, 8), "two-dimensional"),
        (nn.Conv3d(3, 4, 2), (2, 3, 8, 8, 8), "two-dimensional"),
        (nn.AdaptiveAvgPool3d(3), (2, 3, 8, 8, 8), "adaptive_avg_pool3d"),
        (Function(torch.special.i0), (2, 6), "i0"),
        (Function(lambda x: functional.dropout2d(x, training=True)), (2, 3, 4, 4),
         "drop"),
        (Function(lambda x: functional.dropout(x, training=True)), (2, 6), "Dropout"),
        (Function(lambda x, a: a(x)[0], nn.LSTM(6, 3)), (2, 4, 6), "LSTM"),
        (
            Function(lambda x: functional.batch_norm(x, None, None, training=True)),
            (2, 3, 4, 4),
            "all inputs of a batch together",
        ),
    ],
)  # fmt: skip
def test_check_reports_whatever_can_be_traced(model, x, named):
    found = str(espn.check(model, torch.randn(x)))
    assert named in found and "cannot be converted" in found


def test_dropout_is_dropped_whatever_crypten_registered():
    model = nn.Sequential(nn.Conv2d(4, 3, 3), nn.Dropout2d(), nn.Dropout()).eval()
    crypten.nn.from_pytorch(nn.Sequential(nn.Linear(6, 3), nn.Dropout()), vector())
    assert [n.op for n in assert_right(model, image()).nodes] == ["Conv"]


# Comparison.


def test_check_compares_with_the_network_and_names_the_layer(monkeypatch):
    from crypten_espn.graph import passes
    from crypten_espn.graph.passes.weights import convolutions

    def wrong(graph):
        convolutions(graph)
        for node in graph.each("Conv"):
            if node.name.startswith("/layers.1"):
                name = node.inputs[1]
                graph.constants[name] = graph.constants[name] * 1.5

    monkeypatch.setattr(
        passes,
        "PASSES",
        tuple(wrong if p is convolutions else p for p in passes.PASSES),
    )
    convs = [nn.Conv2d(4, 4, (3, 1)) for _ in range(3)]
    for act in convs:
        nn.init.normal_(act.weight, std=0.3)
    model = Function(lambda x, a, b, c: c(b(a(x))), *convs)
    found = refusal(model, image())
    assert found.startswith("layers.1 (Conv)") and "is not the network" in found


def test_activations_beside_constants_keep_their_meaning():
    for order in itertools.permutations((lambda y: 2 * y, activation(), torch.neg)):
        first, second, third = order
        layers = nn.Conv2d(4, 4, 3), activation()
        model = Function(
            lambda x, a, p, f=first, s=second, t=third: t(s(f(a(x)))), *layers
        )
        assert_right(model, image())


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ShapeError, match="wants"):
        espn.check(export(nn.Linear(4, 2), torch.randn(1, 4)), torch.randn(1, 5))
