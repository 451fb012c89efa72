"""A polynomial a channel in the masked engine, one for all being the special case."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

import crypten_espn as espn
from crypten_espn.errors import EspnError, PlanError
from crypten_espn.masked.inference import message_sizes
from crypten_espn.masked.plan import Plan
from crypten_espn.masked.planning import masked_model
from crypten_espn.masked.planning.network import parameters_of
from crypten_espn.masked.planning.precision import choose_truncations, measured_effect
from crypten_espn.masked.reference import evaluate
from crypten_espn.polynomial import ChannelPolynomials
from crypten_espn.protocols import settings

from . import oracle
from .cases import (
    QUARTIC,
    Pair,
    by_channel,
    channel_polynomials,
    planned,
    residual,
    without_noise,
)
from .networks import coins


def vector_network(polynomial, features):
    torch.manual_seed(4)
    network = torch.nn.Sequential(
        torch.nn.Linear(6, features),
        espn.PolynomialActivation(polynomial),
        torch.nn.Linear(features, 3),
    )
    return network.eval().requires_grad_(False), torch.randn(16, 6)


def rms(values):
    return float(values.double().square().mean().sqrt())


@pytest.mark.parametrize(
    "degree, precision, batch", [(2, 26, 3), (4, "fast", 9), (5, "high", 2), (8, 44, 1)]
)
def test_two_parties_give_the_references_integers(degree, precision, batch):
    network, example = by_channel(degree)
    pair = Pair(without_noise(planned(network, example, precision=precision)))
    x = (
        example[:1].expand(batch, -1, -1, -1)
        * torch.linspace(0.5, 1, batch)[:, None, None, None]
    )
    z, transcript = pair.infer(x, index=degree)
    model, plan = pair.model, pair.plan
    roundings = pair.roundings(degree, batch)
    _, trace = evaluate(plan, model.weights, x, roundings=roundings)
    assert np.array_equal(z, trace[-1])
    sent = sorted((sender, size) for sender, _, size in transcript.messages)
    assert sent == sorted(message_sizes(plan, batch=batch))
    assert {len(s.activation.groups[0].coeffs) for s in plan.steps} == {8, 16}


def test_the_reference_is_what_python_integers_give():
    network, example = by_channel()
    example = example[:, :, :4, :5]
    private = espn.convert(network, example[:1])
    model = planned(network, example)
    _, trace = evaluate(model.plan, model.weights, example[:2])
    integers = model.plan.encode(example[:2]).transpose(0, 3, 1, 2)
    for image, found in zip(integers, trace[-1], strict=True):
        expected = oracle.logits(model, parameters_of(private), image.tolist())
        assert found.tolist() == [expected[i,] for i in range(5)]


@pytest.mark.parametrize("exponent", [-3, 0, 2])
@pytest.mark.parametrize("value_frac_bits", [37, 44])
def test_integers_of_coefficients_are_rounded_half_up(exponent, value_frac_bits):
    radius = 5 * 2.0**exponent
    p = espn.Polynomial(QUARTIC.numerators, 10, (-radius, radius), exponent=exponent)
    z = torch.linspace(-radius, radius, 64, dtype=torch.float64).reshape(8, 1, 8)
    effect = measured_effect(
        z, [torch.ones_like(z)], degree=p.degree, radii=np.array([radius])
    )
    found = choose_truncations(
        [p],
        ring=64 + 14 - value_frac_bits,
        frac_bits=20,
        result_bits=14,
        effect=effect,
    )
    assert found is not None and found.linear is not None
    terms = {(0, 0): found.constant[0]}
    terms[found.linear.shift, 1] = found.linear.coefficient[0]
    for group in found.groups:
        terms |= {(group.shift, k): c for k, c in enumerate(group.coeffs[0]) if c}
    assert [k for _, k in terms] == [0, 1, 2, 4]
    for (shift, k), integer in terms.items():
        exact = p.coefficient(k) * Fraction(2) ** (value_frac_bits - k * (20 - shift))
        assert integer == math.floor(exact + Fraction(1, 2))


@pytest.mark.parametrize("degree", [2, 4, 6, 8, 10])
@pytest.mark.parametrize("precision", ["fast", "high"])
def test_errors_are_as_stated_and_small_at_every_degree(degree, precision):
    network, example = by_channel(degree)
    x = torch.cat([example, example.flip(2), example.flip(3)])
    model = planned(network, x, precision=precision, headroom=1.5)
    logits, _ = evaluate(model.plan, model.weights, x, roundings=coins(model.plan, 1))
    expected = network.double()(x.double())
    error = rms(logits - expected)
    assert error <= 2 * model.report.logits_error
    allowed = {2: 2e-4, 4: 5e-4, 6: 5e-3, 8: 2e-2, 10: 8e-2}
    assert error < allowed[degree] * rms(expected)


@pytest.mark.parametrize("precision", ["fast", "high"])
def test_a_degree_that_leaves_nothing_of_the_logits_is_refused(precision):
    """Nothing before the activation takes its channels' scales."""
    torch.manual_seed(5)
    radii = 2.0 ** torch.linspace(-4, 4, 8)
    x = radii * torch.rand(16, 8) * torch.randn(16, 8).sign()
    rows = channel_polynomials([*radii, 1.0], degree=10).rows[:8]
    head = torch.nn.Linear(8, 4, bias=False).requires_grad_(False)
    head.weight /= radii
    activation = espn.PolynomialActivation(ChannelPolynomials(rows))
    network = torch.nn.Sequential(activation, head)
    with pytest.raises(PlanError, match="degree"):
        planned(network, x, precision=precision)


