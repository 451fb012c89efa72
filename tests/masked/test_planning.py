"""The planner: what it takes is right, what it cannot is named before anything runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from crypten.nn import module as crypten_nn
from torch import nn

import crypten_espn as espn
from crypten_espn.errors import ConversionError, PlanError
from crypten_espn.layers import Kind, Reals
from crypten_espn.layers.arithmetic import Windows
from crypten_espn.layers.compared import Relu
from crypten_espn.layers.moves import Concat
from crypten_espn.layers.pools import AveragePool
from crypten_espn.masked.inference import online_bytes
from crypten_espn.masked.planning import make_plan, masked_model
from crypten_espn.masked.planning.calibration import Calibration
from crypten_espn.masked.planning.checking import check_plan
from crypten_espn.masked.planning.network import Network
from crypten_espn.masked.planning.precision import Effect, choose_truncations
from crypten_espn.masked.planning.yardstick import espn_error
from crypten_espn.masked.reference import evaluate
from crypten_espn.pillar.data import fashion_sample
from crypten_espn.pillar.storage import load_network

from .cases import QUARTIC, Pair, planned
from .networks import (
    OTHERS,
    QUADRATIC,
    QUINTIC,
    RESCALING,
    Written,
    act,
    coins,
    conv,
    images,
    ready,
    vectors,
)

DATA = Path(espn.__file__).parent / "data"
functional = nn.functional


def exact(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The network's outputs in float64."""
    result = network.double()(x.double())
    network.float()
    return result


def rms(values: torch.Tensor) -> float:
    return float(values.double().square().mean().sqrt())


# ---------------------------------------------------------------- shapes


