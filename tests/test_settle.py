"""Intervals widened to what a trained network sees, its results left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from crypten_espn.errors import RangeError
from crypten_espn.pillar.activation import PolynomialActivation
from crypten_espn.pillar.calibrate import calibrate
from crypten_espn.pillar.guard import guard_of
from crypten_espn.pillar.networks import fashion_resnet
from crypten_espn.pillar.settle import settle_intervals
from crypten_espn.pillar.storage import load_network, save_network
from crypten_espn.pillar.stress import corruptions, reaches, sample
from crypten_espn.pillar.surgery import activations, replace_activations
from crypten_espn.polynomial import ChannelPolynomials, Polynomial


def images(*shape):
    x = torch.rand(
        *(shape or (40, 2, 6, 6)), generator=torch.Generator().manual_seed(1)
    )
    return (2 * x - 1).clamp(-0.8, 0.8)


def square(low, high, exponent=0):
    return Polynomial((0, 1, 1), 3, (low, high), exponent=exponent)


def intervals(model):
    return {
        n: [r.interval for r in m.polynomial.rows]
        for n, m in activations(model).items()
    }


def without_intervals(model):
    return {
        n: [(r.numerators, r.frac_bits, r.exponent) for r in m.polynomial.rows]
        for n, m in activations(model).items()
    }


def test_each_interval_grows_about_its_middle_and_only_where_it_must():
    rows = ChannelPolynomials((square(-4.0, 4.0), square(-0.5, 0.5, 2)))
    model = nn.Sequential(PolynomialActivation(rows)).train()
    settled = settle_intervals(model, images())
    wide, grown = intervals(settled)["0"]
    assert wide == (-4.0, 4.0)
    assert grown == pytest.approx((-1.2, 1.2))  # 1.5 x 0.8
    assert without_intervals(settled) == without_intervals(model)
    assert model.training and model[0].polynomial == rows and not settled.training
    shared = nn.Sequential(PolynomialActivation(square(-0.2, 0.8)))
    # The middle is 0.3, and -0.8 is 1.1 away from it.
    (found,) = intervals(settle_intervals(shared, images()))["0"]
    assert found == pytest.approx((0.3 - 1.65, 0.3 + 1.65))


def test_a_trained_network_settles_and_computes_the_same(tmp_path: Path) -> None:
    torch.manual_seed(3)
    trained = fashion_resnet(classes=3, in_channels=2, size=9).eval()
    with torch.no_grad():
        x = images(30, 2, 9, 9)
        network = calibrate(trained, x, degree=4)
        network.get_parameter("conv1.weight").mul_(1.5)
        settled = settle_intervals(network, x)
        assert intervals(settled) != intervals(network)
        assert without_intervals(settled) == without_intervals(network)
        assert torch.equal(settled(x), network(x))
    guard = guard_of(settled)
    assert guard is not None and not guard.refused(x).any()
    made = torch.cat(list(sample(x).values()))
    reach, _, _ = reaches(settled, made)
    assert (reach[~guard.refused(made)] <= 0.9).all() and (reach > 1.0).any()
    save_network(settled, tmp_path / "x.safetensors")
    loaded = load_network(tmp_path / "x.safetensors")
    assert intervals(loaded) == intervals(settled) and guard_of(loaded) == guard
    again = settle_intervals(loaded, x)
    assert intervals(again) == intervals(settled) and guard_of(again) == guard


def test_what_goes_far_beyond_is_left_to_the_guard():
    x = images(40, 1, 8, 8) * 0.1 + 0.1
    x[..., 0, 0] = 0.0
    x[..., 0, 1] = 1.0

    class Energy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = PolynomialActivation(square(-0.05, 0.05))

        def forward(self, x):
            return self.act(x.square().flatten(1).mean(1, keepdim=True))

    settled = settle_intervals(Energy(), x)
    ((_, high),) = intervals(settled)["act"]
    assert high <= 1.5 * 1.5 * 0.05
    guard = guard_of(settled)
    assert guard is not None
    bright = corruptions(x)["brightness +50 %"]
    assert guard.refused(bright).all() and not guard.refused(x).any()


def test_what_cannot_be_settled_is_named():
    with pytest.raises(RangeError, match="no polynomial activation"):
        settle_intervals(nn.Sequential(nn.ReLU()), images())
    steep = nn.Sequential(
        *[PolynomialActivation(Polynomial((0,) * 10 + (9,), 0, (-1.0, 1.0)))] * 9
    )
    with pytest.raises(RangeError, match="0 gets values that are not finite"):
        settle_intervals(steep, images() * 3)


def test_an_activation_of_several_places_has_one_interval_for_all():
    act = PolynomialActivation(square(-0.1, 0.1))
    model = nn.Sequential(act, nn.Flatten(), nn.Linear(72, 3), act)
    (found,) = intervals(settle_intervals(model, images()))["0"]
    assert found[1] >= 1.0
    assert isinstance(model[0].polynomial, Polynomial)


def test_training_continues_with_the_settled_network():
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 4), nn.ReLU(), nn.Linear(4, 2))
    replace_activations(model, {nn.ReLU: Polynomial((0, 1, 1), 2, (-0.1, 0.1))})
    settled = settle_intervals(model, images()).train()
    settled(images()).square().mean().backward()
    assert all(p.grad is not None for p in settled.parameters())
