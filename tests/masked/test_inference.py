"""The online phase: bit-exact, declared messages and bytes, uniform openings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import crypten_espn as espn
from crypten_espn.errors import MaterialError, ShapeError
from crypten_espn.masked.drivers import together
from crypten_espn.masked.evaluation import chunks
from crypten_espn.masked.inference import client, message_sizes, online_bytes, server
from crypten_espn.masked.messages import CLIENT, SERVER
from crypten_espn.masked.plan import Plan
from crypten_espn.masked.planning.network import parameters_of
from crypten_espn.masked.reference import evaluate

from . import oracle
from .cases import (
    QUARTIC,
    Pair,
    gated,
    layers,
    message_count,
    planned,
    pooled,
    residual,
    without_noise,
)


def network(*layers):
    return torch.nn.Sequential(*layers).eval().requires_grad_(False)


def act(polynomial=QUARTIC):
    return espn.PolynomialActivation(polynomial)


def images(count, example, seed=5):
    toss = torch.Generator().manual_seed(seed)
    return torch.randn(count, *example.shape[1:], generator=toss).clamp(-2, 2)


def check_bit_exact(model, x, *, index=0, corrections=SERVER):
    """The pair's integers are the reference's, given the parties' own coins."""
    pair = Pair(without_noise(model), corrections=corrections)
    z, transcript = pair.infer(x, index=index)
    _, trace = evaluate(
        pair.plan, model.weights, x, roundings=pair.roundings(index, len(x))
    )
    assert np.array_equal(z, trace[-1])
    return z, transcript


@pytest.mark.parametrize(
    "precision, batch",
    [("fast", 1), ("fast", 9), ("high", 5), (26, 33), (44, 1), (52, 9)],
)
@pytest.mark.parametrize("made", [residual, layers])
def test_results_are_the_references_bit_for_bit(made, precision, batch):
    network, example = made()
    model = planned(network, example, precision=precision)
    x = images(batch, example)
    z, _ = check_bit_exact(model, x, index=batch)
    error = (model.plan.decode(z) - network(x)).abs().max()
    assert float(error) < {26: 0.3, "fast": 0.02}.get(precision, 0.002)


