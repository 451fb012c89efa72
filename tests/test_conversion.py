"""Right in every engine, or refused by name: one test for each kind of fault."""

from __future__ import annotations

import copy
import itertools
import re
import warnings
from collections.abc import Callable
from typing import Any

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
from crypten_espn.graph import export, read, simplify
from crypten_espn.launch import run_parties
from tests import oracle
from tests.conversion_cases import (
    POLYNOMIAL,
    Function,
    activation,
    constants,
    image,
    settled,
    vector,
)

SUPPORTED = {
    "Add", "AveragePool", "Concat", "Conv", "Flatten", "Gemm", "GlobalAveragePool",
    "Pad", "PolynomialActivation", "Scale",
}  # fmt: skip


def rewritten(model, example):
    graph = read(model, example)
    simplify(graph)
    return graph


def assert_right(model, example, *, batch=5):
    """What conversion makes of a network computes it, for other inputs and batches."""
    report = espn.check(model, example)
    assert report.ok, report
    graph = rewritten(model, example)
    assert {node.op for node in graph.nodes} <= SUPPORTED
    x = torch.cat([example, -example])[:batch]
    expected = model(x).detach()
    torch.testing.assert_close(
        oracle.run_graph(graph, x.float()), expected, atol=1e-5, rtol=1e-4
    )
    return graph


def refusal(model, example):
    """The one finding that stops a network."""
    report = espn.check(model, example)
    blocking = [finding for finding in report.findings if finding.blocking]
    assert blocking, report
    with pytest.raises(ConversionError):
        espn.convert(model, example)
    return str(blocking[0])


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
    plane = torch.linspace(0, 1, 48).view(8, 6)
    assert "differs between the pixels" in refusal(
        Function(lambda x: x + plane), image()
    )
    rows = torch.randn(3, 1)
    assert "inputs of a batch" in refusal(Function(lambda x: x + rows), vector())
    wide = torch.randn(1, 5)
    assert "enlarge" in refusal(Function(lambda x: x[:, :1] + wide), vector())
    zero = torch.zeros(6)
    assert "divide by zero" in refusal(Function(lambda x: x / zero), vector())


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
        (helper.make_node("Pad", ["x", "pads"], ["y"], mode="reflect"), 
         "mode='reflect'"),
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
    found = refusal(model, x)
    assert found.startswith("1 (BatchNormalization)") and "each channel" in found
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
        (nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten()), (2, 3, 8), "two-dim"),
        (nn.MaxPool1d(2), (2, 3, 8), "two-dimensional"),
        (nn.AdaptiveAvgPool2d(3), (2, 3, 8, 8), "adaptive_avg_pool2d"),
        (Function(torch.special.i0), (2, 6), "i0"),
        (Function(lambda x: functional.dropout2d(x, training=True)), (2, 3, 4, 4),
         "drop"),
        (Function(lambda x: functional.dropout(x, training=True)), (2, 6), "Dropout"),
        (Function(lambda x, a: a(x)[0], nn.LSTM(6, 3)), (2, 4, 6), "LSTM"),
        (
            Function(lambda x: functional.batch_norm(x, None, None, training=True)),
            (2, 3, 4, 4),
            "Reshape",
        ),
    ],
)  # fmt: skip
def test_check_reports_whatever_can_be_traced(model, x, named):
    found = str(espn.check(model, torch.randn(x)))
    assert named in found and "cannot be converted" in found


# Tracing.


def test_a_branch_on_the_data_is_refused_with_its_line():
    def branching(x, a, b):
        return a(x) if x.sum() > 0 else b(x)

    model = Function(branching, nn.Linear(6, 3), nn.Linear(6, 3))
    line = branching.__code__.co_firstlineno + 1
    with pytest.raises(ConversionError, match=rf"test_conversion\.py, line {line}"):
        espn.check(model, vector())
    for leak in (lambda x: x * x.max().item(), lambda x: x + float(x[0, 0])):
        with pytest.raises(ConversionError, match="depends on the input"):
            espn.check(Function(leak), vector())


