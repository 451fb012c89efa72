"""ONNX's Sum: what additions of two give, in both engines, to the bit."""

from __future__ import annotations

import crypten
import numpy as np
import onnx
import torch
from crypten.encoder import FixedPointEncoder
from onnx import TensorProto, helper
from torch import nn

import crypten_espn as espn
from crypten_espn.graph import export
from crypten_espn.launch import run_parties
from crypten_espn.masked.planning import masked_model
from crypten_espn.masked.planning.network import parameters_of
from crypten_espn.masked.reference import evaluate

from ..masked import oracle
from ..masked.networks import act, conv, images, ready


class Residual(nn.Module):
    """Three values meet before an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = conv(3, 3, 3), conv(3, 3), conv(3, 3)
        self.start, self.end = act(), act()
        self.last = conv(3, 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.start(self.stem(x))
        return self.last(self.end(self.first(x) + self.second(x) + x))


def both() -> tuple[nn.Module, bytes, torch.Tensor]:
    """A network that adds twice, and its file with one Sum instead."""
    torch.manual_seed(0)
    network, x = ready(Residual()), images(3)
    model = onnx.load_model_from_string(export(network, x))
    inner, outer = (node for node in model.graph.node if node.op_type == "Add")
    terms = [*inner.input, *(name for name in outer.input if name != inner.output[0])]
    outer.op_type = "Sum"
    outer.ClearField("input")
    outer.input.extend(terms)
    model.graph.node.remove(inner)
    return network, model.SerializeToString(), x


def summing(shapes: dict[str, list[int]], **attributes: int) -> bytes:
    """A file that sums its input and constants of these shapes."""
    constants = [
        helper.make_tensor(name, TensorProto.FLOAT, shape, np.ones(shape).ravel())
        for name, shape in shapes.items()
    ]
    node = helper.make_node("Sum", ["x", *shapes], ["y"], **attributes)
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 3, 8, 8])
        for name in "xy"
    ]
    graph = helper.make_graph([node], "sum", ends[:1], ends[1:], constants)
    opset = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opset).SerializeToString()


def test_the_masked_engine_computes_it_to_the_bit():
    network, data, x = both()
    report = espn.check(data, x)
    assert report.ok and report.masked is None and report.layers["Sum"] == 1
    private = espn.convert(data, x)
    model, added = masked_model(private), masked_model(espn.convert(network, x))
    kinds = [type(node).__name__ for node in model.plan.steps[1].root.walk()]
    assert kinds.count("Add") == 2
    logits, trace = evaluate(model.plan, model.weights, x[:1])
    image = model.plan.encode(x[:1]).transpose(0, 3, 1, 2)[0]
    expected = oracle.logits(model, parameters_of(private), image.tolist())
    assert {at: int(trace[-1][0][at]) for at in expected} == expected
    assert model.plan.digest == added.plan.digest
    assert torch.equal(logits, evaluate(added.plan, added.weights, x[:1])[0])


def test_both_crypten_shares_are_those_of_additions():
    network, data, x = both()
    summed = espn.convert(data, x, protocol="espn")
    added = espn.convert(network, x, protocol="espn")
    found, expected = espn.explain(summed, x), espn.explain(added, x)
    assert torch.equal(found.logits, expected.logits)
    assert (found.clear - network.double()(x.double())).abs().max() < 1e-9


def shared(x):
    """Sums of the input with itself, between two parties."""
    data = onnx.load_model_from_string(summing({}))
    found = []
    for count in (1, 3):
        data.graph.node[0].ClearField("input")
        data.graph.node[0].input.extend(["x"] * count)
        private = espn.convert(data.SerializeToString(), x).encrypt(src=0)
        found.append(private(crypten.cryptensor(x, src=1)).get_plain_text())
    return found


def test_two_parties_sum_without_rounding():
    x = images(2)
    encoder = FixedPointEncoder()
    whole = encoder.encode(x)
    for once, thrice in run_parties(shared, world_size=2, args=(x,)):
        assert torch.equal(once, encoder.decode(whole))
        assert torch.equal(thrice, encoder.decode(3 * whole))


def test_what_is_no_sum_of_values_is_refused():
    x = images(2)
    assert "constant" in str(espn.check(summing({"c": [1, 3, 8, 8]}), x).findings[0])
    found = espn.check(summing({}, axis=1), x)
    assert not found.ok and "says more" in str(found.findings[0])


def test_values_of_different_shapes_are_enlarged():
    class Broadcasting(Residual):
        def forward(self, x):
            return x + nn.functional.adaptive_avg_pool2d(x, 1)

    x = images(2)
    network = ready(Broadcasting())
    model = onnx.load_model_from_string(export(network, x))
    (node,) = (node for node in model.graph.node if node.op_type == "Add")
    node.op_type = "Sum"
    planned = masked_model(espn.convert(model.SerializeToString(), x))
    logits, _ = evaluate(planned.plan, planned.weights, x)
    assert (logits - network(x)).abs().max() < 8 * planned.report.logits_error
