"""Escapes from intervals, on images and on corruptions of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from crypten_espn.errors import RangeError
from crypten_espn.pillar.activation import PolynomialActivation
from crypten_espn.pillar.escapes import Escapes
from crypten_espn.pillar.stress import BEYOND, CLEAN, corruptions, reaches, stress
from crypten_espn.polynomial import ChannelPolynomials, Polynomial


def square(low, high):
    return Polynomial((0, 0, 1), 0, (low, high))


def images(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(2)) * 2 - 1


def test_distances_are_counted_in_each_channels_own_radii():
    rows = ChannelPolynomials((square(-2.0, 2.0), square(0.0, 1.0)))
    model = nn.Sequential(PolynomialActivation(rows))
    x = torch.tensor([[1.0, 0.5], [3.0, 0.75], [-1.0, -1.0], [torch.nan, 0.5]])
    reach, bad, (layer,) = reaches(model, x)
    assert reach.tolist() == [0.5, 1.5, 3.0, torch.inf]
    assert bad.tolist() == [False, False, False, True]
    assert (layer.values, layer.outside, layer.finite) == (8, 3, False)
    assert layer.largest == torch.inf


def test_layers_and_calls_are_taken_together_and_hooks_go():
    act = PolynomialActivation(square(-1.0, 1.0))
    model = nn.Sequential(act, PolynomialActivation(square(-0.5, 0.5))).train()
    with Escapes.of(model) as seen, torch.no_grad():
        model(torch.tensor([[0.5], [0.9]]))
        assert seen.take().tolist() == pytest.approx([0.5, 0.81 / 0.5])
        model(torch.tensor([[2.0]]))
    assert [x.outside for x in seen.layers.values()] == [1, 2]
    assert not act._forward_pre_hooks
    reaches(model, torch.zeros(2, 1))
    assert model.training


@pytest.mark.parametrize("shape", [(6, 3), (6, 2, 12), (6, 2, 8, 8)])
def test_corruptions_keep_shape_and_levels(shape):
    x = images(*shape)
    found = corruptions(x)
    low, high = (f(x.transpose(0, 1).flatten(1), 1) for f in (torch.amin, torch.amax))
    for name, made in found.items():
        assert made.shape[1:] == x.shape[1:] and torch.isfinite(made).all()
        flat = made.transpose(0, 1).flatten(1)
        inside = (flat.amin(1) >= low).all() and (flat.amax(1) <= high).all()
        assert inside != name.startswith(BEYOND), name
        assert (name == CLEAN) == torch.equal(made, x)
    assert ("blur" in found) == (len(shape) > 2)
    again = corruptions(x)
    assert all(torch.equal(made, again[name]) for name, made in found.items())
    other = corruptions(x, seed=1)["salt and pepper 20 %"]
    assert not torch.equal(other, found["salt and pepper 20 %"])


def test_corruptions_are_what_they_are_called():
    x = images(4, 1, 8, 8)
    low, high = float(x.min()), float(x.max())
    found = corruptions(x)
    torch.testing.assert_close(found["inversion"], low + high - x)
    assert torch.equal(found["shift"][..., 2:], x[..., :-2])
    assert (found["shift"][..., :2] == low).all()
    board = found["checkerboard 4"][0, 0]
    assert (board[:4, :4] == low).all() and (board[:4, 4:] == high).all()
    assert (board[4:, 4:] == low).all()
    assert len(found["flat, middle"].unique()) == 1
    mean = x.flatten(1).mean(1).view(-1, 1, 1, 1)
    torch.testing.assert_close(found[BEYOND + "contrast x3"], 3 * x - 2 * mean)
    salted = (found["salt and pepper 5 %"] != x).float().mean()
    assert 0.01 < float(salted) < 0.1
    torch.testing.assert_close(found["blur"][0, 0, 3, 3], x[0, 0, 1:6, 1:6].mean())


def test_a_report_names_what_escapes_and_where():
    model = nn.Sequential(
        PolynomialActivation(square(-1.0, 1.0)), PolynomialActivation(square(-9.0, 9.0))
    )
    report = stress(model, images(5, 2, 8, 8))
    rows = {row.corruption: row for row in report.rows}
    assert (rows[CLEAN].escaping, rows["inversion"].escaping) == (0, 0)
    worst = rows[BEYOND + "contrast x3"]
    assert worst.escaping == 5 and worst.layer == "0" and 2 < worst.reach < 4
    assert not report.safe and "InputGuard" in report.verdict
    assert "contrast x3" in str(report) and "0 of" in str(report)
    tame = nn.Sequential(PolynomialActivation(square(-50.0, 50.0)))
    assert stress(tame, images(5, 2, 8, 8)).safe


def test_what_is_not_finite_is_counted():
    model = nn.Sequential(
        *[PolynomialActivation(Polynomial((0,) * 10 + (1,), 0, (-1.0, 1.0)))] * 3
    )
    report = stress(model, images(3, 1, 8, 8))
    assert max(row.not_finite for row in report.rows) > 0
    assert "not finite" in report.verdict


def test_networks_without_polynomials_and_bad_images_are_refused():
    with pytest.raises(RangeError, match="no polynomial activation"):
        stress(nn.Sequential(nn.ReLU()), images(2, 1, 4, 4))
    with pytest.raises(RangeError, match="NaN"):
        stress(nn.Sequential(nn.ReLU()), images(2, 1, 4, 4) * torch.nan)
