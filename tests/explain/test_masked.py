"""`explain` of the masked engine: against the network in float64, without a ring."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import crypten_espn as espn
from crypten_espn.errors import PlanError
from crypten_espn.explain import explain

from ..masked.networks import OTHERS, RESCALING, conv, images, ready, vectors


@pytest.mark.parametrize("ring", ["fast", 48, 56])
def test_a_chain_of_linear_layers_does_not_contradict_itself(ring):
    torch.manual_seed(0)
    network, x = ready(RESCALING["linears"][0]()), vectors(4)
    found = explain(espn.convert(network, x), x, precision=ring)
    expected = network.double()(x.double())
    assert torch.allclose(found.clear, expected, atol=1e-12)
    # The last layer's line and the sentence below speak of the same numbers.
    last = found.layers[-1]
    assert last.max_error == pytest.approx(found.max_error, rel=0.05, abs=1e-7)
    assert found.max_error < 1e-3 and found.agreement == 1.0
    assert found.overflow is None and found.cure == "none needed"
    values = [network[0](x.double()), network[1](network[0](x.double())), expected]
    for layer, value in zip(found.layers, values, strict=True):
        assert layer.largest == pytest.approx(float(value.abs().max()), rel=1e-9)


def test_every_layer_is_compared_with_float64():
    torch.manual_seed(1)
    network, x = ready(OTHERS["quadratic"][0]()), images(3)
    found = explain(espn.convert(network, x), x)
    z = network[0](x)
    assert found.layers[0].largest == pytest.approx(float(z.abs().max()), rel=1e-5)
    assert 0 < found.layers[0].max_error < 1e-3
    errors = [layer.max_error / layer.largest for layer in found.layers]
    assert max(errors) < 1e-2


def test_what_the_planner_refuses_explain_refuses_by_the_same_name():
    network, x = nn.Sequential(conv(3, 3), nn.MaxPool2d(2)), images(2)
    with pytest.raises(PlanError, match="MaxPool2d is not supported by the masked"):
        explain(espn.convert(ready(network), x), x)