@pytest.mark.parametrize("batch, side", [(1, 9), (5, 6)])
@pytest.mark.parametrize("precision, fast", [(30, 2), ("fast", 0)])
def test_fast_convolutions_are_the_references_bit_for_bit(precision, fast, side, batch):
    """Where rings have at most 30 bits; the reference's convolutions are direct."""
    toss = torch.Generator().manual_seed(3)
    net = network(
        torch.nn.Conv2d(2, 32, 3, padding=1), act(),
        torch.nn.Conv2d(32, 32, 3, padding=1), act(),
        torch.nn.Conv2d(32, 64, 3, padding=(2, 1)), act(),
        torch.nn.Conv2d(64, 32, 3, stride=2), act(),
        torch.nn.Flatten(),
        torch.nn.Linear(32 * ((side + 1) // 2) * ((side - 1) // 2), 4),
    )  # fmt: skip
    example = torch.randn(8, 2, side, side, generator=toss).clamp(-2, 2)
    model = planned(net, example, precision=precision)
    assert sum(shape.fast for shape in model.plan.weights) == fast
    for shape, filters in zip(model.plan.weights, model.weights.filters, strict=True):
        # With weights of 16 bits in halves, two phases, it is half.
        share = 2 if len(filters.phases) == 2 else 1
        assert filters.packed.nbytes * share == shape.filter_bytes
    x = images(batch, example)
    z, _ = check_bit_exact(model, x, index=1)
    assert float((model.plan.decode(z) - net(x)).abs().max()) < 0.1


@pytest.mark.parametrize(
    "precision, batch, corrections",
    [("fast", 1, SERVER), ("fast", 9, CLIENT), ("compact", 3, SERVER), (52, 2, CLIENT)],
)
def test_pooled_activations_are_the_references_bit_for_bit(
    precision, batch, corrections
):
    """Windows of several shapes, one read twice; polynomials of every channel's own."""
    network, example = pooled()
    model = planned(network, example, precision=precision)
    pools = [step.activation.pool for step in model.plan.steps]
    assert pools == [(2, 2), (1, 3), None, (2, 2)]
    z, transcript = check_bit_exact(
        model, images(batch, example), index=5, corrections=corrections
    )
    error = (model.plan.decode(z) - network(images(batch, example))).abs().max()
    assert float(error) < {52: 0.002}.get(precision, 0.05)
    sizes = [(sender, size) for sender, _, size in transcript.messages]
    assert sorted(sizes) == sorted(message_sizes(model.plan, batch=batch))


@pytest.mark.parametrize("batch", [1, 9])
@pytest.mark.parametrize("made", [residual, layers, gated])
def test_corrections_to_the_client_are_as_exact(made, batch):
    network, example = made()
    model = planned(network, example)
    x = images(batch, example)
    z, transcript = check_bit_exact(model, x, index=3, corrections=CLIENT)
    error = (model.plan.decode(z) - network(x)).abs().max()
    assert float(error) < 0.02
    # Online nothing tells the choice.
    _, usual = check_bit_exact(model, x)
    assert transcript.messages == usual.messages


@pytest.mark.parametrize("mine, theirs", [(SERVER, CLIENT), (CLIENT, SERVER)])
def test_material_of_the_other_choice_ends_in_an_error_on_both_sides(mine, theirs):
    net, example = residual()
    model = planned(net, example)
    pairs = [Pair(model, corrections=to) for to in (mine, theirs)]
    ours, _, _ = pairs[0].prepare(0, 1)
    _, other, _ = pairs[1].prepare(0, 1)
    with pytest.raises(MaterialError, match="another inference"):
        together(
            {
                "server": server(model.plan, model.weights, ours),
                "client": client(model.plan, other, model.plan.encode(example[:1])),
            }
        )


POLYNOMIALS = {
    "degree 1": (322, 512),
    "degree 2": (10, 512, 90),
    "degree 3, no constant": (0, 500, 0, -9),
    "degree 4, even": (322, 0, 160, 0, -3),
    "degree 4, no linear term": (322, 0, 160, 5, -3),
    "degree 5": (7, 400, 60, -9, 0, 1),
    "degree 6, even": (322, 0, 160, 0, -8, 0, 1),
    "degree 7, odd": (0, 512, 0, -40, 0, 5, 0, -1),
    "degree 8": (7, 400, 60, -9, 3, 1, -1, 1, 1),
    "the square alone": (0, 0, 256),
}


@pytest.mark.parametrize("name", POLYNOMIALS)
def test_polynomials_of_every_shape_are_bit_exact(name):
    torch.manual_seed(3)
    polynomial = espn.Polynomial(POLYNOMIALS[name], 10, (-2.0, 2.0))
    net = network(torch.nn.Linear(6, 7), act(polynomial), torch.nn.Linear(7, 3))
    example = torch.randn(8, 6)
    for precision, batch in [("fast", 5), ("high", 33), (52, 1)]:
        model = planned(net, example, precision=precision)
        x = images(batch, example)
        z, _ = check_bit_exact(model, x)
        error = float((model.plan.decode(z) - net(x)).abs().max())
        assert error < (0.05 if precision == "fast" else 0.01), (precision, error)


def test_the_reference_is_what_python_integers_give():
    net, example = layers(6, 5)
    private = espn.convert(net, example[:1])
    model = planned(net, example)
    x = images(2, example)
    _, trace = evaluate(model.plan, model.weights, x)
    integers = model.plan.encode(x).transpose(0, 3, 1, 2)
    for image, found in zip(integers, trace[-1], strict=True):
        expected = oracle.logits(model, parameters_of(private), image.tolist())
        assert found.tolist() == [expected[i,] for i in range(3)]


def test_the_servers_noise_stays_below_its_bound():
    net, example = residual()
    model = planned(net, example)
    bits = model.plan.output.noise_bits
    pair = Pair(model)
    x = images(33, example)
    z, _ = pair.infer(x)
    _, trace = evaluate(
        pair.plan, model.weights, x, roundings=pair.roundings(0, len(x))
    )
    noise = z - trace[-1]
    assert bits > 0 and noise.size == 165
    assert noise.min() >= -(1 << (bits - 1)) and noise.max() < 1 << (bits - 1)
    # Of 165 draws, less than one in 2**40 leaves half of the range empty.
    assert noise.max() - noise.min() > 1 << (bits - 1)


@pytest.mark.parametrize("precision", ["fast", 26, 44])
def test_roundings_are_unbiased(precision):
    """Many inputs, each logit a sum of activations: what errs one way adds up."""
    torch.manual_seed(3)
    net = network(torch.nn.Linear(6, 16), act(), torch.nn.Linear(16, 1))
    torch.nn.init.ones_(net[2].weight)
    example = torch.randn(64, 6)
    model = without_noise(planned(net, example, precision=precision))
    x = images(1500, example)
    z, _ = Pair(model).infer(x)
    _, nearest = evaluate(model.plan, model.weights, x)
    error = (z - nearest[-1]).astype(np.float64)
    deviation = error.std() / np.sqrt(error.size)
    assert error.std() > 0
    assert abs(error.mean()) < 4 * deviation


def test_messages_and_bytes_are_as_declared():
    net, example = residual()
    model = planned(net, example)
    pair = Pair(model)
    assert sum(size for *_, size in pair.opening.messages) == pair.plan.weight_bytes
    assert {sender for sender, *_ in pair.opening.messages} == {"server"}
    for index, batch in enumerate([1, 7, 8, 33]):
        _, transcript = pair.infer(images(batch, example), index=index)
        declared = message_sizes(pair.plan, batch=batch)
        sent = [(sender, size) for sender, _, size in transcript.messages]
        for party in ("server", "client"):
            assert [m for m in sent if m[0] == party] == [
                m for m in declared if m[0] == party
            ]
        assert len(sent) == len(declared) == message_count(pair.plan, batch)
        assert online_bytes(pair.plan, batch=batch) == tuple(
            sum(size for sender, size in sent if sender == party)
            for party in ("server", "client")
        )
        if batch == 1:
            assert sent == declared and len(sent) == pair.plan.messages


class Zoo(torch.nn.Module):
    """A random network of every linear layer the planner knows."""

    def __init__(self, draw, polynomial):
        super().__init__()
        self.steps = torch.nn.ModuleList()
        self.kinds: list[str] = []
        channels = 3

        def step(kind, module):
            self.kinds.append(kind)
            self.steps.append(module)

        for _ in range(draw(st.integers(1, 3))):
            kind = draw(
                st.sampled_from(
                    ["plain", "depthwise", "grouped", "residual", "concat", "pool",
                     "two", "pad"]
                )
            )  # fmt: skip
            if kind == "plain":
                filters = draw(st.integers(1, 9))
                step("apply", torch.nn.Conv2d(
                    channels, filters, draw(st.sampled_from([1, 3])),
                    stride=draw(st.integers(1, 2)), padding=draw(st.integers(0, 1)),
                    dilation=draw(st.integers(1, 2)), bias=draw(st.booleans()),
                ) if draw(st.booleans()) else torch.nn.Conv2d(
                    channels, filters, (1, 3), padding=(0, 1), stride=(2, 1)
                ))  # fmt: skip
                channels = filters
            elif kind == "depthwise":
                step("apply", torch.nn.Conv2d(
                    channels, channels, 3, padding=1, groups=channels
                ))  # fmt: skip
            elif kind == "grouped":
                step("apply", torch.nn.Conv2d(channels, 4, 1))
                step("apply", act(polynomial))
                step("apply", torch.nn.Conv2d(4, 6, 3, padding=1, groups=2))
                channels = 6
            elif kind == "residual":
                step("add", torch.nn.Conv2d(channels, channels, 3, padding=1))
            elif kind == "concat":
                step("cat", torch.nn.Conv2d(channels, 2, 3, padding=1))
                channels += 2
            elif kind == "pool":
                step("apply", torch.nn.AvgPool2d(
                    draw(st.integers(2, 3)), stride=draw(st.integers(1, 2)),
                    padding=draw(st.integers(0, 1)),
                ))  # fmt: skip
            elif kind == "two":  # weights that meet without an activation between
                step("apply", torch.nn.Conv2d(channels, 3, 1))
                step("apply", torch.nn.Conv2d(3, 4, 3, padding=1))
                channels = 4
            else:
                step("apply", torch.nn.ZeroPad2d((1, 0, 2, 1)))
            if draw(st.booleans()):
                step("apply", act(polynomial))
        self.head = torch.nn.LazyLinear(3)

    def forward(self, x):
        for kind, module in zip(self.kinds, self.steps, strict=True):
            y = module(x)
            if kind == "add":
                y = y + x
            elif kind == "cat":
                y = torch.cat([x, y], 1)
            x = y
        return self.head(torch.flatten(x, 1))


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), seed=st.integers(0, 2**20))
def test_random_networks_are_bit_exact_and_close_to_plaintext(data, seed):
    torch.manual_seed(seed)
    polynomial = data.draw(
        st.sampled_from(
            [QUARTIC, espn.Polynomial((10, 512, 90), 10, (-5.0, 5.0)),
             espn.Polynomial((0, 500, 0, -9), 10, (-5.0, 5.0)),
             espn.Polynomial((300, 512, 150, 4, -3, -1, 0, 0), 12, (-3.0, 3.0))]
        )
    )  # fmt: skip
    net = Zoo(data.draw, polynomial)
    example = torch.randn(3, 3, 10, 10)
    net(example)
    net.eval().requires_grad_(False)
    batch = data.draw(st.integers(1, 3))
    precision = data.draw(st.sampled_from(["fast", "high", 37]))
    model = planned(net, example, precision=precision)
    assert Plan.from_json(model.plan.to_json()).digest == model.plan.digest
    x = example[:batch]
    z, _ = check_bit_exact(model, x)
    expected = net(x)
    size = max(1.0, float(expected.abs().max()))
    error = float((model.plan.decode(z) - expected).abs().max())
    assert error < (0.03 if precision == "fast" else 0.01) * size


