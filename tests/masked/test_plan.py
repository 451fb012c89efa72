"""Plans: identity, tables, bounds, choices, and what stays with the owner."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import crypten_espn as espn
from crypten_espn.errors import PlanError, RangeError, ShapeError
from crypten_espn.masked.inference import online_bytes
from crypten_espn.masked.linear import Read
from crypten_espn.masked.plan import Plan
from crypten_espn.masked.planning import (
    HEADROOM,
    make_plan,
    masked_model,
)
from crypten_espn.masked.planning.calibration import Calibration
from crypten_espn.masked.planning.network import Network, parameters_of
from crypten_espn.masked.planning.precision import Effect, choose_truncations
from crypten_espn.masked.reference import evaluate
from crypten_espn.masked.steps import RING_LIMITS, Activation, Step
from crypten_espn.masked.weights import quantise
from crypten_espn.pillar.data import fashion_sample
from crypten_espn.pillar.storage import load_network
from crypten_espn.wire.packing import packed_bytes

from .cases import QUARTIC, Residual, planned, residual
from .networks import coins

BUNDLED = Path(espn.__file__).parent / "data"


@pytest.fixture(scope="module")
def small():
    return planned(*residual())


def network(*layers):
    return torch.nn.Sequential(*layers).eval().requires_grad_(False)


def act(polynomial=QUARTIC):
    return espn.PolynomialActivation(polynomial)


def logits(model, x):
    return evaluate(model.plan, model.weights, x)[0]


def test_a_plan_survives_its_text_and_has_one_digest(small):
    text = small.plan.to_json()
    again = Plan.from_json(text)
    assert again == small.plan and again.digest == small.plan.digest
    assert Plan.from_json(text.encode()).digest == small.plan.digest
    # However it is spelt: the digest is of what it says.
    assert Plan.from_json(json.dumps(json.loads(text), indent=1)).digest == again.digest
    other = planned(*residual(), precision="high")
    assert other.plan.digest != small.plan.digest
    assert len(text) < 20_000


def words_of(data):
    """Every key and every text in a plan."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield key
            yield from words_of(value)
    elif isinstance(data, list):
        for value in data:
            yield from words_of(value)
    elif isinstance(data, str):
        yield data


def test_what_the_owner_keeps_is_not_in_the_plan(small):
    """No name and no figure of calibration; no float but the input's bound."""
    text = small.plan.to_json()
    known = {
        "version", "input", "shape", "ring", "frac_bits", "bound", "steps", "root",
        "type", "x", "source", "multiplier", "weight", "filters", "kernel", "stride",
        "dilation", "pads", "groups", "activation", "linear", "shift", "coefficient",
        "coeffs", "constant", "drop", "output", "noise_bits", "terms", "conv", "read",
        "add", "pool", "flatten", "guard", "polynomial",
    }  # fmt: skip
    assert set(words_of(json.loads(text))) == known
    assert re.findall(r"\d+\.\d+", text) == [str(small.plan.input.bound)]
    assert small.plan.input.bound == 2.0 ** round(np.log2(small.plan.input.bound))
    report = small.report
    for part in report.parts:
        for figure in (part.seen, part.noise):
            assert repr(figure) not in text and f"{figure:.4g}" not in text
    for weight in report.weights:
        assert weight.parameter not in text and repr(weight.factor) not in text
    assert repr(report.logits_error) not in text
    # An owner's weights are not printed with the model either.
    assert "array" not in repr(small)


def test_models_of_one_architecture_differ_in_scales_alone():
    texts = []
    for seed in (1, 11):
        torch.manual_seed(seed)
        net = Residual().eval().requires_grad_(False)
        texts.append(json.loads(planned(net, residual()[1]).plan.to_json()))
    public = {"frac_bits", "shift", "coefficient", "coeffs", "constant", "multiplier",
              "noise_bits"}  # fmt: skip

    def differing(one, other, key):
        assert type(one) is type(other)
        if isinstance(one, dict):
            assert one.keys() == other.keys()
            for name in one:
                differing(one[name], other[name], name)
        elif isinstance(one, list):
            assert len(one) == len(other)
            for a, b in zip(one, other, strict=True):
                differing(a, b, key)
        elif one != other:
            assert key in public, (key, one, other)
            found.add(key)

    found: set[str] = set()
    differing(texts[0], texts[1], "")
    assert found


