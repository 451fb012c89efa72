"""Products of two private values: exact in every engine's arithmetic, and refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import crypten_espn as espn
from crypten_espn.errors import PlanError
from crypten_espn.masked import kernels
from crypten_espn.masked.evaluation import OfProduct
from crypten_espn.masked.inference import message_sizes
from crypten_espn.masked.plan import Plan
from crypten_espn.masked.planning import masked_model
from crypten_espn.masked.planning.network import parameters_of
from crypten_espn.masked.reference import evaluate
from crypten_espn.masked.steps import Product

from . import oracle
from .cases import GATE, Pair, gated, packed, planned, without_noise
from .networks import Written, act, conv, images, ready, vectors


@pytest.fixture(scope="module")
def small():
    network, x = gated()
    private = espn.convert(network, x)
    return network, x, private, masked_model(private)


def test_a_product_is_what_python_integers_give(small):
    _, x, private, model = small
    assert sum(isinstance(s.activation, Product) for s in model.plan.steps) == 4
    _, trace = evaluate(model.plan, model.weights, x[:1])
    image = model.plan.encode(x[:1]).transpose(0, 3, 1, 2)[0]
    expected = oracle.logits(model, parameters_of(private), image.tolist())
    assert {at: int(trace[-1][0][at]) for at in expected} == expected


@pytest.mark.parametrize("precision", [24, "fast", 33, "high", 52])
def test_both_parties_give_the_reference_bit_for_bit(precision):
    network, x = gated(4, 5)
    model = planned(network, x, precision=precision)
    pair = Pair(without_noise(model))
    for index, batch in enumerate((x, torch.cat([x] * 4))):
        got, transcript = pair.infer(batch, index=index)
        coins = pair.roundings(index, len(batch))
        _, trace = evaluate(pair.plan, model.weights, batch, roundings=coins)
        assert np.array_equal(got, trace[-1])
        sizes = [(sender, size) for sender, _, size in transcript.messages]
        assert sizes == message_sizes(pair.plan, batch=len(batch))
        off = (pair.plan.decode(got) - network(batch)).abs().max()
        assert off < 8 * model.report.logits_error


def test_a_gate_has_one_mask_for_all_that_it_multiplies(small):
    plan = small[-1].plan
    numbers = [k for k, s in enumerate(plan.steps) if isinstance(s.activation, Product)]
    shapes = []
    for number in numbers:
        between, step = plan.evaluations[number], plan.steps[number]
        assert isinstance(between, OfProduct)
        shapes.append(between.factors)
        (n, k), (a, b) = between.sizes, step.opened_bits
        assert between.payload(2) == ((2 * n, a), (2 * k, b))
        assert between.words == 6 * n + 2 * k and plan.elements(number) == n + k
        sent = 2 * (packed(n, a) + packed(k, b)), packed(n, step.activation.sent_bits)
        assert sent[0] < 2 * 4 * (n + k) + 4
    image = (3, 4, 6)
    assert shapes == [
        (image, (1, 1, 6)),
        (image, (3, 4, 1)),
        (image, image),
        ((3,), (3,)),
    ]


def test_a_product_takes_the_messages_of_an_activation():
    torch.manual_seed(0)
    x = vectors(4)
    one = planned(
        ready(Written(lambda x, a, b: a(x) * b(x), nn.Linear(10, 4), nn.Linear(10, 4))),
        x,
    )
    two = planned(ready(nn.Sequential(nn.Linear(10, 4), act())), x)
    assert one.plan.messages == two.plan.messages == 4


def one_product(scale=1.0, gate=1.0):
    torch.manual_seed(1)
    x = scale * vectors(16)
    network = ready(
        Written(lambda x, a, b: a(x) * b(x), nn.Linear(10, 6), nn.Linear(10, 6))
    )
    for parameter in network.parts[1].parameters():
        parameter *= gate
    return network, x


@pytest.mark.parametrize("precision", [22, 32, 40, 56])
def test_a_truncated_product_errs_by_what_its_units_say(precision):
    network, x = one_product()
    model = planned(network, x, precision=precision)
    (step,) = model.plan.steps
    assert isinstance(step.activation, Product)
    pair = Pair(without_noise(model))
    got, _ = pair.infer(x)
    _, trace = evaluate(pair.plan, model.weights, x, roundings=pair.roundings(0, 16))
    z, real = trace[0], trace[1].reshape(16, 6)
    first, second = (z[:, k : k + 6] * 2.0**-step.frac_bits for k in (0, 6))
    units = [2.0 ** (n - step.frac_bits) for n in step.activation.dropped]
    allowed = units[0] * abs(second) + units[1] * abs(first) + units[0] * units[1]
    allowed += 1.01 * 2.0**-step.activation.frac_bits
    # The output is the product at another scale.
    value = real * 2.0**-model.plan.output.frac_bits
    assert (abs(value - first * second) <= allowed).all()
    assert np.array_equal(got, trace[-1])


def test_explain_measures_a_product_and_finds_one_that_wraps():
    network, x = gated()
    private = espn.convert(network, x, protocol="masked")
    found = espn.explain(private, x, runs=2)
    assert found.overflow is None
    torch.testing.assert_close(found.logits, network(x), atol=5e-3, rtol=1e-3)
    wild = espn.explain(private, 5 * x, runs=1)
    assert wild.overflow is not None


@pytest.mark.parametrize("exponent", [0, 6, 14])
def test_a_product_of_many_magnitudes_is_right(exponent):
    """The factors share a ring and a scale: a far smaller one keeps fewer bits."""
    network, x = one_product(gate=2.0**-exponent)
    model = planned(network, x)
    logits, _ = evaluate(model.plan, model.weights, x)
    off = (logits - network(x)).abs().max()
    assert off < 8 * model.report.logits_error
    assert off < 0.01 * network(x).abs().max()


def test_a_factor_too_small_for_the_ring_is_refused_by_its_layer():
    network, x = one_product(gate=2.0**-30)
    with pytest.raises(PlanError, match=r"its largest weight, .* precision=44"):
        planned(network, x, precision=32)


def test_values_too_large_for_the_ring_are_refused_by_name():
    network, x = one_product(scale=1e6)
    with pytest.raises(PlanError, match=r"values up to .* fractional bits"):
        planned(network, x, precision=24)


# ---------------------------------------------------------------- plans received


def spoiled(small, change):
    data = json.loads(small[-1].plan.to_json())
    number = next(
        k for k, s in enumerate(data["steps"]) if s["activation"]["type"] == "product"
    )
    change(data["steps"][number], data)
    return json.dumps(data)


SPOILED = {
    "a product of one value": (
        lambda s, _: s.update(root=s["root"]["first"]),
        "a product of one value",
    ),
    "a polynomial of two factors": (
        lambda s, d: s.update(activation=d["steps"][0]["activation"]),
        "a polynomial of two factors",
    ),
    "factors inside a root": (
        lambda s, _: s["root"].update(first=dict(s["root"])),
        "Invalid value 'factors'",
    ),
    "factors as output": (
        lambda s, d: d["output"].update(root=s["root"]),
        "Invalid value 'factors'",
    ),
    "a gate larger than its value": (
        lambda s, _: s.update(
            root={**s["root"], "first": s["root"]["second"],
                  "second": s["root"]["first"]}
        ),
        "with a factor of 3x4x6",
    ),
    "more bits dropped than there are": (
        lambda s, _: s["activation"].update(dropped=[30, 0]),
        "drops 30 of 32 bits",
    ),
    "factors that keep more than the product": (
        lambda s, _: s["activation"].update(dropped=[0, 0]),
        r"fractional bits of a product whose factors have",
    ),
    "one factor's bits": (
        lambda s, _: s["activation"].update(dropped=[3]),
        "length 2",
    ),
    "negative bits": (lambda s, _: s["activation"].update(dropped=[-1, 40]), ">= 0"),
    "more fractional bits than a word": (
        lambda s, _: s["activation"].update(frac_bits=31),
        "63 fractional bits",
    ),
    "no kind": (lambda s, _: s["activation"].pop("type"), "missing required field"),
    "another kind": (
        lambda s, _: s["activation"].update(type="quotient"),
        "Invalid value 'quotient'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILED)
def test_a_plan_whose_product_contradicts_itself_is_refused(small, name):
    change, words = SPOILED[name]
    with pytest.raises(PlanError, match=words):
        Plan.from_json(spoiled(small, change))


def test_the_words_of_a_product_are_bounded(small):
    def large(step, data):
        data["input"]["shape"] = [3, 4000, 4000]

    with pytest.raises(PlanError, match=r"words from the dealer|elements"):
        Plan.from_json(spoiled(small, large))


def test_kernels_refuse_arrays_that_do_not_belong_together():
    places = np.array([0, 1, 0])
    values, rounding = np.zeros((2, 22), np.int64), np.zeros((2, 3), np.int64)
    masks, pair = np.zeros((2, 5), np.int32), np.array([3, 4])
    given: dict[str, Any] = {"bits": 30, "dropped": pair, "places": places, "lift": 0}
    kernels.deal_product(masks, rounding, values, **given, out=values.copy())
    share: dict[str, Any] = {
        "widths": pair,
        "places": places,
        "lift": 0,
        "own": True,
        "step": 0,
    }
    halves = masks[:, :3].copy(), masks[:, 3:].copy()
    kernels.product_share(*halves, values, **share, out=rounding.copy())
    for wrong in (np.array([0, 2, 0]), np.array([0, -1, 0]), places[:2]):
        with pytest.raises(PlanError, match="do not belong together"):
            kernels.deal_product(
                masks, rounding, values, **(given | {"places": wrong}),
                out=values.copy(),
            )  # fmt: skip
        with pytest.raises(PlanError, match="do not belong together"):
            kernels.product_share(
                *halves, values, **(share | {"places": wrong}), out=rounding.copy()
            )
    others: dict[str, Any] = {"dropped": np.array([3, 30]), "lift": 64, "bits": 65}
    for name, other in others.items():
        with pytest.raises(PlanError, match="do not belong together"):
            kernels.deal_product(
                masks, rounding, values, **(given | {name: other}), out=values.copy()
            )
    with pytest.raises(PlanError, match="do not belong together"):
        kernels.product_share(*halves[::-1], values, **share, out=rounding.copy())


def test_products_of_every_broadcast_are_right():
    torch.manual_seed(3)
    x = images(4)

    def network(function, *parts):
        return ready(Written(function, *parts))

    a, b = conv(3, 6), conv(3, 6)
    cases = {
        "channels": network(lambda x, a, b: a(x) * b(x).mean((2, 3), True), a, b),
        "pixels": network(lambda x, a, b: b(x).mean(1, True) * a(x), a, b),
        "outer": network(
            lambda x, a, b: a(x).mean((2, 3), True) * b(x).mean(1, True), a, b
        ),
        "rows": network(lambda x, a, b: a(x) * b(x).mean(3, True), a, b),
        "features": network(
            lambda x, a, b: torch.mul(a(x).mean((2, 3)), b(x).mean((2, 3))), a, b
        ),
        "expanded": network(
            lambda x, a, b: a(x) * b(x).mean((2, 3), True).expand(-1, -1, 8, 8), a, b
        ),
        "of the input": network(lambda x, a: x[:, :1] * a(x), conv(3, 3)),
        "twice": network(lambda x, a, b: a(x) * b(x) * a(x), a, b),
        "sequence": network(
            lambda x, a, b: a(x).flatten(2) * b(x).mean((2, 3)).unsqueeze(2), a, b
        ),
        "gate of itself": network(lambda x, a, g: a(x) * g(a(x)), a, act(GATE)),
    }
    for name, net in cases.items():
        report = espn.check(net, x)
        assert report.ok and report.masked is None, (name, report)
        model = masked_model(espn.convert(net, x))
        logits, _ = evaluate(model.plan, model.weights, x)
        assert (logits - net(x)).abs().max() < 2e-3 * net(x).abs().max(), name


def test_a_product_over_the_batch_is_refused():
    x = images(3)
    net = ready(Written(lambda x, a: a(x) * a(x).mean(0, keepdim=True), conv(3, 4)))
    assert not espn.check(net, x).ok
    net = ready(Written(lambda x, a: a(x).mean((2, 3)) * a(x).mean((2, 3)).t()[:3, :3],
                        conv(3, 3)))  # fmt: skip
    assert not espn.check(net, x).ok