def test_branches_on_shapes_and_weights_are_harmless():
    def branching(x, a):
        if x.shape[1] > 3 and x.size(0) > 0 and a.weight.abs().sum() > 0:
            return a(x).view(int(x.size(0)), -1)
        return x

    assert_right(Function(branching, nn.Linear(6, 3)), vector())


def test_what_hangs_on_the_batch_size_is_refused():
    fc = nn.Linear(6, 3)
    branch = Function(lambda x, a: a(x) if x.size(0) > 7 else 2 * a(x), fc)
    with pytest.raises(ConversionError, match="branch on the batch size"):
        espn.check(branch, vector())
    found = refusal(Function(lambda x, a: a(x) / x.size(0), fc), vector())
    assert "off by" in found


def test_values_outside_the_trace_are_not_frozen():
    model = Function(lambda x, a: a(x.data) + a(x.detach()), nn.Linear(6, 3))
    assert_right(model, vector())


def test_tracing_leaves_the_network_as_it_was(capfd):
    calls = []

    class Counting(nn.Module):
        seen: torch.Tensor

        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
            self.register_buffer("seen", torch.zeros(()))
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            self.seen.add_(1)
            self.last = x
            return self.body(x.mul_(1.0))

    model = Counting().train()
    model.body[1].eval()
    model.register_forward_hook(lambda *given: calls.append(1))
    state, x = copy.deepcopy(model.state_dict()), image()
    kept, seed = x.clone(), torch.random.get_rng_state()
    espn.check(model, x)
    assert [m.training for m in model.modules()] == [True, True, True, False]
    assert model.calls == 0 and not hasattr(model, "last") and calls
    assert torch.equal(x, kept) and torch.equal(torch.random.get_rng_state(), seed)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    assert len(model._forward_hooks) == 1
    with pytest.raises(ConversionError):
        export(Function(lambda x: torch.ones(2) @ torch.ones(3)), x)
    espn.check(Function(torch.special.i0), x)
    assert capfd.readouterr() == ("", "")


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


# Advice.


def fitted(f):
    return espn.PolynomialActivation(POLYNOMIAL.fit(f, degree=4))


ADVICE = {
    "silu": (nn.SiLU(), nn.SiLU),
    "silu as a function": (functional.silu, nn.SiLU),
    "silu by hand": (lambda y: y * torch.sigmoid(y), nn.SiLU),
    "gelu": (nn.GELU(), nn.GELU),
    "gelu by tanh": (nn.GELU("tanh"), nn.GELU),
    "mish": (nn.Mish(), nn.Mish),
    "hard-swish": (nn.Hardswish(), nn.Hardswish),
    "hard-swish by hand": (lambda y: y * functional.relu6(y + 3) / 6, nn.Hardswish),
    "relu6": (nn.ReLU6(), nn.ReLU6),
    "hardtanh": (nn.Hardtanh(), nn.Hardtanh),
    "sigmoid": (torch.sigmoid, nn.Sigmoid),
    "tanh": (nn.Tanh(), nn.Tanh),
    "elu": (nn.ELU(), nn.ELU),
    "selu": (nn.SELU(), nn.SELU),
    "softplus": (nn.Softplus(), nn.Softplus),
    "leaky relu": (nn.LeakyReLU(), nn.LeakyReLU),
    "softsign": (nn.Softsign(), nn.Softsign),
    "hard-sigmoid": (nn.Hardsigmoid(), nn.Hardsigmoid),
}


def around(inner):
    """A network with something between two convolutions."""
    if isinstance(inner, nn.Module):
        return nn.Sequential(nn.Conv2d(4, 4, 3), inner, nn.Conv2d(4, 2, 1))
    layers = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1)
    return Function(lambda x, a, b: b(inner(a(x))), *layers)