def test_the_table_names_layers_and_totals(small):
    table = str(small)
    lines = table.splitlines()
    plan = small.plan
    assert len(lines) == 1 + len(plan.parts) + 5
    assert "act1" in table and "output" in table
    down, up = online_bytes(plan)
    assert f"{plan.messages} messages, {down + up:,} bytes online" in table
    assert plan.digest.hex()[:16] in table
    assert "standard deviation of the error" in table
    for line, part in zip(lines[1:], plan.steps, strict=False):
        assert "+".join(map(str, (*part.opened_bits, 48))) in line


def test_declared_bytes_follow_from_the_rings(small):
    plan = small.plan
    elements = [8 * 8 * 8, 4 * 4 * 16, 4 * 4 * 16]
    assert [plan.elements(i) for i in range(4)] == [*elements, 5]
    assert plan.activation_elements == sum(elements)
    shifts = [[g.shift for g in s.activation.groups] for s in plan.steps]
    down = sum(
        packed_bytes(count, 32 - shift)
        for count, groups in zip(elements, shifts, strict=True)
        for shift in groups
    )
    # The last activation's reader takes the mean: sums over the image are opened.
    opened = [*elements[:2], 16]
    assert [source.elements for source in plan.sources] == [3 * 64, *opened]
    assert online_bytes(plan) == (down + 4 * 5, 6 * sum(opened) + 4 * 3 * 64)
    assert plan.messages == 8
    # The constant; of the square's group one power and two changes, of the fourth
    # power's three and four.
    kept = [[64 - low for low in s.activation.zeros(32)] for s in plan.steps]
    assert all(len(bits) == 1 + 3 + 7 and bits[0] == 48 for bits in kept)
    dealt = sum(
        packed_bytes(sums if j == 0 else count, bits)
        for count, sums, words in zip(elements, opened, kept, strict=True)
        for j, bits in enumerate(words)
    )
    assert plan.dealer_bytes() == dealt + 4 * sum(elements) + 4 * 5
    assert dealt < 0.76 * 2 * 8 * 6 * sum(elements)
    assert plan.dealer_bytes(batch=3) == 3 * plan.dealer_bytes()
    layers = [3 * 8 * 9, 8 * 16 * 9, 16 * 16 * 9, 8 * 16, 16 * 5]
    assert plan.weight_bytes == 4 * sum(layers)
    assert plan.work == 64 * layers[0] + 16 * sum(layers[1:4]) + layers[4] + 16 * 16


def test_a_dealers_memory_is_bounded_by_what_the_plan_says(small):
    plan = small.plan
    values = max(plan.elements(i) * s.activation.words * 2
                 for i, s in enumerate(plan.steps))  # fmt: skip
    for batch in (1, 10):
        assert plan.dealer_memory(batch=batch) > 8 * batch * values
        assert plan.dealer_memory(batch=batch) < 100 * 8 * batch * values
    assert plan.dealer_memory(batch=10) > 9 * plan.dealer_memory()


@pytest.mark.parametrize(
    "precision, ring, error", [("fast", 32, 0.02), ("high", 40, 0.001), (26, 26, 0.3)]
)
def test_precision_is_a_choice(precision, ring, error):
    net, example = residual()
    model = planned(net, example, precision=precision)
    assert {part.ring for part in model.plan.parts} == {ring}
    assert float((logits(model, example) - net(example)).abs().max()) < error


def test_bounds_hold_with_the_stated_headroom(small):
    for part, known in zip(small.plan.parts, small.report.parts, strict=True):
        assert known.bound >= HEADROOM * known.seen
        assert known.bound * 2.0**part.frac_bits <= 2.0 ** (part.ring - 2)
        if isinstance(part, Step):
            assert known.bound >= 5.0
            assert part.activation.ring == 32
    tight = planned(*residual(), headroom=1.0)
    assert tight.plan.output.frac_bits >= small.plan.output.frac_bits + 1


