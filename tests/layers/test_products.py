"""Products of two private values between CrypTen's parties: result, cost, refusals."""

from __future__ import annotations

import crypten
import pytest
import torch
from crypten.encoder import FixedPointEncoder
from torch import Tensor, nn

import crypten_espn as espn
from crypten_espn.cost import measure
from crypten_espn.launch import run_parties
from crypten_espn.protocols import PROTOCOLS
from crypten_espn.protocols.beaver import product_cost

from ..conversion_cases import assert_right, refusal
from ..masked.cases import gated
from ..masked.networks import Written, act, conv, images, ready

# Of an image of 3 channels, 8 rows and columns; the second factor's elements.
PRODUCTS = {
    "gate of channels": (lambda x: x[:, :, :1, :1] * x, 3),
    "gate of pixels": (lambda x: x * x[:, 1:2], 64),
    "every element": (lambda x: x * x.flip(2), 192),
    "rows and columns": (lambda x: x[:, :, :1] * x[..., :1], 24),
}


def between_parties(x: Tensor):
    """By product and protocol: the plain result, and rounds and bytes of one party."""
    found = {}
    for number, (name, (function, _)) in enumerate(PRODUCTS.items()):
        # A product is CrypTen's own, whatever activations are.
        for protocol in PROTOCOLS if number == 0 else ("espn",):
            private = espn.convert(ready(Written(function)), x, protocol=protocol)
            private.encrypt(src=0)
            shared = crypten.cryptensor(x, src=1)
            with measure() as measured:
                y = private(shared)
            cost = measured.cost
            found[name, protocol] = y.get_plain_text(), cost.rounds, cost.bytes_sent
    return found


def test_two_crypten_parties_multiply_at_the_declared_cost():
    x, encoder = images(2), FixedPointEncoder()
    whole = encoder.decode(encoder.encode(x))
    for found in run_parties(between_parties, world_size=2, args=(x,)):
        for (name, _), (got, rounds, sent) in found.items():
            function, second = PRODUCTS[name]
            # Each party drops bits of its share: off by less than one unit.
            assert (got - function(whole)).abs().max() < 2.0**-16, name
            declared = product_cost(2 * 192, 2 * second)
            assert (rounds, sent) == (declared.rounds, declared.bytes_sent), name


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_one_layer_whose_gate_is_not_enlarged(name):
    function, second = PRODUCTS[name]
    graph = assert_right(ready(Written(function)), images())
    (node,) = (node for node in graph.nodes if node.op == "Mul")
    first, gate = (graph.shapes[value][1:] for value in node.inputs)
    assert torch.Size(first).numel() == 192 and torch.Size(gate).numel() == second


def test_a_value_times_itself_is_a_polynomial_still():
    for function in (lambda x: x * x, lambda x: torch.mul(x, x) * x, lambda x: x**2):
        graph = assert_right(ready(Written(function)), 0.1 * images())
        assert "Mul" not in {node.op for node in graph.nodes}


def test_gates_as_networks_have_them():
    torch.manual_seed(2)
    fc = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), act())
    x = images()
    cases = {
        "squeeze and excite": lambda x, a, f: (
            a(x) * f(a(x).mean((2, 3))).view(-1, 4, 1, 1)
        ),
        "halves": lambda x, a, f: torch.mul(*a(x).chunk(2, 1)),
        "half, then norm": lambda x, a, f: (
            (a(x) * f(a(x).mean((2, 3)))[..., None, None]) / 2
        ),
        "added to itself": lambda x, a, f: a(x) + a(x) * x[:, :1],
        "pooled afterwards": lambda x, a, f: (a(x) * x[:, :1]).mean((2, 3)),
    }
    for name, function in cases.items():
        network = ready(Written(function, conv(3, 4), fc))
        graph = assert_right(network, x)
        assert [node.op for node in graph.nodes].count("Mul") == 1, name
        assert espn.check(network, x).masked is None, name
    network, x = gated()
    assert_right(network, x)


def test_what_mixes_the_inputs_of_a_batch_by_a_product_is_refused():
    x = images(3)
    found = refusal(Written(lambda x: x * x.flip(0)), x)
    assert "batch" in found
