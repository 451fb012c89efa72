"""The guard in a plan: its digest, its table, and what is encoded or simulated."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch

import crypten_espn as espn
from crypten_espn.errors import DataError, RangeError, ShapeError
from crypten_espn.masked.plan import Plan
from crypten_espn.masked.planning import masked_model
from crypten_espn.masked.reference import evaluate
from crypten_espn.masked.steps import Guard
from crypten_espn.pillar.data import FASHION_NORMALIZATION

from .cases import residual

X = residual()[1]
GUARD = espn.InputGuard.fit(X)
# Beyond the guard's bounds, and inside what the plan's ring holds.
WILD = 2 * X
BAD = [float("nan"), float("inf"), float("-inf")]


@pytest.fixture(scope="module")
def private():
    return espn.convert(residual()[0], X, guard=GUARD)


@pytest.fixture(scope="module")
def model(private):
    return masked_model(private)


def with_one(value):
    x = X.clone()
    x[1, 2, 3, 4] = value
    return x


def having(plan, guard):
    given = msgspec.structs.replace(plan.input, guard=guard)
    return msgspec.structs.replace(plan, input=given)


def test_a_plan_holds_the_guard_and_its_digest_covers_it(model):
    plan = model.plan
    again = Plan.from_json(plan.to_json())
    assert again == plan and again.guard == plan.guard == GUARD
    assert plan.input.guard == Guard.of(GUARD)
    wider = msgspec.structs.replace(plan.input.guard, energy=(4.0,) * 3)
    plans = [plan, having(plan, None), having(plan, wider)]
    assert len({each.digest for each in plans}) == 3


def test_a_plan_without_the_field_is_one_without_a_guard(model):
    none = having(model.plan, None)
    assert none.guard is None
    assert Plan.from_json(none.to_json().replace(',"guard":null', "")) == none


def test_what_the_guard_refuses_is_encoded_only_by_force(model):
    plan = model.plan
    with pytest.raises(RangeError, match=r"in channel 0, at most 4 is.*force=True"):
        plan.encode(WILD)
    off = plan.encode(WILD, force=True) - 2 * plan.encode(X)
    assert np.abs(off).max() <= 1


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("force", [False, True])
def test_nan_and_infinity_are_refused_forced_or_not(model, private, value, force):
    for check in (model.plan.encode, private.checked):
        with pytest.raises(RangeError, match="NaN or infinite"):
            check(with_one(value), force=force)


def test_force_does_not_take_what_the_ring_does_not_hold(model):
    with pytest.raises(RangeError, match="the plan allows 16"):
        model.plan.encode(8 * X, force=True)


def test_simulation_asks_the_guard_before_it_computes(private, model):
    for network in (private, model):
        with pytest.raises(RangeError, match="unlike those"):
            espn.simulate(network, WILD)
        logits, _ = espn.simulate(network, WILD, force=True)
        exact = residual()[0](WILD)
        assert float((logits - exact).abs().max()) < 0.02
    with pytest.raises(RangeError, match="unlike those"):
        espn.simulate(private, WILD, processes=True)


def test_what_sends_nothing_asks_no_guard(private, model):
    assert evaluate(model.plan, model.weights, WILD)[0].shape == (4, 5)
    assert espn.explain(private, WILD, runs=1).overflow is None


def test_networks_for_crypten_hold_their_owners_input_to_the_guard():
    private = espn.convert(residual()[0], X, protocol="espn", guard=GUARD)
    with pytest.raises(RangeError, match="unlike those"):
        espn.simulate(private, WILD)
    with pytest.raises(RangeError, match="unlike those"):
        private.checked(WILD)
    assert torch.equal(private.checked(X.numpy()), X)
    assert torch.equal(private.checked(WILD, force=True), WILD)
    with pytest.raises(ShapeError):
        private.checked(X[0])


def test_a_network_brings_its_guard_and_an_argument_replaces_it():
    network, x = residual()
    assert espn.convert(network, x).guard is None
    espn.attach_guard(network, GUARD)
    assert espn.convert(network, x).guard == GUARD
    other = espn.InputGuard.fit(4 * x)
    assert espn.convert(network, x, guard=other).guard == other


def test_a_guard_of_other_channels_or_of_another_kind_is_refused():
    network, x = residual()
    with pytest.raises(DataError, match="of 1 channels, the network takes"):
        espn.convert(network, x, guard=espn.InputGuard.fit(x[:, :1]))
    with pytest.raises(DataError, match="str"):
        espn.convert(network, x, guard=GUARD.to_json())  # type: ignore[arg-type]


def test_the_table_lists_the_bounds_as_public_or_says_how_to_get_some(private, model):
    assert "input guard, public: of x at most 4" in str(model)
    bare = masked_model(espn.convert(residual()[0], X))
    assert "input guard: none" in str(bare) and "calibrate" in str(bare)
    toss = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (8, 1, 6, 6), generator=toss, dtype=torch.uint8)
    images = FASHION_NORMALIZATION(pixels)
    guard = espn.InputGuard.fit(images, normalization=FASHION_NORMALIZATION)
    flat = torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 3),
        espn.PolynomialActivation(espn.Polynomial((0, 0, 1), 0, (-5.0, 5.0))),
    )
    text = str(masked_model(espn.convert(flat, images, guard=guard)))
    assert "of z = x * 0.353 + 0.286 at most 1, of its negative 0" in text
