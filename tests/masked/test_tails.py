"""Corrupted images in a plan: what escapes, what wraps, what is refused of it."""

from __future__ import annotations

import pytest
import torch

import crypten_espn as espn
from crypten_espn.masked.planning import masked_model
from crypten_espn.masked.planning.tails import IMAGES, tails
from crypten_espn.masked.reference import evaluate
from crypten_espn.pillar.stress import BEYOND, CLEAN, corruptions

# Steep outside its interval: at 3 radii it is far beyond every ring.
STEEP = espn.Polynomial((0, 0, 0, 0, 0, 0, 0, 0, 1), 0, (-1.0, 1.0))


class Line(torch.nn.Module):
    """z = x; its polynomial; a sum over the pixels."""

    def __init__(self, polynomial):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 1, 1, bias=False)
        torch.nn.init.ones_(self.conv.weight)
        self.act = espn.PolynomialActivation(polynomial)
        self.head = torch.nn.Linear(36, 2)

    def forward(self, x):
        return self.head(self.act(self.conv(x)).flatten(1))


def line(polynomial=STEEP):
    torch.manual_seed(0)
    return Line(polynomial).eval().requires_grad_(False)


def images(count=20):
    toss = torch.Generator().manual_seed(3)
    return (torch.rand(count, 1, 6, 6, generator=toss) * 2 - 1) * 0.9


def found(network, x, guard=None):
    private = espn.convert(network, x, guard=guard)
    model = masked_model(private)
    return tails(private, model, x), model


def test_escapes_and_wraps_are_counted_by_corruption_and_named():
    x = images()
    seen, _ = found(line(), x)
    rows = {row.corruption: row for row in seen.rows}
    given = corruptions(x[:IMAGES])
    assert list(rows) == list(given) and seen.images == IMAGES == rows[CLEAN].images
    for name, corrupted in given.items():
        # z is the input itself, the interval [-1, 1].
        reach = corrupted.abs().flatten(1).amax(1)
        assert rows[name].escaping == int((reach > 1).sum()), name
        assert rows[name].reach == pytest.approx(float(reach.max()))
        assert rows[name].layer == "act"
    wild = rows[BEYOND + "contrast x3"]
    assert (wild.escaping, wild.wrapping, wild.refused) == (16, 16, 0)
    assert wild.wraps_at in ("act", "output")
    assert rows[CLEAN].wrapping == rows[CLEAN].refused == 0
    assert not rows[CLEAN].wraps_at
    assert seen.silent >= 16 and "UNSAFE" in seen.verdict
    assert "input guard" in seen.verdict and "calibrate" in str(seen)


def test_what_is_said_to_wrap_is_wrong_and_what_is_not_is_right():
    x, network = images(), line()
    private = espn.convert(network, x)
    model = masked_model(private)
    for scale, wraps in ((1.0, False), (1.2, False), (4.0, True)):
        given = scale * x[:4]
        (row, *_) = tails(private, model, given).rows
        assert row.wrapping == (4 if wraps else 0)
        assert row.escaping == (0 if scale == 1 else 4)
        private_logits = evaluate(model.plan, model.weights, given)[0]
        off = (private_logits - network(given)).abs().amax(1)
        scale_of = network(given).abs().amax(1) + 1
        assert bool(((off > 0.1 * scale_of) == wraps).all())


def test_a_guard_makes_the_verdict_safe_and_is_counted():
    x = images()
    seen, _ = found(line(), x, guard=espn.InputGuard.fit(x))
    rows = {row.corruption: row for row in seen.rows}
    wild = rows[BEYOND + "contrast x3"]
    assert (wild.refused, wild.refused_escaping, wild.refused_wrapping) == (16, 16, 16)
    assert rows[CLEAN].refused == 0 and not wild.wraps_at
    assert seen.silent == 0 and seen.verdict.startswith("safe")
    text = str(seen).splitlines()
    assert len(text) == 3 and "in all" in text[1]


def test_what_is_not_finite_wraps_and_a_rescaling_has_no_interval():
    tower = torch.nn.Sequential(
        *[torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)],
        *[espn.PolynomialActivation(STEEP) for _ in range(3)],
    )
    for parameter in tower.parameters():
        torch.nn.init.constant_(parameter, 0.1)
    toss = torch.Generator().manual_seed(1)
    x = torch.rand(3, 4, generator=toss)
    seen, model = found(tower.requires_grad_(False), x)
    assert any("rescaled" in known.name for known in model.report.parts)
    (clean, *_) = seen.rows
    assert (clean.escaping, clean.wrapping) == (0, 0)
    private = espn.convert(tower, x)
    (huge, *_) = tails(private, model, 1e6 * x).rows
    assert huge.reach == torch.inf and huge.wrapping == 3
    # None of these is sent: they are beyond the plan's bound on inputs.
    assert huge.refused == huge.refused_wrapping == 3


def test_check_says_it_in_three_lines_for_two_inputs_or_more():
    network, x = line(), images()
    report = espn.check(network, x)
    assert report.masked is None and report.tails is not None
    assert report.tails.images == IMAGES
    assert str(report).endswith(str(report.tails)) and "UNSAFE" in str(report)
    espn.attach_guard(network, espn.InputGuard.fit(x))
    assert "tails: safe" in str(espn.check(network, x))
    wide = espn.InputGuard.fit(16 * x)
    assert "UNSAFE" in str(espn.check(network, x, guard=wide))
    alone = espn.check(network, x[:1])
    assert alone.tails is None and "stress: not run" in str(alone)


def test_check_does_not_stress_what_has_no_plan():
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU())
    report = espn.check(network, images())
    assert report.masked is not None and report.tails is None
    assert "stress" not in str(report)