@pytest.mark.parametrize("name", ADVICE)
def test_advice_for_an_activation_makes_check_pass(name):
    written, module = ADVICE[name]
    report = espn.check(around(written), image())
    (found,) = report.findings
    assert f"{{torch.nn.{module.__name__}: polynomial}}" in found.cure
    assert f"torch.nn.{module.__name__}()" in found.cure
    model = around(written if isinstance(written, nn.Module) else module())
    model = espn.replace_activations(model, {module: POLYNOMIAL})
    assert espn.check(model, image()).ok


@pytest.mark.parametrize(
    "square", [lambda y: y**2, lambda y: y * y, torch.square], ids=["**", "*", "square"]
)
def test_advice_for_a_square_is_exact(square):
    (found,) = espn.check(around(square), image()).findings
    given = "espn.PolynomialActivation(espn.Polynomial((0, 0, 1), 0, (-5.0, 5.0)))"
    assert given in found.cure
    exact = eval(given, {"espn": espn})
    model = around(square)
    model.function = lambda x, a, b: b(exact(a(x)))
    torch.testing.assert_close(model(image()), around_like(model, square)(image()))
    assert espn.check(model, image()).ok


def around_like(model, inner):
    return Function(lambda x, a, b: b(inner(a(x))), *model.layers)


def test_advice_for_a_function_of_ones_own():
    def own(y):
        return y * torch.tanh(2 * y)

    (found,) = espn.check(around(own), image()).findings
    assert "espn.Polynomial.fit(f, degree=4)" in found.cure
    assert espn.check(around(fitted(own)), image()).ok


def test_other_advice_makes_check_pass():
    pools = nn.Sequential(nn.Conv2d(4, 4, 3), nn.MaxPool2d(2))
    (found,) = espn.check(pools, image()).findings
    assert found.cure == "replace_pooling(model)" and not found.blocking
    assert espn.check(espn.replace_pooling(pools), image()).masked is None
    for head in (nn.Softmax(1), nn.LogSoftmax(1)):
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3), head)
        (found,) = espn.check(model, image()).findings
        assert "drop the last" in found.cure
        assert espn.check(model[:-1], image()).ok
    taking = Function(lambda x, a: a(x)[:, 0], nn.Conv2d(4, 4, 3))
    assert "x[:, 2:3]" in refusal(taking, image())
    assert espn.check(Function(lambda x, a: a(x)[:, 2:3], *taking.layers), image()).ok


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


class _Returns(nn.Module):
    """A network whose result stands in a container."""

    def __init__(self, contain: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.contain = contain

    def forward(self, x: torch.Tensor) -> Any:
        return self.contain(self.head(x))


@pytest.mark.parametrize("contain", [lambda y: (y,), lambda y: {"logits": [y]}])
def test_one_tensor_in_a_container_is_compared_and_converted(contain):
    network, x = _Returns(contain).eval(), torch.randn(2, 4)
    found = espn.check(network, x)
    assert found.ok and found.masked is None
    logits, _ = espn.simulate(espn.convert(network, x), x)
    torch.testing.assert_close(logits, network.head(x).detach(), atol=1e-2, rtol=0)


def test_several_results_are_refused_by_name():
    with pytest.raises(ConversionError, match="one tensor"):
        espn.check(_Returns(lambda y: {"a": y, "b": y}).eval(), torch.randn(2, 4))


@pytest.mark.parametrize("script", [torch.jit.script, None])
def test_torchscript_modules_are_converted_and_left_alone(script):
    plain, x = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).eval(), torch.randn(2, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = script(plain) if script else torch.jit.trace(plain, x)
    before = {name: p.clone() for name, p in network.named_parameters()}
    assert espn.check(network, x).ok
    logits, _ = espn.simulate(espn.convert(network, x), x)
    torch.testing.assert_close(logits, plain(x).detach(), atol=1e-2, rtol=0)
    assert all(torch.equal(p, before[n]) for n, p in network.named_parameters())
