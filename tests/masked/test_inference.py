"""The online phase: bit-exact, declared messages and bytes, uniform openings."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import crypten_espn as espn
from crypten_espn.errors import PeerError, ShapeError
from crypten_espn.masked import online, plan

from .masked_cases import QUARTIC, Pair, centred, planned, residual


@pytest.fixture(scope="module", params=["owner", "shared"])
def pair(request):
    model, example = residual()
    chosen, weights = planned(model, example, mode=request.param)
    made = Pair(chosen, weights)
    made.model = model
    yield made
    made.close()


def test_result_is_bit_exact_and_close_to_plaintext(pair):
    torch.manual_seed(5)
    for index in range(4):
        x = torch.randn(1, 3, 8, 8)
        z = pair.online(pair.prepare(index), x)
        _, trace = plan.simulate(
            pair.plan, pair.model_weights, x, masks=pair.masks(index)
        )
        assert np.array_equal(centred(z, pair.plan), trace[-1])
        got = pair.plan.decode(z)
        assert float((got - pair.model(x)).abs().max()) < 0.01


def test_messages_and_bytes_are_as_declared(pair):
    x = torch.zeros(1, 3, 8, 8)
    pair.online(pair.prepare(10), x)
    down, up = pair.channels
    sent = pair.plan.online_bytes()
    for channel, size in zip(pair.channels, sent, strict=True):
        assert channel.bytes_sent == size + 20 * channel.messages_sent
    if pair.plan.mode == "owner":
        assert down.messages_sent + up.messages_sent == pair.plan.messages
        sizes = online.message_sizes(pair.plan, batch=1)
        assert len(sizes) == pair.plan.messages
        assert sum(size for sender, size in sizes if sender == 0) == sent[0]
        assert sum(size for sender, size in sizes if sender == 1) == sent[1]
    else:
        activations = len(pair.plan.segments) - 1
        assert (down.messages_sent, up.messages_sent) == (
            2 * activations + 1,
            2 * activations + 1,
        )


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

        def act():
            return espn.PolynomialActivation(polynomial)

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
                    padding_mode="zeros",
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
                step("apply", act())
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
                step("apply", act())
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


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), seed=st.integers(0, 2**20))
def test_random_networks_equal_plaintext_in_both_modes(data, seed):
    torch.manual_seed(seed)
    polynomial = data.draw(
        st.sampled_from(
            [QUARTIC, espn.Polynomial((10, 512, 90), 10, (-5.0, 5.0)),
             espn.Polynomial((0, 500, 0, -9), 10, (-5.0, 5.0)),
             espn.Polynomial((300, 512, 150, 4, -3, -1, 0, 0), 12, (-3.0, 3.0))]
        )
    )  # fmt: skip
    model = Zoo(data.draw, polynomial)
    example = torch.randn(3, 3, 12, 12)
    model(example)
    model.eval().requires_grad_(False)
    batch = data.draw(st.integers(1, 3))
    mode = data.draw(st.sampled_from(["owner", "shared"]))
    precision = data.draw(st.sampled_from(["fast", "high", 37]))
    chosen, weights = planned(model, example, mode=mode, precision=precision)
    assert plan.Plan.from_json(chosen.to_json()).digest == chosen.digest
    pair = Pair(chosen, weights, batch=batch)
    try:
        x = example[:batch]
        z = pair.online(pair.prepare(0), x)
        logits, trace = plan.simulate(chosen, weights, x, masks=pair.masks(0))
        assert np.array_equal(centred(z, chosen), trace[-1])
        expected = model(x)
        size = max(1.0, float(expected.abs().max()))
        error = float((logits - expected).abs().max())
        assert error < (0.03 if precision == "fast" else 0.01) * size
    finally:
        pair.close()


def uniform(values, bits):
    """Chi-square of the top and the bottom byte, 255 degrees of freedom each."""
    for shift in (0, bits - 8):
        counts = np.bincount((values >> shift) & 255, minlength=256)
        chi = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
        assert 150 < chi < 400, (shift, chi)


def test_every_opened_value_is_uniform(monkeypatch):
    """One constant input, many inferences: what crosses the wire looks like noise."""
    model, example = residual()
    pair = Pair(*planned(model, example), batch=64, seed=bytes(range(16)))
    sent: dict[int, list] = {0: [], 1: []}
    for rank in (0, 1):
        channel = pair.channels[rank]
        original = channel.send

        def record(values, *, bits, tag=0, rank=rank, original=original):
            sent[rank].append((np.array(values), bits))
            original(values, bits=bits, tag=tag)

        monkeypatch.setattr(channel, "send", record)
    materials = pair.prepare(0)
    sent[1].clear()  # offline halves
    pair.online(materials, torch.ones(64, 3, 8, 8))
    parts = len(online.pieces(64))
    activations = len(pair.plan.segments) - 1
    masked = [sent[1].pop(0)]
    sent[0].pop()  # the logits
    for messages in (masked, sent[0], sent[1]):
        step = 1 if messages is masked else parts
        assert len(messages) == step * (1 if messages is masked else activations)
        for start in range(0, len(messages), step):
            layer = messages[start : start + step]
            flat = np.concatenate([values.reshape(-1) for values, _ in layer])
            flat, bits = flat.astype(np.int64), layer[0][1]
            uniform(flat if bits == 64 else flat & (2**bits - 1), bits)
    pair.close()


@pytest.mark.parametrize("batch", [1, 7, 8, 11, 32, 33])
def test_parts_cover_a_batch_in_order(batch):
    parts = online.pieces(batch)
    assert [i for part in parts for i in range(batch)[part]] == list(range(batch))
    sizes = [part.stop - part.start for part in parts]
    assert len(parts) == 1 if batch < 8 else max(sizes) <= 4 <= len(parts)


@pytest.mark.parametrize("precision", ["fast", 25])
def test_a_batch_in_parts_is_bit_exact_and_sends_what_is_declared(precision):
    model, example = residual()
    chosen, weights = planned(model, example, precision=precision)
    pair = Pair(chosen, weights, batch=11)
    x = torch.randn(11, 3, 8, 8)
    materials = pair.prepare(0)
    z = pair.online(materials, x)
    _, trace = plan.simulate(chosen, weights, x, masks=pair.masks(0))
    assert np.array_equal(centred(z, chosen), trace[-1])
    sizes = online.message_sizes(chosen, batch=11)
    for rank, channel in enumerate(pair.channels):
        mine = [size for sender, size in sizes if sender == rank]
        assert channel.messages_sent == len(mine)
        assert channel.bytes_sent == sum(mine) + 20 * len(mine)
    pair.close()


def test_truncation_never_errs_by_more_than_one_unit():
    """Every opening of many inferences: floor or floor plus one, nothing else."""
    model, example = residual()
    chosen, weights = planned(model, example)
    pair = Pair(chosen, weights, batch=16)
    x = torch.randn(16, 3, 8, 8)
    masks = pair.masks(0)
    _, trace = plan.simulate(chosen, weights, x, masks=masks)
    checked = 0
    for segment, z, (r, _) in zip(chosen.segments[:-1], trace, masks, strict=False):
        for group in segment.activation.groups:
            difference = plan.truncated(z, group.shift, r) - (z >> group.shift)
            assert difference.min() >= 0 and difference.max() <= 1
            checked += z.size
    assert checked > 10_000
    pair.close()


def test_wrong_batch_is_refused_before_anything_is_sent():
    model, example = residual()
    pair = Pair(*planned(model, example))
    materials = pair.prepare(0)
    up = pair.channels[1]
    up.reset_counters()
    with pytest.raises(ShapeError, match="batches of 1"):
        online.query_one(
            pair.plan, up, materials[1], pair.plan.encode(example[:2]), batch=1
        )
    assert up.bytes_sent == 0
    pair.close()


def test_parties_out_of_step_fail_instead_of_computing_nonsense():
    model, example = residual()
    pair = Pair(*planned(model, example))
    first, second = pair.prepare(0), pair.prepare(1)
    with pytest.raises(PeerError, match=r"out of step|Lost|closed"):
        pair.online([first[0], second[1]], example[:1])
    pair.close()


def test_logits_reach_rank_1_alone(pair):
    """What rank 0 sends last is a share: without rank 1's it says nothing."""
    x = torch.randn(1, 3, 8, 8)
    materials = pair.prepare(20)
    mine = materials[1].linear[-1].copy()
    z = pair.online(materials, x)
    real = pair.plan.decode(z)
    alone = pair.plan.decode(z - mine)
    assert math.isclose(float(real[0, 0]), float(pair.model(x)[0, 0]), abs_tol=0.02)
    assert float((alone - real).abs().max()) > 0.1
