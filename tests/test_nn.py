"""The activation through CrypTen's own converter, its gradient, and its settings."""

from __future__ import annotations

import io

import crypten
import pytest
import torch

import crypten_espn as espn
from crypten_espn.cost import measure
from crypten_espn.errors import ConversionError, PolynomialError, ProtocolError
from crypten_espn.graph import export
from crypten_espn.launch import run_parties
from crypten_espn.nn import PolynomialActivation
from crypten_espn.polynomial import ChannelPolynomials, Polynomial

POLYNOMIAL = Polynomial.fit(torch.relu, degree=4)


OF_CHANNELS = ChannelPolynomials(
    (POLYNOMIAL, *[Polynomial((1, 2), 3, (-1.0, 2.0))] * 3)
)


def network(polynomial=POLYNOMIAL):
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1),
        espn.PolynomialActivation(polynomial),
        torch.nn.Flatten(),
        torch.nn.Linear(4 * 36, 5),
    ).eval()


def activation_of(graph):
    found = [m for m in graph.modules() if isinstance(m, PolynomialActivation)]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("polynomial", [POLYNOMIAL, OF_CHANNELS])
def test_plain_from_pytorch_keeps_the_polynomial_whole(polynomial):
    graph = crypten.nn.from_pytorch(network(polynomial), torch.zeros(1, 1, 6, 6))
    assert activation_of(graph).polynomial == polynomial
    assert activation_of(graph).protocol is None


def test_plain_from_onnx_keeps_the_polynomial_whole():
    file = io.BytesIO(export(network(), torch.zeros(1, 1, 6, 6)))
    assert activation_of(crypten.nn.from_onnx(file)).polynomial == POLYNOMIAL


def drop_in(x, expected):
    """What a CrypTen user types; nothing of ours but the activation."""
    graph = crypten.nn.from_pytorch(network(), torch.zeros(1, 1, 6, 6))
    graph.encrypt(src=0)
    shared = crypten.cryptensor(x, src=1)
    with measure() as measured:
        y = graph(shared)
    return (y.get_plain_text() - expected).abs().max().item(), measured.cost.rounds


@pytest.mark.parametrize("provider", ["TFP", "TTP"])
def test_drop_in_inference(provider):
    x = torch.randn(2, 1, 6, 6)
    expected = network()(x).detach()
    with crypten.cfg.temp_override({"mpc.provider": provider}):
        for error, rounds in run_parties(drop_in, world_size=2, args=(x, expected)):
            assert error < 0.01
            if provider == "TFP":
                assert rounds == 3


def gradient(x, polynomial):
    shared = crypten.cryptensor(x, src=1, requires_grad=True)
    with espn.settings(truncation="exact"):
        y = shared.polyval(polynomial)
        y.sum().backward()
    return y.get_plain_text(), shared.grad.get_plain_text()


def test_gradient_is_the_derivative():
    x = torch.linspace(-4, 4, 50)
    plain = x.clone().requires_grad_()
    POLYNOMIAL(plain).sum().backward()
    for y, grad in run_parties(gradient, world_size=2, args=(x, POLYNOMIAL)):
        torch.testing.assert_close(y, POLYNOMIAL(x), atol=2**-9, rtol=0)
        torch.testing.assert_close(grad, plain.grad, atol=2**-8, rtol=0)


def training_step(x):
    """One encrypted SGD step through the activation."""
    graph = crypten.nn.from_pytorch(network(), torch.zeros(1, 1, 6, 6))
    graph.encrypt(src=0).train()
    with espn.settings(protocol="opened_mask"):
        loss = graph(crypten.cryptensor(x, src=1)).square().sum()
        graph.zero_grad()
        loss.backward()
        before = loss.get_plain_text().item()
        graph.update_parameters(1e-3)
        after = graph(crypten.cryptensor(x, src=1)).square().sum().get_plain_text()
    return before, after.item()


def test_encrypted_training_goes_through_the_activation():
    for before, after in run_parties(
        training_step, world_size=2, args=(torch.randn(2, 1, 6, 6),)
    ):
        assert after < before


def test_plain_tensors_pass_through():
    x = torch.randn(3, 4)
    torch.testing.assert_close(PolynomialActivation(POLYNOMIAL)(x), POLYNOMIAL(x))


def rounds_of(module_settings):
    module = PolynomialActivation(POLYNOMIAL, **module_settings)
    module.encrypt()
    shared = crypten.cryptensor(torch.ones(4), src=1)
    with measure() as measured:
        module(shared)
    return measured.cost


@pytest.mark.parametrize(
    ("chosen", "rounds", "bytes_sent"),
    [
        ({}, 1, 24 * 4),
        ({"protocol": "opened_mask"}, 1, 8 * 4),
        ({"protocol": "beaver"}, 2, 32 * 4),
        ({"truncation": "exact"}, 2, 32 * 4),
    ],
)
def test_a_module_can_fix_its_protocol(chosen, rounds, bytes_sent):
    for cost in run_parties(rounds_of, world_size=2, args=(chosen,)):
        assert (cost.rounds, cost.bytes_sent) == (rounds, bytes_sent)


def test_bad_arguments_are_named():
    with pytest.raises(ProtocolError, match=r"'nope'.*espn"):
        PolynomialActivation(POLYNOMIAL, protocol="nope")
    with pytest.raises(ProtocolError, match=r"'nope'.*local, exact"):
        PolynomialActivation(POLYNOMIAL, truncation="nope")
    with pytest.raises(ConversionError, match="numerators"):
        PolynomialActivation.from_onnx({"frac_bits": 10})
    with pytest.raises(PolynomialError, match="interval"):
        PolynomialActivation.from_onnx(
            {"numerators": [1, 2], "frac_bits": 10, "interval": [5.0, -5.0]}
        )