def test_high_powers_share_truncations_and_cost_the_dealer_less():
    """Errors of one truncated x cancel where coefficients of high powers do."""
    quartic, tenth = (planned(*by_channel(degree)).plan for degree in (4, 10))
    groups = [len(s.activation.groups) for s in tenth.steps]
    assert [len(s.activation.groups) for s in quartic.steps] == [2, 2, 2]
    assert max(groups) <= 3 and min(groups) == 1
    assert tenth.dealer_bytes() < 3 * quartic.dealer_bytes()


def test_at_degree_two_a_linear_term_costs_nothing_in_any_engine():
    """So there is nothing to gain from completing the square."""
    whole = ChannelPolynomials(
        tuple(espn.Polynomial((3, 5, 9 + c), 4, (-4, 4)) for c in range(8))
    )
    square = ChannelPolynomials(
        tuple(espn.Polynomial((0, 0, 9 + c), 4, (-4, 4)) for c in range(8))
    )
    plans = [planned(*vector_network(p, 8)).plan for p in (whole, square)]
    assert [s.activation.linear is None for p in plans for s in p.steps] == [
        False,
        True,
    ]
    for plan in plans:
        (group,) = plan.steps[0].activation.groups
        ring = plan.steps[0].ring
        # The constant and a power, what both change by in the other case, and the
        # server's half of the opening.
        width = ring - group.shift
        twos = group.twos[1]
        assert twos >= 1  # of the square's term 2 a t
        bits = (ring + 16) + (64 - twos) + (64 - width) + (64 - width - twos)
        assert plan.dealer_bytes() == bits + ring + 3 * ring // 8
        assert plan.steps[0].opened_bits == (ring - group.shift,)
        assert plan.steps[0].activation.sent_bits == ring + 16
    for protocol in ("espn", "opened_mask", "beaver"):
        with settings(protocol=protocol, truncation="local") as chosen:
            costs = [chosen.cost(p, 100) for p in (whole, square)]
        assert costs[0] == costs[1]
        assert (costs[0].rounds, costs[0].bytes_sent) == (1, 800)


def test_a_plan_of_channels_survives_its_text():
    model = planned(*by_channel(8))
    again = Plan.from_json(model.plan.to_json())
    assert again == model.plan and again.digest == model.plan.digest
    shared = planned(*residual())
    assert len(shared.plan.to_json()) < 3000


def test_channels_that_are_alike_give_the_plan_of_one_polynomial():
    alike = (ChannelPolynomials((QUARTIC,) * c) for c in (8, 16, 16))
    one, other = planned(*residual()), planned(*residual(*alike))
    assert one.plan == other.plan and one.report.coins_error == other.report.coins_error
    assert one.plan.dealer_memory() == other.plan.dealer_memory()


def test_channels_cost_the_parties_nothing_more():
    """Bytes follow from the shifts alone; the dealer's tables count once."""
    one, other = planned(*residual()).plan, planned(*by_channel()).plan
    words = [[e.words for e in plan.evaluations] for plan in (one, other)]
    assert words[0] == words[1]
    assert other.dealer_bytes() == pytest.approx(one.dealer_bytes(), rel=0.05)
    assert other.messages == one.messages
    assert 0 < other.dealer_memory() - one.dealer_memory() < 1 << 16


def test_a_narrow_channel_is_not_judged_by_a_wide_one():
    """What reaches 20 in one channel does not reach the polynomial of another."""
    quartic = espn.Polynomial.fit(torch.relu, degree=4, interval=(-1, 1), frac_bits=16)
    rows = [
        espn.Polynomial(quartic.numerators, 16, (-(2.0**e), 2.0**e), exponent=e)
        for e in (-4, 4)
    ]
    polynomial = ChannelPolynomials(tuple(rows * 4))
    network, x = vector_network(polynomial, 8)
    with torch.no_grad():
        network[0].weight[::2] *= 2.0**-6
        network[0].bias[::2] *= 2.0**-6
        network[0].weight[1::2] *= 4
        network[2].weight[:, ::2] *= 2.0**6
    model = planned(network, x)
    logits, _ = evaluate(model.plan, model.weights, x, roundings=coins(model.plan, 1))
    assert rms(logits - network(x)) <= 1.5 * model.report.logits_error
    assert model.report.logits_error < 0.1 * rms(network(x))


def test_channels_that_do_not_fit_the_layer_are_refused_by_name():
    network, x = vector_network(channel_polynomials([1.0] * 7), 8)
    with pytest.raises(EspnError, match=r"7.*channels"):
        masked_model(espn.convert(network, x[:1]), x)


def test_a_coefficient_too_small_for_the_ring_is_scaled_until_it_is_not():
    tiny = espn.Polynomial((0, 0, 1), 40, (-(2.0**30), 2.0**30))
    network, x = vector_network(ChannelPolynomials((QUARTIC, tiny)), 2)
    with torch.no_grad():
        network[0].weight[1] *= 2.0**28
        network[0].bias[1] *= 2.0**28
        network[2].weight[:, 1] *= 2.0**-16
    model = planned(network, x, precision=56)
    logits, _ = evaluate(model.plan, model.weights, x, roundings=coins(model.plan, 1))
    assert rms(logits - network(x)) <= 1.5 * model.report.logits_error
    assert model.report.logits_error < 0.001 * rms(network(x))
