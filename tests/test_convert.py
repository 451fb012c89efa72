"""Converted networks: rounds by CrypTen's counter, values, refusals."""

from __future__ import annotations

import crypten
import pytest
import torch
from torch import nn

import crypten_espn as espn
from crypten_espn.cost import measure
from crypten_espn.errors import (
    ConversionError,
    PlanError,
    ProtocolError,
    ShapeError,
    WorldSizeError,
)
from crypten_espn.graph import export
from crypten_espn.launch import run_parties
from crypten_espn.pillar import networks
from crypten_espn.polynomial import Polynomial

POLYNOMIAL = Polynomial.fit(torch.relu, degree=4)
# Linear layers and activations: what the one-round protocols take, before the reveal.
ROUNDS = {"mini_onn": 15, "vgg16": 31, "resnet18": 38, "resnet32": 65, "resnet110": 221}


def infer(network, x, protocol):
    network.encrypt(src=0)
    shared = crypten.cryptensor(x, src=1)
    with measure() as computing:
        y = network(shared)
    with measure() as revealing:
        logits = y.get_plain_text()
    return logits, computing.cost.rounds, revealing.cost.rounds


@pytest.mark.slow
@pytest.mark.parametrize("name", ROUNDS)
@pytest.mark.parametrize("protocol", ["espn", "opened_mask"])
def test_rounds_of_the_papers_networks(name, protocol):
    torch.manual_seed(0)
    model = getattr(networks, name)(size=8)  # its layers are those of every size
    model = espn.replace_activations(model, {nn.ReLU: POLYNOMIAL})
    model = espn.replace_pooling(model)
    x = torch.randn(1, 3, 8, 8)
    private = espn.convert(model, x, protocol=protocol)
    for logits, rounds, reveal in run_parties(
        infer, world_size=2, args=(private, x, protocol), timeout=250
    ):
        assert rounds == ROUNDS[name]
        assert reveal == 1
        assert logits.shape == (1, 10)


def small_residual():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
            self.norm = nn.BatchNorm2d(8)
            self.act1 = nn.ReLU()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)
            self.act2 = nn.ReLU()
            self.pool = nn.MaxPool2d(2)
            self.fc = nn.Linear(8 * 16, 5)

        def forward(self, x):
            x = self.act1(self.norm(self.stem(x)))
            x = self.act2(self.conv(x) + x)
            return self.fc(self.pool(x).flatten(1))

    torch.manual_seed(3)
    model = Residual()
    model(torch.randn(16, 3, 8, 8))
    return model.eval()


def private_form(model):
    model = espn.replace_activations(model, {nn.ReLU: POLYNOMIAL})
    model = espn.replace_pooling(model)
    return model


@pytest.mark.parametrize("protocol", ["espn", "opened_mask", "beaver"])
@pytest.mark.parametrize(("truncation", "bound"), [("local", 0.02), ("exact", 0.003)])
def test_values_of_every_protocol_and_both_doors(protocol, truncation, bound):
    model = private_form(small_residual())
    x = torch.randn(5, 3, 8, 8)
    expected = model(x).detach()
    for source in (model, export(model, x[:1])):
        private = espn.convert(source, x[:1], protocol=protocol, truncation=truncation)
        assert "1 batch-norms folded into the layer before" in private.changes
        for logits, _, _ in run_parties(
            infer, world_size=2, args=(private, x, protocol)
        ):
            assert (logits - expected).abs().max() < bound


def test_relu_network_runs_by_comparison():
    model = small_residual()
    x = torch.randn(2, 3, 8, 8)
    report = espn.check(model, x)
    assert report.ok and len(report.findings) == 3
    assert all("slowly" in str(finding) for finding in report.findings)
    private = espn.convert(model, x)
    (logits, rounds, _), _ = run_parties(infer, world_size=2, args=(private, x, None))
    assert (logits - model(x)).abs().max() < 0.01
    assert rounds > 20


class Unsupported(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.pool = nn.LPPool2d(2, 2)
        self.norm = nn.LocalResponseNorm(2)

    def forward(self, x):
        x = self.pool(torch.tanh(self.first(x)))
        return torch.erf(self.norm(x).flatten(1))


def test_every_problem_is_named_at_once():
    example = torch.randn(1, 3, 6, 6)
    report = espn.check(Unsupported(), example)
    assert not report.ok
    with pytest.raises(ConversionError) as refused:
        espn.convert(Unsupported(), example)
    message = str(refused.value)
    for layer in ("Tanh", "pool", "Erf"):
        assert layer in message and layer in str(report)
    assert "replace_activations" in message and "Polynomial.fit" in message
    assert "cannot be converted as it is" in str(report)


def test_bad_arguments_are_named_before_anything_runs():
    model = private_form(small_residual())
    example = torch.randn(1, 3, 8, 8)
    with pytest.raises(ProtocolError, match=r"'nope'.*beaver, masked"):
        espn.convert(model, example, protocol="nope")
    with pytest.raises(ProtocolError, match="'nope'"):
        espn.convert(model, example, truncation="nope")
    with pytest.raises(ConversionError, match=r"shape \(1, 1, 8, 8\)"):
        espn.convert(model, torch.randn(1, 1, 8, 8))


def refusals(network, shapes):
    network.encrypt(src=0)
    messages = []
    for shape in shapes:
        shared = crypten.cryptensor(torch.zeros(shape), src=0)
        with measure() as measured:
            try:
                network(shared)
            except (ShapeError, WorldSizeError) as error:
                messages.append(str(error))
        assert measured.cost.rounds == 0
    return messages


def test_wrong_shape_is_refused_before_anything_is_sent():
    network = espn.convert(private_form(small_residual()), torch.randn(1, 3, 8, 8))
    shapes = [(1, 3, 9, 8), (3, 8, 8), (1, 1, 8, 8), (2, 3, 8, 8, 1)]
    for messages in run_parties(refusals, world_size=2, args=(network, shapes)):
        assert len(messages) == len(shapes)
        assert all("(batch, 3, 8, 8)" in message for message in messages)


def test_wrong_world_size_is_refused_before_anything_is_sent():
    network = espn.convert(
        private_form(small_residual()), torch.randn(1, 3, 8, 8), protocol="espn"
    )
    for messages in run_parties(refusals, world_size=3, args=(network, [(1, 3, 8, 8)])):
        assert len(messages) == 1
        assert "3 parties" in messages[0] and "opened_mask" in messages[0]


def test_the_given_model_is_left_alone():
    model = private_form(small_residual())
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    espn.convert(model, torch.randn(1, 3, 8, 8))
    assert model.training
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key])


def test_masked_networks_take_no_plain_tensors():
    model = private_form(small_residual())
    private = espn.convert(model, torch.randn(4, 3, 8, 8), protocol="masked")
    with pytest.raises(ProtocolError, match=r"after \.encrypt\(src=0\).*simulate"):
        private(torch.randn(1, 3, 8, 8))
    with pytest.raises(ProtocolError, match=r"protocol='masked'"):
        espn.convert(model, torch.randn(4, 3, 8, 8)).prepare(1, batch=1)


def test_check_says_whether_the_masked_engine_runs_a_network():
    example = torch.randn(4, 3, 8, 8)
    report = espn.check(private_form(small_residual()), example)
    assert report.masked is None and "masked engine: runs it" in str(report)
    report = espn.check(small_residual(), example)
    assert report.ok and "relu" in str(report.masked).lower()
    with pytest.raises(PlanError, match=r"(?i)relu"):
        espn.convert(small_residual(), example, protocol="masked")