def assert_uniform(values, bits):
    """Chi-square of the top and the bottom byte, 255 degrees of freedom each."""
    values = values.astype(np.int64)
    for shift in (0, bits - 8):
        counts = np.bincount((values >> shift) & 255, minlength=256)
        chi = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
        assert 150 < chi < 400, (shift, chi)


@pytest.mark.parametrize("corrections", [SERVER, CLIENT])
def test_every_opened_value_is_uniform(corrections):
    """One constant input, many inferences: what crosses the wire looks like noise."""
    net, example = residual()
    pair = Pair(planned(net, example), seed=bytes(range(16)), corrections=corrections)
    batch = 64
    _, transcript = pair.infer(torch.ones(batch, 3, 8, 8), keep=True)
    pieces = len(chunks(batch))
    mine = [send for who, send in transcript.sends if who == "server"][:-1]
    theirs = [send for who, send in transcript.sends if who == "client"]
    layers = [[theirs[0]]]
    for sends in (mine, theirs[1:]):
        assert len(sends) == pieces * len(pair.plan.steps)
        layers += [sends[a : a + pieces] for a in range(0, len(sends), pieces)]
    for layer in layers:
        for part in zip(*(send.parts for send in layer), strict=True):
            values = np.concatenate([array.reshape(-1) for array, _ in part])
            assert_uniform(values, part[0][1])