def test_the_linear_term_keeps_every_bit_and_coefficients_are_exact(small):
    step = small.plan.steps[0]
    act = step.activation
    value = act.value_frac_bits
    assert act.linear is not None and act.linear.shift == 0
    powers = [(act.linear.shift, 1, act.linear.coefficient[0])]
    for group in act.groups:
        powers += [(group.shift, k, a) for k, a in enumerate(group.coeffs[0]) if a]
    for shift, k, integer in powers:
        exact = integer / 2.0 ** (value - k * (step.frac_bits - shift))
        assert exact == QUARTIC.coeffs[k]
    assert act.constant[0] / 2.0**value == QUARTIC.coeffs[0]


SHAPES = {
    **{f"degree {d}": tuple(range(1, d + 2)) for d in range(1, 11)},
    "even": (9, 0, 8, 0, -7, 0, 6, 0, -5, 0, 4),
    "odd": (0, 9, 0, -8, 0, 7, 0, -6, 0, 5),
    "the top alone": (0, 0, 0, 0, 0, 0, 0, 0, 3),
}


@pytest.mark.parametrize("name", SHAPES)
def test_all_degrees_are_grouped(name):
    """The groups' integers add up to the polynomial."""
    numerators = SHAPES[name]
    degree = len(numerators) - 1
    polynomial = espn.Polynomial(numerators, 12, (-2.0, 2.0))
    x = np.linspace(-2, 2, 41)
    moments = np.array([(x**n).mean() for n in range(2 * degree + 1)])
    sums = x[:, None, None] ** np.arange(degree + 1) / len(x) ** 0.5
    effect = Effect(moments[None], sums, np.zeros((1, 2 * degree + 1)))
    found = choose_truncations(
        (polynomial,),
        ring=32,
        frac_bits=25,
        result_bits=11,
        effect=effect,
    )
    assert found is not None
    wanted = [k for k in range(2, degree + 1) if numerators[k]]
    groups = [{k for k, a in enumerate(g.coeffs[0]) if a} for g in found.groups]
    assert set().union(*groups) - {1} == set(wanted)
    terms = [(g.shift, k, a) for g in found.groups for k, a in enumerate(g.coeffs[0])]
    if found.linear is not None:
        terms.append((found.linear.shift, 1, found.linear.coefficient[0]))
        assert all(found.linear.shift <= g.shift for g in found.groups[:1])
    exact = np.full_like(x, found.constant[0] * 2.0**-43)
    total = exact.copy()
    for shift, k, a in terms:
        bits = 25 - shift
        exact += a * x**k * 2.0 ** (k * bits - 43)
        total += a * np.rint(x * 2.0**bits) ** k / 2.0**43
    expected = np.polynomial.polynomial.polyval(x, polynomial.coeffs)
    largest = max(1, np.abs(expected).max())
    allowed = 0.01 if degree <= 4 else 0.1
    assert np.abs(exact - expected).max() < allowed * largest
    assert np.abs(total - expected).max() < allowed * largest


def test_evaluated_layers_match_plaintext(small):
    """The trace finds the layer where a private result leaves plaintext."""
    net, example = residual()
    _, trace = evaluate(small.plan, small.weights, example)
    first = net.stem(example).permute(0, 2, 3, 1).numpy()
    found = trace[0] / 2.0 ** small.plan.steps[0].frac_bits
    assert np.abs(found - first).max() < 6 * small.report.parts[0].noise + 1e-4


