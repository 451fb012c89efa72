"""Scales of channels that weights absorb: exact, and as alike as layers allow."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import crypten_espn as espn
from crypten_espn.compare import first_difference, probes, run
from crypten_espn.errors import PolynomialError
from crypten_espn.graph import POLYNOMIAL_OP, read
from crypten_espn.graph.passes import PASSES, simplify
from crypten_espn.polynomial import ChannelPolynomials, polynomial_from_json

COEFFS = (3, 512, 400, -60, -11)


def channels(radii, frac_bits=10):
    """One quartic on intervals of these radii, powers of two."""
    rows = []
    for radius in radii:
        exponent = round(np.log2(radius))
        p = espn.Polynomial(
            COEFFS, frac_bits, (-float(radius), float(radius)), exponent=exponent
        )
        rows.append(p)
    return espn.PolynomialActivation(ChannelPolynomials(tuple(rows)))


def spread(count, *, turned=0):
    return np.roll(2.0 ** np.linspace(-2, 2, count).round(), turned)


class Branches(nn.Module):
    """An identity skip, a concatenation, groups, pads, pools and a flattened head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.inner = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.beside = nn.Conv2d(6, 2, 1)
        self.pad, self.pool = nn.ZeroPad2d((1, 0, 0, 1)), nn.AvgPool2d(2)
        self.act0 = channels(spread(6))
        self.act1 = channels(spread(6, turned=1))
        self.act2 = channels(spread(6, turned=2))
        self.act3 = channels(spread(8))
        self.features = nn.Linear(8 * 9, 5)
        self.act4 = channels(spread(5))
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = self.act0(self.stem(x))
        x = self.act2(self.inner(self.act1(self.inner(x))) + x)
        x = self.pool(self.pad(torch.cat([x, self.beside(x)], 1)))
        return self.head(self.act4(self.features(self.act3(x).flatten(1))))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Branches().eval().requires_grad_(False)


X = torch.linspace(-1, 1, 2 * 3 * 5 * 5).reshape(2, 3, 5, 5)


def before_and_after(model, x):
    """The graph without the pass, and with it."""
    plain = read(model, x)
    for rewrite in PASSES[:-1]:
        rewrite(plain)
    scaled = read(model, x)
    simplify(scaled)
    return plain, scaled


def ratios(graph):
    """By activation, the largest radius over the smallest."""
    found = []
    for node in graph.nodes:
        if node.op == POLYNOMIAL_OP:
            polynomial = polynomial_from_json(node.attributes["polynomial"])
            assert isinstance(polynomial, ChannelPolynomials)
            radii = polynomial.radii
            found.append(float(radii.max() / radii.min()))
    return found


def test_a_network_with_absorbed_scales_computes_the_same_bits(network):
    plain, scaled = before_and_after(network, X)
    assert scaled.exponents and not plain.exponents
    for dtype in (torch.float32, torch.float64):
        first, second = (run(g, X, dtype) for g in (plain, scaled))
        assert torch.equal(first[plain.output], second[scaled.output])
        for name, exponents in scaled.exponents.items():
            if name in first:
                factor = torch.from_numpy(2.0**exponents).to(dtype)
                factor = factor.reshape(-1, *[1] * (first[name].dim() - 2))
                assert torch.equal(first[name], second[name] * factor)


def test_channels_become_alike_through_sums_and_concatenations(network):
    plain, scaled = before_and_after(network, X)
    assert all(ratio == 16 for ratio in ratios(plain))
    assert max(ratios(scaled)) <= 2


def test_conversion_says_that_scales_were_absorbed(network):
    _, scaled = before_and_after(network, X)
    assert scaled.changes[-1] == "scales of the channels of 5 activations absorbed"
    output = run(scaled, X, torch.float32)[scaled.output]
    assert torch.allclose(output, network(X), atol=1e-5, rtol=1e-5)


def test_one_polynomial_for_all_channels_leaves_weights_alone():
    model = nn.Sequential(
        nn.Linear(4, 6),
        espn.PolynomialActivation(espn.Polynomial(COEFFS, 10, (-5.0, 5.0))),
        nn.Linear(6, 2),
    ).eval()
    graph = before_and_after(model, torch.randn(2, 4))[1]
    assert not graph.exponents
    assert not any("absorbed" in change for change in graph.changes)


def test_a_polynomial_that_cannot_be_scaled_keeps_its_channels_scale():
    """At 40 fractional bits there is no finer unit; its neighbours are scaled."""
    radii = spread(5)
    rows = list(channels(radii).polynomial.rows)
    rows[0] = espn.Polynomial(COEFFS, 40, (-0.25, 0.25))
    model = nn.Sequential(
        nn.Linear(4, 5), espn.PolynomialActivation(ChannelPolynomials(tuple(rows)))
    ).eval()
    plain, scaled = before_and_after(model, torch.randn(3, 4))
    (exponents,) = scaled.exponents.values()
    assert exponents.tolist() == [0, -1, 0, 1, 2]
    x = torch.randn(3, 4)
    first, second = (run(g, x, torch.float64)[g.output] for g in (plain, scaled))
    assert torch.equal(first, second)


def test_a_layer_that_a_pass_broke_is_named_among_scaled_ones(network):
    raw = read(network, X)
    graph = raw.copy()
    simplify(graph)
    found = probes(network, raw, X)
    assert first_difference(graph, raw, found) is None
    broken = next(n for n in graph.nodes if "features" in n.name)
    graph.constants[broken.inputs[2]] = graph.constants[broken.inputs[2]] + 9
    difference = first_difference(graph, raw, found)
    assert difference is not None and difference[0] == "features"


@pytest.mark.parametrize("inner, outer", [(0, 0), (3, 3), (-2, 4), (5, -7), (-12, -12)])
def test_a_scaled_polynomial_is_exact(inner, outer):
    p = espn.Polynomial(COEFFS, 9, (-3.0, 2.5), exponent=2)
    scaled = p.scaled(inner, outer)
    for k in range(5):
        wanted = p.coefficient(k) * Fraction(2) ** (k * inner - outer)
        assert scaled.coefficient(k) == wanted
    assert scaled.interval == (-3.0 * 2.0**-inner, 2.5 * 2.0**-inner)
    assert scaled.scaled(-inner, -outer).coeffs == p.coeffs


def test_a_scale_beyond_a_polynomials_units_is_refused():
    with pytest.raises(PolynomialError, match="exponent"):
        espn.Polynomial(COEFFS, 9, (-1.0, 1.0)).scaled(50, 50)