def test_two_inferences_of_one_input_share_no_opening():
    net, example = residual()
    pair = Pair(planned(net, example))
    seen = set()
    for index in (0, 2):
        _, transcript = pair.infer(example[:1], index=index, keep=True)
        for _, send in transcript.sends:
            seen |= {array.tobytes() for array, _ in send.parts}
    steps = [step.activation.masks + 1 for step in pair.plan.steps]
    assert len(seen) == 2 * (1 + sum(steps) + 1)


@pytest.mark.parametrize("batch", [1, 7, 8, 11, 32, 33])
def test_chunks_cover_a_batch_in_order(batch):
    parts = chunks(batch)
    assert [i for part in parts for i in range(batch)[part]] == list(range(batch))
    sizes = [part.stop - part.start for part in parts]
    assert len(parts) == 1 if batch < 8 else max(sizes) <= 4 <= len(parts)


def test_truncation_never_errs_by_more_than_one_unit():
    """Every opening of many inferences: floor or floor plus one, nothing else."""
    net, example = residual()
    pair = Pair(planned(net, example))
    x = images(16, example)
    coins = pair.roundings(0, len(x))
    pair.prepare(0, len(x))
    _, trace = evaluate(pair.plan, pair.model.weights, x, roundings=coins)
    checked = 0
    for number, (step, z) in enumerate(zip(pair.plan.steps, trace, strict=False)):
        masks = coins(number, z).first
        for group, r in zip(step.activation.groups, masks, strict=True):
            low = r & ((1 << group.shift) - 1)
            difference = ((z + low) >> group.shift) - (z >> group.shift)
            assert set(np.unique(difference)) <= {0, 1}
            checked += z.size
    assert checked > 10_000


def test_wrong_batch_is_refused_before_anything_is_sent():
    net, example = residual()
    pair = Pair(planned(net, example))
    _, theirs, _ = pair.prepare(0, 1)
    with pytest.raises(ShapeError, match="batches of 1"):
        client(pair.plan, theirs, pair.plan.encode(example[:2])).send(None)


def test_material_of_another_inference_ends_in_an_error_on_both_sides():
    net, example = residual()
    model = planned(net, example)
    pair = Pair(model)
    first, second = pair.prepare(0, 1), pair.prepare(1, 1)
    with pytest.raises(MaterialError, match="another inference"):
        together(
            {
                "server": server(pair.plan, model.weights, first[0]),
                "client": client(pair.plan, second[1], pair.plan.encode(example[:1])),
            }
        )


def test_logits_reach_the_client_alone():
    """What the server sends last is a share: without the client's it says nothing."""
    net, example = residual()
    pair = Pair(planned(net, example))
    ours, theirs, _ = pair.prepare(0, 1)
    mine = theirs.output.copy()
    values, transcript = together(
        {
            "server": server(pair.plan, pair.model.weights, ours),
            "client": client(pair.plan, theirs, pair.plan.encode(example[:1])),
        },
        keep=True,
    )
    last = transcript.sends[-1][1].parts[0][0]
    real, expected = pair.plan.decode(values["client"]), net(example[:1])
    assert float((real - expected).abs().max()) < 0.02
    assert np.array_equal(last + mine, values["client"])
    assert float((pair.plan.decode(last) - expected).abs().max()) > 0.1
    assert values["server"] is None