def test_quadratic_pools_need_no_extra_bits_and_odd_ones_fold():
    for size, ratio in ((2, 1), (3, 9)):
        torch.manual_seed(0)
        net = network(
            torch.nn.Conv2d(3, 4, 3, padding=1),
            act(),
            torch.nn.AvgPool2d(size),
            torch.nn.Conv2d(4, 4, 1),
            act(),
            torch.nn.Flatten(),
            torch.nn.Linear(4 * (12 // size) ** 2, 2),
        )
        example = torch.randn(2, 3, 12, 12)
        model = planned(net, example)
        below = model.plan.sources[1].frac_bits
        factor = model.report.weights[1].factor
        spare = model.plan.steps[1].frac_bits - below - (2 if size == 2 else 0)
        assert factor == pytest.approx(2.0**spare / ratio)
        assert float((logits(model, example) - net(example)).abs().max()) < 0.01


def test_weights_without_an_activation_between_get_a_rescaling():
    """Its power is 1 and its coefficient a power of two, exact in every ring."""
    torch.manual_seed(0)
    net = network(torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 4, 3, groups=4))
    example = torch.randn(2, 3, 6, 6)
    for ring in range(24, RING_LIMITS[1] + 1, 4):
        model = planned(net, example, precision=ring)
        (step,) = model.plan.steps
        assert "(rescaled)" in model.report.parts[0].name
        act = step.activation
        assert isinstance(act, Activation)
        assert act.groups == () and act.constant == (0,) and act.linear is not None
        kept = step.frac_bits - act.linear.shift
        assert act.linear.coefficient[0] == 2 ** (act.value_frac_bits - kept)
        found = logits(model, example)
        assert found.shape == (2, 4, 4, 4)
        error = float((found - net(example)).abs().max())
        assert error < (0.3 if ring < 30 else 0.01)


def test_unsupported_layers_and_values_are_named():
    example = torch.randn(2, 3, 8, 8)
    relu = espn.convert(network(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()), example)
    with pytest.raises(PlanError, match="ReLU is not supported"):
        make_plan(relu, example)
    net, data = residual()
    graph = espn.convert(net, data)
    with pytest.raises(PlanError, match=r"act\d: values up to .* in a ring of 32"):
        make_plan(graph, data * 30)
    big = torch.full((1, 3, 8, 8), float("inf"))
    with pytest.raises(PlanError, match="NaN or infinity"):
        make_plan(graph, big)
    for wrong in ("best", 12, 64, None, 32.0):
        with pytest.raises(PlanError):
            make_plan(graph, data, precision=wrong)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="headroom"):
        make_plan(graph, data, headroom=0.5)


def test_inputs_are_checked_before_anything_else(small):
    plan = small.plan
    with pytest.raises(ShapeError, match=r"\(batch, 3, 8, 8\)"):
        plan.encode(torch.zeros(1, 3, 9, 9))
    with pytest.raises(ShapeError):
        plan.encode(torch.zeros(3, 8, 8))
    with pytest.raises(ShapeError):
        plan.encode(torch.zeros(0, 3, 8, 8))
    with pytest.raises(RangeError, match="NaN"):
        plan.encode(torch.full((1, 3, 8, 8), float("nan")))
    with pytest.raises(RangeError, match="reaches 1e"):
        plan.encode(torch.full((1, 3, 8, 8), 1e5))
    x = torch.randn(2, 3, 8, 8)
    integers = plan.encode(x)
    assert integers.shape == (2, 8, 8, 3)
    bits = plan.input.frac_bits
    back = torch.from_numpy(integers / 2.0**bits).permute(0, 3, 1, 2)
    assert float((back - x).abs().max()) <= 2.0 ** -(bits + 1)


def test_weights_must_be_this_network_s(small):
    plan, how = small.plan, small.report.weights
    with pytest.raises(PlanError, match="expects weights"):
        quantise(plan, how, {})
    net = Residual().eval().requires_grad_(False)
    parameters = parameters_of(espn.convert(net, torch.zeros(1, 3, 8, 8)))
    other = quantise(plan, how, parameters)
    assert other.digest != small.weights.digest
    name = how[0].parameter
    parameters[name] = np.full_like(parameters[name], np.nan)
    with pytest.raises(PlanError, match="NaN"):
        quantise(plan, how, parameters)