def _refused():
    torch.manual_seed(0)
    cat, pad = torch.cat, functional.pad
    return {
        "a broadcasting addition": (
            Written(
                lambda x, c: x + c(functional.adaptive_avg_pool2d(x, 1)), conv(3, 3)
            ),
            images(),
            r"addition of values of shapes \(3, 8, 8\) and \(3, 1, 1\)",
        ),
        "a linear layer on rows of images": (
            nn.Linear(8, 5), images(), "linear layer on values of 4 dimensions",
        ),
        "a linear layer on sequences": (
            nn.Linear(8, 5), torch.randn(4, 3, 8), "values of 3 dimensions",
        ),
        "a linear layer on rows, flattened": (
            nn.Sequential(nn.Linear(8, 5), nn.Flatten()),
            images(), "flatten them first",
        ),
        "a constant in a concatenation": (
            Written(
                lambda x, c: cat([c(x), torch.ones_like(c(x)[:, :1])], 1), conv(3, 3)
            ),
            images(), "constant of shape",
        ),
        "pads of channels": (
            Written(lambda x: pad(functional.avg_pool2d(x, 1, 2), (0, 0, 0, 0, 2, 2))),
            images(), r"\(0, 0, 0, 0, 2, 2\) beyond height and width",
        ),
        "pads of a vector": (
            Written(lambda x, f: pad(f(x), (1, 2)), nn.Linear(10, 4)),
            vectors(), "values of 2 dimensions",
        ),
        "negative pads": (
            Written(lambda x, c: pad(c(x), (-1, -1, -2, 0)), conv(3, 3)),
            images(), "negative pads",
        ),
        "rows in a concatenation": (
            Written(lambda x, c: cat([c(x), x], 2), conv(3, 3)),
            images(), "concatenation along axis 2",
        ),
        "a pool of sequences": (
            nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten()),
            torch.randn(4, 3, 8), "values of 3 dimensions",
        ),
        "inputs of two dimensions beside the batch": (
            nn.Sequential(act()), torch.randn(4, 3, 8), "1 or 3 dimensions",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", _refused())
def test_what_the_engine_does_not_compute_is_named_before_anything_runs(name):
    network, x, words = _refused()[name]
    report = espn.check(ready(network), x)
    if not report.ok:
        with pytest.raises(ConversionError):
            espn.convert(network, x)
    elif report.masked is None:  # the reader may bring it into a form that is computed
        model = planned(network, x)
        logits, _ = evaluate(model.plan, model.weights, x)
        assert rms(logits - exact(network, x)) <= 1.5 * model.report.logits_error
    else:
        with pytest.raises(PlanError, match=words):
            masked_model(espn.convert(network, x), x)


def _computed():
    torch.manual_seed(1)
    cat, pool = torch.cat, functional.avg_pool2d
    return {
        "channels counted from the end": (
            Written(lambda x, c: cat([c(x), x], -3), conv(3, 2)), images(),
        ),
        "features counted from the end": (
            Written(lambda x, f: cat([f(x), x], -1), nn.Linear(10, 4)), vectors(),
        ),
        "borders that count fewer": (
            nn.Sequential(conv(3, 4), nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
            images(),
        ),
        "windows that leave the image": (
            nn.Sequential(conv(3, 4), nn.AvgPool2d(3, 2, ceil_mode=True)), images(),
        ),
        "an adaptive pool that divides": (
            nn.Sequential(nn.AdaptiveAvgPool2d((2, 4)), conv(3, 2)), images(),
        ),
        "an output that is the input": (nn.Identity(), images()),
        "a flattened input": (nn.Flatten(), images()),
        "an activation at the end": (nn.Sequential(conv(3, 3), act()), images()),
        "an activation alone": (act(), vectors()),
        "no weights": (
            nn.Sequential(nn.AvgPool2d(2), act(), nn.Flatten()), images(),
        ),
        "a value added to itself": (Written(lambda x: x + x), images()),
        "a mean of three by three beside an image": (
            Written(lambda x, c, p: c(pool(p(x), 3, 1, 1) + x), conv(3, 3), act()),
            images(),
        ),
        "the same mean at the end": (
            Written(lambda x, p: pool(p(x), 3, 1, 1) + x, act()), images(),
        ),
        "windows of three and five together": (
            Written(
                lambda x, c: c(cat([pool(x, 3, 1, 1), pool(x, 5, 1, 2), x], 1)),
                conv(9, 3),
            ),
            images(),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", _computed())
def test_what_it_computes_is_the_network_s(name):
    network, x = _computed()[name]
    model = planned(ready(network), x)
    logits, _ = evaluate(model.plan, model.weights, x)
    expected = exact(network, x)
    assert logits.shape == expected.shape
    assert rms(logits - expected) <= 1.5 * model.report.logits_error


def test_pools_that_count_less_at_the_border_run_between_the_parties():
    torch.manual_seed(2)
    network, x = ready(OTHERS["border pools"][0]()), images(3)
    pair = Pair(planned(network, x))
    logits, _ = pair.infer(x)
    found = pair.plan.decode(logits)
    assert rms(found - exact(network, x)) < 3 * pair.model.report.logits_error
    tags = {node.__class__.__name__ for p in pair.plan.parts for node in p.root.walk()}
    assert {"Mix", "Conv"} <= tags


# ---------------------------------------------------------------- layers


def test_only_a_converted_network_is_planned():
    graph = crypten_nn.Graph(["input"], ["y"])
    graph.add_module("y", crypten_nn.Flatten(), ["input"])
    with pytest.raises(PlanError, match=r"a Graph was given.*convert\(\) returned"):
        make_plan(graph, images())


def test_nothing_but_a_plan_error_leaves_the_planner():
    """What nobody foresaw is named by its layer."""
    x = images()
    private = espn.convert(ready(nn.Sequential(conv(3, 4), nn.AvgPool2d(2))), x)
    (name,) = (n for n, kind in private.layers.items() if kind.op == "AveragePool")

    def planned_with(kind):
        private.layers[name] = kind
        make_plan(private, x)

    with pytest.raises(PlanError, match=r"^output: cannot be planned"):
        planned_with(AveragePool((99, 2), (1, 1)))
    with pytest.raises(PlanError, match=r"^output: a concatenation along axis 2"):
        planned_with(Concat(2))
    with pytest.raises(PlanError, match=r"^output: AvgPool2d is not supported"):
        planned_with(Relu())
    private._graph[name] = ["missing"]
    with pytest.raises(PlanError, match=r"^output: its input is missing"):
        make_plan(private, x)


@dataclass(frozen=True)
class Composed(Kind):
    """A layer written in any way."""

    function: Any
    op: ClassVar[str] = "Composed"

    def apply(self, a, inputs):
        return self.function(a, *inputs)

    def module(self):
        return crypten_nn.Flatten()


def test_a_composed_layer_is_planned_or_refused_whole():
    """No divisor, weight or operation of a layer is left out of its plan."""
    torch.manual_seed(10)
    x = images()
    private = espn.convert(ready(nn.Sequential(act(), conv(3, 4))), x)
    first, second = private.layers
    unchanged = dict(private.layers)

    def plan(name, function):
        private.layers = {**unchanged, name: Composed(function)}
        return masked_model(private, x)

    def halves(a, x):
        sums = a.pad(a.window_sums(x, (2, 2), (2, 2)), (2, 2, 2, 2))
        return a.divided(a.add(x, sums), 2)

    model = plan(first, halves)
    logits, _ = evaluate(model.plan, model.weights, x)
    weight, bias = (private._modules[n].data for n in private._graph[second][1:])
    expected = functional.conv2d(halves(Reals(), x.double()), weight.double())
    expected += bias.double().view(1, -1, 1, 1)
    assert rms(logits - expected) <= 1.5 * model.report.logits_error

    def window(x):
        return functional.avg_pool2d(x, 2, 2)

    one = Windows((1, 1), (0, 0), (1, 1), 1)
    refused = {
        "a function that has no operation": (first, lambda a, x: a.local(window, x)),
        "a comparison": (first, lambda a, x: a.compared(window, x)),
        "a factor": (first, lambda a, x: a.scaled(x, 0.5)),
        "units that differ": (first, lambda a, x: a.add(a.divided(x, 2), x)),
        "a polynomial of a mean": (
            first, lambda a, x: a.polynomial(QUARTIC, a.divided(x, 2)),
        ),
        "a mean of a product": (
            second, lambda a, x, w, b: a.divided(a.convolution(x, w, b, one), 4),
        ),
        "a product of a mean": (
            second, lambda a, x, w, b: a.convolution(a.divided(x, 4), w, b, one),
        ),
        "two products": (
            second,
            lambda a, x, w, b: a.add(
                a.convolution(x, w, b, one), a.convolution(x, w, b, one)
            ),
        ),
        "a parameter as a value": (second, lambda a, x, w, b: w),
        "no weight": (second, lambda a, x, w, b: x),
    }  # fmt: skip
    for words, (name, function) in refused.items():
        with pytest.raises(PlanError, match=r"^(0|output): \w+ is not supported"):
            plan(name, function)
            pytest.fail(words)


# ---------------------------------------------------------------- coefficients


@pytest.mark.parametrize(
    "name, ring",
    [("linears", ring) for ring in range(20, 57)]
    + [(name, ring) for name in RESCALING for ring in (21, 32, 45, 48, 56)],
)
def test_rescalings_are_right_in_every_ring(name, ring):
    """Root mean square error at most 1.5 of what the plan states, and that is small."""
    torch.manual_seed(3)
    make, inputs = RESCALING[name]
    network, x = ready(make()), inputs()
    model = planned(network, x, precision=ring)
    roundings = coins(model.plan, ring)
    logits, _ = evaluate(model.plan, model.weights, x, roundings=roundings)
    assert rms(logits - exact(network, x)) <= 1.5 * model.report.logits_error
    assert model.report.logits_error < max(2.0 ** (4.5 - ring / 2), 2e-5)


def test_a_coefficient_never_rounds_to_nothing():
    flat = Effect(
        np.zeros((1, 9)), np.zeros((1, 1, 5)), np.zeros((1, 9))
    )  # calibration saw nothing of it

    def chosen(polynomial, g, f, ring):
        return choose_truncations(
            (polynomial,),
            ring=ring,
            frac_bits=g,
            result_bits=f,
            effect=flat,
        )

    identity = espn.Polynomial((0, 1), 0, (-1.0, 1.0))
    for ring in range(20, 57):
        found = chosen(identity, ring - 3, 12, ring)
        assert found is not None and found.linear is not None
        assert found.linear.shift <= ring - 3
        bits = ring - 3 - found.linear.shift
        assert found.linear.coefficient[0] == 2 ** (12 + 64 - ring - bits)
    for ring in range(20, 57):
        found = chosen(QUARTIC, ring - 5, 12, ring)
        if found is None:
            continue
        kept = {k: c for g in found.groups for k, c in enumerate(g.coeffs[0]) if c}
        assert set(kept) == {2, 4} and found.linear is not None
        assert found.linear.coefficient[0]
        assert found.linear.shift <= found.groups[0].shift
    # A coefficient that counts and has no bits left at any truncation.
    tiny = espn.Polynomial((0, 0, 1), 40, (-(2.0**19), 2.0**19))
    assert chosen(tiny, 30, 12, 52) is None
    # One that moves nothing may go.
    faint = espn.Polynomial((0, 1 << 20, 0, 0, 1), 40, (-1.0, 1.0))
    assert chosen(faint, 30, 12, 52) is not None


def test_a_polynomial_whose_coefficient_has_no_bits_left_is_refused_by_name():
    tiny = espn.Polynomial((0, 0, 1), 40, (-(2.0**30), 2.0**30))
    network = ready(nn.Sequential(nn.Linear(10, 4), act(tiny), nn.Linear(4, 2)))
    private = espn.convert(network, vectors())
    with pytest.raises(PlanError, match=r"^1: a coefficient of its polynomial rounds"):
        make_plan(private, vectors(), precision=56)


def test_small_weights_keep_their_bits_or_are_refused():
    torch.manual_seed(4)
    network = ready(nn.Sequential(nn.Linear(10, 8), act(), nn.Linear(8, 3)))
    x = vectors()
    with torch.no_grad():
        network[2].weight.mul_(1e-4)
        network[2].bias.mul_(1e-4)
    model = planned(network, x)
    assert all(np.abs(w).max() >= 8 for w in model.weights.integers)
    logits, _ = evaluate(model.plan, model.weights, x)
    assert rms(logits - exact(network, x)) <= 1.5 * model.report.logits_error
    with torch.no_grad():
        network[2].weight.mul_(1e-9)
    with pytest.raises(PlanError, match=r"its largest weight, .* would have"):
        planned(network, x, precision=32)
    with torch.no_grad():
        network[2].weight.zero_()
    model = planned(network, x)
    logits, _ = evaluate(model.plan, model.weights, x)
    assert (logits - network[2].bias).abs().max() < 1e-6


def test_a_bias_that_leaves_sixty_two_bits_is_refused():
    parts = nn.Linear(10, 3), nn.Linear(10, 3)
    network = ready(Written(lambda x, a, b: a(x) + b(x), *parts))
    with torch.no_grad():
        parts[0].bias.fill_(2.0**45)
        parts[1].bias.fill_(-(2.0**45))
    with pytest.raises(PlanError, match=r"a bias of 3.518e\+13"):
        planned(network, vectors())
    with torch.no_grad():
        parts[0].bias.fill_(2.0**20)
        parts[1].bias.fill_(-(2.0**20))
    x = vectors()
    model = planned(network, x)
    logits, _ = evaluate(model.plan, model.weights, x)
    assert rms(logits - exact(network, x)) <= 1.5 * model.report.logits_error


@pytest.mark.parametrize("scale, wider", [(1e5, 36), (1e9, 48)])
def test_a_layer_too_wide_for_the_ring_takes_a_wider_one_and_says_so(scale, wider):
    torch.manual_seed(5)
    network = ready(
        nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 4), act(), nn.Linear(4, 2))
    )
    with torch.no_grad():
        network[0].weight.mul_(scale)
        network[1].weight.mul_(1 / scale)
    x = vectors()
    private = espn.convert(network, x)
    with pytest.raises(PlanError, match=r"^0 \(rescaled\): .* ring of 32.*") as error:
        make_plan(private, x, precision=32)
    assert str(error.value).endswith(f" precision={wider} plans it.")
    model = masked_model(private, x)
    assert model.plan.output.ring == wider
    assert f"a ring of {wider} bits: 0 (rescaled): " in str(model)
    logits, _ = evaluate(model.plan, model.weights, x)
    assert rms(logits - exact(network, x)) <= 1.5 * model.report.logits_error


def test_a_network_that_roundings_would_drown_takes_a_wider_ring_and_says_so():
    torch.manual_seed(5)
    square = espn.Polynomial((0, 512, 90), 10, (-5.0, 5.0))
    first, last = (nn.Linear(*size, bias=False) for size in ((10, 8), (8, 4)))
    with torch.no_grad():
        first.weight.mul_(3e-5)
    network, x = ready(nn.Sequential(first, act(square), last)), vectors()
    narrow, wide = planned(network, x, precision=32), planned(network, x)
    expected = exact(network, x)
    for model, least, most in ((narrow, 2**-8, 1.0), (wide, 0.0, 2**-8)):
        logits, _ = evaluate(model.plan, model.weights, x)
        beside = model.report.logits_error / float(expected.abs().max())
        assert least < beside < most
        assert rms(logits - expected) <= 1.5 * model.report.logits_error
    assert wide.plan.output.ring > 32 and not narrow.report.widened
    assert f"a ring of {wide.plan.output.ring} bits: in a ring of 32" in str(wide)
    report = espn.check(network, x)
    assert report.widened == wide.report.widened and report.widened in str(report)


def _pools() -> dict[str, tuple[nn.Module, list[tuple[int, int] | None]]]:
    """Networks of one activation of 8x8 or its like, and what is summed before it is
    opened."""
    pool, flat = nn.AvgPool2d, nn.Flatten()
    first = lambda: (conv(3, 4, 3, padding=1), act())  # noqa: E731
    return {
        "a pool": (
            nn.Sequential(*first(), pool(2), flat, nn.Linear(64, 3)), [(2, 2)]
        ),
        "a global pool": (
            nn.Sequential(*first(), nn.AdaptiveAvgPool2d(1), flat, nn.Linear(4, 3)),
            [(8, 8)],
        ),
        "a mean": (
            Written(lambda x, c, a, h: h(a(c(x)).mean((2, 3))), *first(),
                    nn.Linear(4, 3)),
            [(8, 8)],
        ),
        "a pool as output": (nn.Sequential(*first(), pool((8, 4))), [(8, 4)]),
        "a pool that an activation reads": (
            nn.Sequential(*first(), pool(4), act(), flat, nn.Linear(16, 3)),
            [(4, 4), None],
        ),
        "two pools of one window": (
            Written(lambda x, c, a, p, q, d, e: d(p(a(c(x)))) + e(q(a(c(x)))),
                    *first(), pool(2), pool(2), conv(4, 3), conv(4, 3)),
            [(2, 2)] * 2,
        ),
        "two pools of other windows": (
            Written(
                lambda x, c, a, p, q, d, e: (
                    lambda y: torch.cat([p(y).flatten(1), q(y).flatten(1)], 1)
                )(a(c(x))),
                *first(), pool(2), pool(4), conv(4, 3), conv(4, 3),
            ),
            [None],
        ),
        "the value itself too": (
            Written(
                lambda x, c, a, p, h: (
                    lambda y: h(torch.cat([p(y).flatten(1), y.flatten(1)], 1))
                )(a(c(x))),
                *first(), pool(2), nn.Linear(320, 3),
            ),
            [None],
        ),
        "the value as output": (nn.Sequential(*first()), [None]),
        "overlapping windows": (
            nn.Sequential(*first(), pool(3, 1), flat, nn.Linear(144, 3)), [None]
        ),
        "windows that leave a rest": (
            nn.Sequential(*first(), pool(3), flat, nn.Linear(16, 3)), [None]
        ),
        "a padded pool": (
            nn.Sequential(*first(), pool(2, 2, 1), flat, nn.Linear(100, 3)), [None]
        ),
        "windows of one": (
            nn.Sequential(*first(), pool(1), flat, nn.Linear(256, 3)), [None]
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", _pools())
def test_shares_are_pooled_where_all_that_reads_them_is_one_pool(name):
    torch.manual_seed(3)
    network, wanted = _pools()[name]
    network, x = ready(network), images()
    model = planned(network, x)
    pools = [step.activation.pool for step in model.plan.steps]
    assert pools == wanted
    logits, _ = evaluate(model.plan, model.weights, x, roundings=coins(model.plan, 2))
    error = rms(logits - exact(network, x))
    assert error < 2 * model.report.logits_error + 1e-6
    z, _ = Pair(model).infer(x)
    assert rms(model.plan.decode(z) - exact(network, x)) < 2e-2
    assert check_plan(espn.convert(network, x), x, model) is None


def test_shares_are_not_pooled_where_their_sum_would_leave_no_precision():
    """Of what an interval allows, a narrow ring holds one value, not 1,024."""
    torch.manual_seed(3)
    x = torch.randn(8, 1, 32, 32)
    for radius, pool in ((60.0, None), (5.0, (32, 32))):
        polynomial = espn.Polynomial((0, 1, 4), 0, (-radius, radius))
        network = ready(
            nn.Sequential(conv(1, 2), act(polynomial), nn.AvgPool2d(32), nn.Flatten())
        )
        model = planned(network, x, precision=26)
        assert model.plan.steps[0].activation.pool == pool
        roundings = coins(model.plan, 2)
        logits, _ = evaluate(model.plan, model.weights, x, roundings=roundings)
        assert rms(logits - exact(network, x)) < 2 * model.report.logits_error


def test_the_compact_precision_takes_fewest_bytes_within_the_error_of_espn():
    network = ready(
        nn.Sequential(
            conv(3, 8, 3), act(), conv(8, 8, 3), act(), nn.Flatten(), nn.Linear(128, 5)
        )
    )
    x = images(16)
    private = espn.convert(network, x, protocol="espn")
    found = espn.explain(private, x, precision_bits=12, runs=1)
    of_espn = rms(found.logits.double() - found.clear)
    fast, compact = (planned(network, x, precision=p) for p in ("fast", "compact"))
    logits, _ = evaluate(
        compact.plan, compact.weights, x, roundings=coins(compact.plan, 3)
    )
    stated = compact.report.logits_error
    assert 0.5 * stated < of_espn and stated < 1.1 * of_espn
    assert rms(logits - exact(network, x)) < of_espn
    assert f"standard deviation of the error {stated:.2g}" in str(compact)
    # One truncation for all powers from the square on; the client receives nothing of
    # c below it.
    for step in compact.plan.steps:
        (group,) = step.activation.groups
        assert step.opened_bits == (step.ring - group.shift,)
        assert step.ring <= 32
    online = [sum(online_bytes(model.plan)) for model in (fast, compact)]
    assert online[1] < 0.75 * online[0]
    assert compact.plan.dealer_bytes() < 0.8 * fast.plan.dealer_bytes()
    assert not compact.report.widened


def test_the_estimate_of_espn_is_its_error():
    """Where powers matter most, and where the layers' own units do."""
    for network, x in (
        (nn.Sequential(nn.Linear(10, 16), act(QUADRATIC), nn.Linear(16, 4)), vectors),
        (nn.Sequential(nn.Linear(10, 16), act(QUINTIC), nn.Linear(16, 4)), vectors),
        (nn.Sequential(nn.Linear(10, 16), nn.Linear(16, 4)), vectors),
    ):
        given = x(256)
        private = espn.convert(ready(network), given, protocol="espn")
        calibration = Calibration(Network(private), given)
        for bits in (10, 12):
            found = espn.explain(private, given, precision_bits=bits, runs=1)
            measured = rms(found.logits.double() - found.clear)
            estimated = espn_error(calibration, frac_bits=bits)
            assert 0.6 < measured / estimated < 1.5


def test_the_compact_precision_parts_powers_and_widens_where_a_network_needs_it():
    """Weights so small that no usual ring keeps enough of them."""
    square = espn.Polynomial((0, 512, 90), 10, (-5.0, 5.0))
    first, last = (nn.Linear(*size, bias=False) for size in ((10, 8), (8, 4)))
    with torch.no_grad():
        first.weight.mul_(3e-5)
    network, x = ready(nn.Sequential(first, act(square), last)), vectors()
    wide = planned(network, x, precision="compact")
    assert wide.plan.output.ring > 32
    assert f"a ring of {wide.plan.output.ring} bits: in a ring of 32" in str(wide)
    # A degree whose powers one truncation would not serve.
    steep = espn.Polynomial((0, 1024, 0, 0, 0, 0, 300, 0, 5), 10, (-2.0, 2.0))
    network = ready(nn.Sequential(nn.Linear(10, 16), act(steep), nn.Linear(16, 4)))
    model = planned(network, x, precision="compact")
    assert model.plan.output.ring <= 32
    logits, _ = evaluate(model.plan, model.weights, x, roundings=coins(model.plan, 1))
    assert rms(logits - exact(network, x)) < 2 * model.report.logits_error


def test_the_compact_plan_of_weights_that_are_all_zero_has_a_usual_ring():
    network = ready(nn.Sequential(nn.Linear(10, 8), act(), nn.Linear(8, 4)))
    for parameter in network.parameters():
        parameter.zero_()
    plan = planned(network, vectors(), precision="compact").plan
    assert {part.ring for part in plan.parts} == {32}
    assert len(plan.steps[0].activation.groups) == 1


# ---------------------------------------------------------------- stated errors


@pytest.mark.parametrize("ring", [26, 40])
@pytest.mark.parametrize("name", [*RESCALING, *OTHERS])
def test_the_stated_error_is_the_measured_one(name, ring):
    """Within 0.3 to 1.5; and the noise hides the coins: 4 to 16 deviations wide."""
    torch.manual_seed(6)
    make, inputs = (RESCALING | OTHERS)[name]
    network, x = ready(make()), inputs()
    model = planned(network, x, precision=ring)
    plan, report = model.plan, model.report
    unit = 2.0**-plan.output.frac_bits
    width = unit * 2**plan.output.noise_bits
    roundings = coins(plan, ring)
    logits, _ = evaluate(plan, model.weights, x, roundings=roundings)
    error = math.hypot(rms(logits - exact(network, x)), width / math.sqrt(12))
    assert 0.3 * report.logits_error <= error <= 1.5 * report.logits_error
    assert report.coins_error <= report.logits_error
    one = x[:1].expand(240, *x.shape[1:])
    _, trace = evaluate(plan, model.weights, one, roundings=roundings)
    deviations = trace[-1].reshape(240, -1).std(0) * unit
    assert 0.3 * report.coins_error <= math.sqrt(np.square(deviations).mean())
    assert math.sqrt(np.square(deviations).mean()) <= 1.5 * report.coins_error
    assert 4 * deviations.max() <= width <= 16 * deviations.max()
    assert width / math.sqrt(12) <= report.logits_error


def test_the_parties_results_have_the_stated_error():
    torch.manual_seed(7)
    network, x = ready(OTHERS["quadratic"][0]()), images(16)
    pair = Pair(planned(network, x))
    z, _ = pair.infer(x)
    error = rms(pair.plan.decode(z) - exact(network, x))
    stated = pair.model.report.logits_error
    assert 0.3 * stated <= error <= 1.5 * stated


@pytest.mark.slow
def test_a_bundled_network_has_the_stated_error():
    sample = fashion_sample()
    x = sample.normalization(sample.images[:6])
    network = ready(load_network(DATA / "fashion_resnet_poly.safetensors"))
    model = planned(network, x[:4])
    plan, report = model.plan, model.report
    unit = 2.0**-plan.output.frac_bits
    width = unit * 2**plan.output.noise_bits
    logits, _ = evaluate(plan, model.weights, x, roundings=coins(plan, 1))
    error = math.hypot(rms(logits - exact(network, x)), width / math.sqrt(12))
    assert 0.3 * report.logits_error <= error <= 1.5 * report.logits_error
    runs: list = []
    for part in x[4:5].expand(200, *x.shape[1:]).split(20):
        roundings = coins(plan, len(runs) + 2)
        runs.append(evaluate(plan, model.weights, part, roundings=roundings)[1][-1])
    deviations = np.concatenate(runs).std(0) * unit
    assert 4 * deviations.max() <= width <= 16 * deviations.max()


def test_the_table_states_the_error_at_the_logits_and_no_bound_by_layer():
    network = ready(OTHERS["quartic"][0]())
    one = str(planned(network, vectors(1)))
    head = one.splitlines()[0]
    assert "own rounding" in head and "noise" not in head
    assert "no bound" in one and "logits: standard deviation of the error" in one
    assert "calibrated on 1 input: one bounds every layer; give more" in one
    assert "calibrated on 8 inputs" in str(planned(network, vectors(8)))


# ---------------------------------------------------------------- calibration


def test_calibration_that_is_none_is_refused_with_both_sizes():
    network = ready(nn.Sequential(conv(3, 4, 3), act(), nn.AdaptiveAvgPool2d(1)))
    private = espn.convert(network, images())
    nan, infinite = images(), images()
    nan[0, 0, 0, 0], infinite[1, 2, 3, 4] = math.nan, math.inf
    cases: list = [
        (torch.randn(2, 3, 32, 32), r"\(2, 3, 32, 32\).*\(batch, 3, 8, 8\)"),
        (torch.randn(3, 8, 8), r"\(3, 8, 8\).*\(batch, 3, 8, 8\)"),
        (torch.zeros(0, 3, 8, 8), "at least one input"),
        (torch.tensor(1.0), "at least one input"),
        (nan, "NaN or infinity"),
        (infinite, "NaN or infinity"),
        (images().to(torch.complex64), "complex64"),
        (["cat.png"], "is a str"),
    ]
    for example, words in cases:
        with pytest.raises(PlanError, match=words):
            make_plan(private, example)
    for kind in (torch.float16, torch.bfloat16, torch.float64, torch.uint8):
        make_plan(private, (images().abs() * 10).to(kind))
    make_plan(private, images().numpy())


# ---------------------------------------------------------------- check


def test_check_runs_the_plan_and_compares_it_with_the_module():
    torch.manual_seed(8)
    network, x = ready(OTHERS["quadratic"][0]()), images()
    private = espn.convert(network, x)
    assert check_plan(private, x) is None
    assert check_plan(private, x, reference=network) is None

    def other(x):
        return network(x) + 0.01

    found = check_plan(private, x, reference=other)
    assert found is not None and "differs by 0.01" in found and "allowed" in found
    assert "shape" in str(check_plan(private, x, reference=lambda x: network(x)[:, :3]))

    def baked(x):
        assert len(x) == 2, "a batch of 2 was baked in"
        return network(x)

    assert "baked in" in str(check_plan(private, x, reference=baked))

    # A branch that agrees on the example alone.
    def branching(y):
        return network(y) if y.shape[0] == 2 else network(-y)

    assert "on a batch of 1" in str(check_plan(private, x, reference=branching))


def test_check_finds_what_the_exporter_dropped():
    torch.manual_seed(9)
    network = nn.Sequential(conv(3, 3), nn.AvgPool2d(3, 1, 1, divisor_override=5))
    network[1].eval()
    report = espn.check(network.train(), images())
    assert not report.ok or "differs by" in str(report.masked)
    assert network.training and network[0].training
