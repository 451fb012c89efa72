"""Advice that is followed makes check pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import crypten_espn as espn
from tests.conversion_cases import (
    POLYNOMIAL,
    Function,
    assert_right,
    image,
)


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
def test_a_square_is_a_polynomial(square):
    report = espn.check(around(square), image())
    assert report.ok and report.masked is None
    assert report.layers["PolynomialActivation"] == 1


@pytest.mark.parametrize(
    "written",
    [lambda y: y**3, lambda y: 0.3 * y * y + 0.5 * y - 1, lambda y: y * (y * y + 2)],
    ids=["cube", "by hand", "nested"],
)
def test_products_and_powers_are_polynomials(written):
    report = espn.check(around(written), image())
    assert report.ok and report.masked is None, report
    assert report.layers == {"Conv": 2, "PolynomialActivation": 1}


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


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.GroupNorm(2, 4), (2, 4, 8, 6)),
        (nn.InstanceNorm2d(4), (2, 4, 8, 6)),
        (nn.LayerNorm(6), (2, 4, 6)),
        (nn.RMSNorm(6), (2, 4, 6)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_norms_that_divide_by_a_private_deviation_are_refused_by_name(norm, shape):
    (found,) = espn.check(norm.eval(), torch.randn(shape)).findings
    assert found.operation == type(norm).__name__.strip("2d").replace(
        "Norm", "Normalization"
    )
    assert "torch.nn.BatchNorm" in found.cure and "docs/conversion.md" in found.cure


def test_a_norm_with_statistics_of_its_own_is_folded():
    norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    for tracked in (norm, nn.InstanceNorm2d(4, track_running_stats=True)):
        for statistic in (tracked.running_mean, tracked.running_var):
            assert statistic is not None
            statistic.uniform_(0.5, 2)
        assert_right(tracked.eval(), image())


def test_attention_is_refused_for_its_products_not_for_how_it_moves_a_batch():
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    model = Function(lambda x, a: a(x, x, x)[0], attention)
    found = espn.check(model, torch.randn(2, 6, 8)).findings
    assert [finding.operation for finding in found] == ["MatMul", "Softmax", "MatMul"]