def test_effects_are_what_errors_of_a_result_do_to_the_output():
    """One output, so no sign is left to chance: sums over the images, by hand."""
    torch.manual_seed(1)
    first, ending = torch.nn.Linear(3, 5), torch.nn.Linear(5, 1)
    x = torch.randn(8, 3).double()
    with torch.no_grad():
        weight, bias = first.weight.double(), first.bias.double()
        z = torch.nn.functional.linear(x, weight, bias).numpy()
    net = torch.nn.Sequential(first, act(), ending)
    reader = Network(espn.convert(net, x.float()))
    Calibration(reader, x)
    (layer,) = [one for one in reader.layers.values() if one.activates]
    w = ending.weight.detach().double().numpy()[0]
    for n in range(9):
        wanted = (w**2 * z**n).sum(1).mean()
        # One element in ten thousand may lie anywhere in [-5, 5].
        wanted += 1e-4 * (w**2).sum() * (5**n / (n + 1) if n % 2 == 0 else 0)
        assert layer.effect.independent[0, n] == pytest.approx(
            wanted, rel=1e-4, abs=1e-6
        )
    sums = np.array([(w * z**k).sum(1) for k in range(5)])
    found = layer.effect.sums[:, 0].T
    assert np.abs(found @ found.T / 16 - sums @ sums.T / 8).max() < 1e-4
    elsewhere = layer.effect.elsewhere[0]
    assert elsewhere[0] == pytest.approx(1e-4 * (w**2).sum(), rel=1e-3)
    assert elsewhere[4] == pytest.approx(1e-4 * (w**2).sum() * 5**4 / 5, rel=1e-3)
    assert elsewhere[3] == 0
    assert layer.effect.rounding == pytest.approx((w**2).sum(), rel=1e-3)
    slope = np.array([0.5, -2.0])
    error = 0.5 - 2.0 * z
    pairs = layer.effect.of_pairs(2)[0]
    assert slope @ pairs @ slope == pytest.approx(
        ((w * error).sum(1) ** 2).mean(), rel=1e-2
    )
    reader = Network(espn.convert(net, x.float()))
    Calibration(reader, x[:1])  # a batch is one draw of signs for all of its images
    (after,) = [one for one in reader.layers.values() if one.inputs == [layer.name]]
    y = QUARTIC(torch.from_numpy(z[0])).numpy()
    assert after.weight_effect == pytest.approx((y**2).sum(), rel=1e-4)


def test_a_plan_from_inputs_that_are_all_zero_still_keeps_bits():
    """Nothing is learnt from them; powers of x must not lose their bits."""
    torch.manual_seed(3)
    net = network(torch.nn.Linear(6, 8, bias=False), act(), torch.nn.Linear(8, 4))
    model = planned(net, torch.zeros(2, 6))
    x = torch.rand(16, 6) - 0.5
    assert (logits(model, x) - net(x)).abs().max() < 0.01
    torch.nn.init.zeros_(net[2].weight)  # no output depends on the activation
    model = planned(net, torch.randn(2, 6))
    assert model.plan.steps[0].activation.frac_bits >= 8
    # Two linear layers: the rescaling between them keeps its scale.
    net = network(torch.nn.Linear(6, 8, bias=False), torch.nn.Linear(8, 4))
    (step,) = planned(net, torch.zeros(2, 6), precision=52).plan.steps
    assert step.activation.linear is not None
    kept = step.frac_bits - step.activation.linear.shift
    exact = 2 ** (step.activation.value_frac_bits - kept)
    assert step.activation.linear.coefficient == (exact,)


def test_a_network_without_weights_or_activations_has_a_plan():
    model = planned(network(torch.nn.AvgPool2d(2)), torch.randn(2, 3, 4, 4))
    assert model.plan.steps == () and model.plan.weights == ()
    assert all(isinstance(node, Read) for node in model.plan.output.root.inputs)
    x = torch.randn(3, 3, 4, 4)
    pooled = torch.nn.functional.avg_pool2d(x, 2)
    assert float((logits(model, x) - pooled).abs().max()) < 1e-4


def logit_error(net: torch.nn.Module, private: espn.PrivateNetwork, ring: int) -> float:
    """Root mean square error of a bundled network's logits, coins at random."""
    sample = fashion_sample()
    x = sample.normalization(sample.images[:8])
    model = masked_model(private, x[:4], precision=ring)
    roundings = coins(model.plan, ring)
    found, _ = evaluate(model.plan, model.weights, x, roundings=roundings)
    with torch.no_grad():
        return float((found - net(x)).square().mean().sqrt())


@pytest.mark.slow
def test_bits_are_split_where_the_output_moves_least():
    """Degree 4 gains with every ring; degree 6, whose top power fills it, does not."""
    sample = fashion_sample()
    example = sample.normalization(sample.images[:1])
    errors = {}
    for name, rings in (("resnet", (24, 32, 40)), ("minionn", (32, 40))):
        net = load_network(BUNDLED / f"fashion_{name}_poly.safetensors").eval()
        private = espn.convert(net, example)
        for ring in rings:
            errors[name, ring] = logit_error(net, private, ring)
    assert errors["resnet", 24] < 0.08
    assert errors["resnet", 32] < 0.006 and errors["resnet", 40] < 0.002
    assert errors["minionn", 32] < 0.015 and errors["minionn", 40] < 0.015
