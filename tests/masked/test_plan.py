"""Plans: identity, tables, bounds, choices, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import crypten_espn as espn
from crypten_espn.errors import PlanError, RangeError, ShapeError
from crypten_espn.masked import plan
from crypten_espn.masked.planning import builder as planner
from crypten_espn.masked.planning import precision
from crypten_espn.pillar.data import fashion_sample
from crypten_espn.pillar.storage import load_network

from .masked_cases import QUARTIC, Residual, planned, residual

BUNDLED = Path(espn.__file__).parent / "data"


@pytest.fixture(scope="module")
def small():
    return planned(*residual())


def network(*layers):
    return torch.nn.Sequential(*layers).eval()


def act(polynomial=QUARTIC):
    return espn.PolynomialActivation(polynomial)


def test_a_plan_survives_its_text_and_has_one_digest(small):
    chosen, weights = small
    again = plan.Plan.from_json(chosen.to_json())
    assert again == chosen and again.digest == chosen.digest
    other, _ = planned(*residual(), precision="high")
    assert other.digest != chosen.digest
    # No weight is in it: another model of the same shape and ranges differs in weights
    # alone.
    text = chosen.to_json()
    for array in weights.integers:
        assert str(array.reshape(-1)[0]) not in json.loads(text)["weights"]
    assert len(text) < 20_000


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("segments"),
        lambda d: d["segments"][0].update(ring=64),
        lambda d: d["segments"][0]["activation"].update(drop=63),
        lambda d: d["segments"][0]["activation"]["groups"][0].update(shift=31),
        lambda d: d["segments"][0]["root"].update(shape=[0, 8, 8]),
        lambda d: d["segments"][-1].update(activation=d["segments"][0]["activation"]),
        lambda d: d["segments"][1]["root"].update(weight=99, op="conv"),
        lambda d: d["segments"][0]["root"].update(color="red"),
        lambda d: d["weights"][0].update(size=3),
    ],
)
def test_a_contradictory_plan_is_refused(small, change):
    data = json.loads(small[0].to_json())
    change(data)
    with pytest.raises(PlanError):
        plan.Plan.from_json(json.dumps(data))
    with pytest.raises(PlanError, match="not a plan"):
        plan.Plan.from_json("[]")


def test_the_table_names_layers_and_totals(small):
    chosen, _ = small
    table = str(chosen)
    lines = table.splitlines()
    assert len(lines) == 1 + len(chosen.segments) + 1
    assert "act1" in table and "output" in table and "32+64" in table
    down, up = chosen.online_bytes()
    assert f"{chosen.messages} messages, {down + up:,} bytes online" in lines[-1]
    assert chosen.digest.hex()[:16] in lines[-1]


def test_declared_bytes_follow_from_the_rings(small):
    chosen, _ = small
    elements = [8 * 8 * 8, 4 * 4 * 16, 4 * 4 * 16]
    assert [s.elements for s in chosen.segments] == [*elements, 5]
    assert chosen.activation_elements == sum(elements)
    assert chosen.online_bytes() == (
        4 * sum(elements) + 4 * 5,
        8 * sum(elements) + 4 * 3 * 64,
    )
    assert chosen.messages == 8
    assert chosen.dealer_bytes() == 84 * sum(elements) + 20


@pytest.mark.parametrize(
    "precision, ring, error", [("fast", 32, 0.02), ("high", 40, 0.001), (26, 26, 0.3)]
)
def test_precision_is_a_choice(precision, ring, error):
    model, example = residual()
    chosen, weights = planned(model, example, precision=precision)
    assert {s.ring for s in chosen.segments} == {ring}
    logits, _ = plan.simulate(chosen, weights, example)
    assert float((logits - model(example)).abs().max()) < error


def test_bounds_hold_with_the_stated_headroom(small):
    chosen, _ = small
    for segment in chosen.segments:
        assert segment.bound >= planner.HEADROOM * segment.seen
        assert segment.bound * 2.0**segment.scale <= 2.0 ** (segment.ring - 2)
        if segment.activation is not None:
            assert segment.bound >= 5.0
            assert segment.activation.value_ring - segment.activation.drop == 32
    tight, _ = planned(*residual(), headroom=1.0)
    assert tight.segments[-1].scale >= chosen.segments[-1].scale + 1


def test_the_linear_term_keeps_every_bit_and_coefficients_are_exact(small):
    act = small[0].segments[0].activation
    assert act.groups[0].shift == 0
    for group in act.groups:
        bits = act.scale - group.shift
        for k, integer in enumerate(group.coeffs):
            if k:
                exact = integer / 2.0 ** (act.value_scale - k * bits)
                assert exact in (0.0, QUARTIC.coeffs[k])
    assert act.constant / 2.0**act.value_scale == QUARTIC.coeffs[0]


def test_all_degrees_are_grouped():
    for degree in range(1, 11):
        numerators = tuple(range(1, degree + 2))
        polynomial = espn.Polynomial(numerators, 12, (-2.0, 2.0))
        x = np.linspace(-2, 2, 41)
        moments = np.array([(x**n).mean() for n in range(2 * degree + 1)])
        order = np.arange(degree + 1)
        effect = precision.Effect(moments, moments[order[:, None] + order])
        groups = precision.choose_groups(
            polynomial, scale=25, value_scale=43, effect=effect
        )
        powers = [k for g in groups for k, a in enumerate(g.coeffs) if a]
        assert powers == list(range(1, degree + 1))
        total = np.full_like(x, 1 / 4096)
        for group in groups:
            unit = 2.0 ** (group.shift - 25)
            rounded = np.rint(x / unit) * unit
            scale = 2.0 ** (25 - group.shift)
            for k, a in enumerate(group.coeffs):
                total += a * (rounded * scale) ** k / 2.0**43
        expected = np.polynomial.polynomial.polyval(x, polynomial.coeffs)
        error = np.abs(total - expected).max()
        allowed = 0.01 if degree <= 4 else 0.1
        assert error < allowed * max(1, np.abs(expected).max()), (degree, error)


def test_simulated_layers_match_plaintext(small):
    """The trace finds the layer where a private result leaves plaintext."""
    chosen, weights = small
    model, example = residual()
    _, trace = plan.simulate(chosen, weights, example)
    first = model.stem(example).permute(0, 2, 3, 1).numpy()
    found = trace[0] / 2.0 ** chosen.segments[0].scale
    assert np.abs(found - first).max() < 6 * chosen.segments[0].noise + 1e-4


def test_quadratic_pools_need_no_extra_bits_and_odd_ones_fold():
    for size, ratio in ((2, 1), (3, 9)):
        torch.manual_seed(0)
        model = network(
            torch.nn.Conv2d(3, 4, 3, padding=1),
            act(),
            torch.nn.AvgPool2d(size),
            torch.nn.Conv2d(4, 4, 1),
            act(),
            torch.nn.Flatten(),
            torch.nn.Linear(4 * (12 // size) ** 2, 2),
        ).requires_grad_(False)
        example = torch.randn(2, 3, 12, 12)
        chosen, weights = planned(model, example)
        below = chosen.sources[1].frac_bits
        factor = chosen.weights[1].factor
        spare = chosen.segments[1].scale - below - (2 if size == 2 else 0)
        assert factor == pytest.approx(2.0**spare / ratio)
        logits, _ = plan.simulate(chosen, weights, example)
        assert float((logits - model(example)).abs().max()) < 0.01


def test_weights_without_an_activation_between_get_a_rescaling():
    torch.manual_seed(0)
    model = network(torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 4, 3, groups=4))
    model.requires_grad_(False)
    example = torch.randn(2, 3, 6, 6)
    chosen, weights = planned(model, example)
    assert len(chosen.segments) == 2
    assert "(rescaled)" in chosen.segments[0].activation.name
    logits, _ = plan.simulate(chosen, weights, example)
    assert logits.shape == (2, 4, 4, 4)
    assert float((logits - model(example)).abs().max()) < 0.01


def test_unsupported_layers_and_values_are_named():
    example = torch.randn(2, 3, 8, 8)
    relu = espn.convert(network(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()), example)
    with pytest.raises(PlanError, match="ReLU is not supported"):
        planner.make_plan(relu, example)
    model, data = residual()
    graph = espn.convert(model, data)
    with pytest.raises(PlanError, match=r"act\d: values up to .* in a ring of 32"):
        planner.make_plan(graph, data * 30)
    big = torch.full((1, 3, 8, 8), float("inf"))
    with pytest.raises(PlanError, match="overflow"):
        planner.make_plan(graph, big)
    for wrong in ("best", 12, 64):
        with pytest.raises(PlanError):
            planner.make_plan(graph, data, precision=wrong)
    with pytest.raises(PlanError, match="owner"):
        planner.make_plan(graph, data, mode="both")
    with pytest.raises(PlanError, match="headroom"):
        planner.make_plan(graph, data, headroom=0.5)


def test_inputs_are_checked_before_anything_else(small):
    chosen, _ = small
    with pytest.raises(ShapeError, match=r"\(batch, 3, 8, 8\)"):
        chosen.encode(torch.zeros(1, 3, 9, 9))
    with pytest.raises(ShapeError):
        chosen.encode(torch.zeros(3, 8, 8))
    with pytest.raises(ShapeError):
        chosen.encode(torch.zeros(0, 3, 8, 8))
    with pytest.raises(RangeError, match="NaN"):
        chosen.encode(torch.full((1, 3, 8, 8), float("nan")))
    with pytest.raises(RangeError, match="reaches 1e"):
        chosen.encode(torch.full((1, 3, 8, 8), 1e5))
    x = torch.randn(2, 3, 8, 8)
    integers = chosen.encode(x)
    assert integers.shape == (2, 8, 8, 3)
    back = torch.from_numpy(integers / 2.0 ** chosen.sources[0].frac_bits)
    assert float((back.permute(0, 3, 1, 2) - x).abs().max()) <= 2.0 ** -(
        chosen.sources[0].frac_bits + 1
    )


def test_weights_must_be_this_network_s(small):
    chosen, weights = small
    with pytest.raises(PlanError, match="expects weights"):
        plan.quantise(chosen, {})
    model = Residual().eval().requires_grad_(False)
    parameters = planner.parameters_of(espn.convert(model, torch.zeros(1, 3, 8, 8)))
    other = plan.quantise(chosen, parameters)
    assert other.digest != weights.digest
    name = chosen.weights[0].parameter
    parameters[name] = np.full_like(parameters[name], np.nan)
    with pytest.raises(PlanError, match="NaN"):
        plan.quantise(chosen, parameters)


def test_effects_are_what_errors_of_a_result_do_to_the_output():
    """One output, so no sign is left to chance: sums over the images, by hand."""
    torch.manual_seed(1)
    model = network(torch.nn.Linear(3, 5), act(), torch.nn.Linear(5, 1)).double()
    x = torch.randn(8, 3).double()
    with torch.no_grad():
        z = model[0](x).numpy()
    model = model.float()
    reader = planner._Reader(espn.convert(model, x.float()))
    reader.calibrate(x)
    (layer,) = [one for one in reader.layers.values() if one.polynomial]
    w = model[2].weight.detach().double().numpy()[0]
    for n in range(9):
        wanted = (w**2 * z**n).sum(1).mean()
        # One element in ten thousand may lie anywhere in [-5, 5].
        wanted += 1e-4 * (w**2).sum() * (5**n / (n + 1) if n % 2 == 0 else 0)
        assert layer.effect.independent[n] == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    sums = np.array([(w * z**k).sum(1) for k in range(5)])
    coherent = layer.effect.coherent - sums @ sums.T / 8
    assert coherent[0, 0] == pytest.approx(1e-4 * (w**2).sum(), rel=1e-3)
    assert coherent[1, 3] == pytest.approx(1e-4 * (w**2).sum() * 5**4 / 5, rel=1e-3)
    assert coherent[0, 3] == pytest.approx(0, abs=1e-6)
    assert layer.effect.rounding == pytest.approx((w**2).sum(), rel=1e-3)
    reader.calibrate(x[:1])  # a batch is one draw of signs for all of its images
    (last,) = [one for one in reader.layers.values() if one.inputs == [layer.name]]
    y = QUARTIC(torch.from_numpy(z[0])).numpy()
    assert last.weight_effect == pytest.approx((y**2).sum(), rel=1e-4)
    reader.calibrate(x)
    slope = {0: 0.5, 1: -2.0}
    error = 0.5 - 2.0 * z
    assert layer.effect.of_signs(slope) == pytest.approx(
        (w**2 * error**2).sum(1).mean(), rel=1e-2
    )
    assert layer.effect.of_bias(slope) == pytest.approx(
        ((w * error).sum(1) ** 2).mean(), rel=1e-2
    )


def test_a_plan_from_inputs_that_are_all_zero_still_keeps_bits():
    """Nothing is learnt from them; powers of x must not lose their bits."""
    torch.manual_seed(3)
    model = network(
        torch.nn.Linear(6, 8, bias=False), act(), torch.nn.Linear(8, 4)
    ).requires_grad_(False)
    chosen, weights = planned(model, torch.zeros(2, 6))
    x = torch.rand(16, 6) - 0.5
    found, _ = plan.simulate(chosen, weights, x)
    assert (found - model(x)).abs().max() < 0.01
    torch.nn.init.zeros_(model[2].weight)  # no output depends on the activation
    chosen, weights = planned(model, torch.randn(2, 6))
    assert chosen.segments[0].activation.frac_bits >= 8


def logit_error(name: str, ring: int) -> float:
    """Root mean square error of a bundled network's logits, masks at random."""
    sample = fashion_sample()
    x = sample.normalization(sample.images[:40])
    model = load_network(BUNDLED / f"{name}.safetensors").eval()
    graph = espn.convert(model, x[:24])
    chosen = planner.make_plan(graph, x[:24], precision=ring)
    weights = plan.quantise(chosen, planner.parameters_of(graph))
    random = np.random.default_rng(ring)
    masks = []
    for segment in chosen.segments:
        shape = (2, len(x), *segment.root.shape)
        first, second = random.integers(-(2**63), 2**63 - 1, shape)
        masks.append((first, second))
    logits, _ = plan.simulate(chosen, weights, x, masks=masks)
    with torch.no_grad():
        return float((logits - model(x)).square().mean().sqrt())


def test_bits_are_split_where_the_output_moves_least():
    """Degree 4 gains with every ring; degree 6, whose top power fills it, does not."""
    narrow, fast, high = (
        logit_error("fashion_resnet_poly", bits) for bits in (24, 32, 40)
    )
    assert narrow < 0.08 and fast < 0.006 and high < 0.002
    assert logit_error("fashion_minionn_poly", 40) < 0.015
    assert logit_error("fashion_minionn_poly", 32) < 0.015
