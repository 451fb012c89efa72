"""Penalties and the range report where each channel has its own interval."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from crypten_espn.errors import PolynomialError
from crypten_espn.pillar.penalty import boundary_penalty, range_penalty
from crypten_espn.pillar.ranges import FixedPoint, RangeReport, range_report
from crypten_espn.pillar.surgery import PolynomialActivation
from crypten_espn.polynomial import ChannelPolynomials, Polynomial

LINES = (
    Polynomial((0, 1024), 10, (-5.0, 5.0)),
    Polynomial((0, 1024), 10, (-0.5, 0.25)),
    Polynomial((0, 4096), 10, (-1.0, 3.0)),
)
POLYNOMIALS = ChannelPolynomials(LINES)
ENDS = torch.tensor([line.interval for line in LINES], dtype=torch.float64)


def gradient_of(penalty: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(penalty, x)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 5, 4), (2, 3, 12, 11)])
def test_gamma_is_relative_to_each_channels_radius(
    shape: tuple[int, ...], reduction: str, dtype: torch.dtype
) -> None:
    module = PolynomialActivation(POLYNOMIALS).train()
    radii = ENDS.abs().amax(1).view(-1, *(1,) * (len(shape) - 2))
    wide = (torch.randn(shape, dtype=torch.float64) * radii).requires_grad_()
    expected = getattr((wide / (4.5 * radii / 5)) ** 6, reduction)()
    x = wide.detach().to(dtype).requires_grad_()
    module(x)
    got = range_penalty(module, gamma=4.5, power=6, reduction=reduction)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        gradient_of(got, x).double(), gradient_of(expected, wide), rtol=1e-4, atol=1e-6
    )


def test_a_channel_of_radius_five_is_penalised_as_one_polynomial() -> None:
    x = 3 * torch.randn(8, 1, 4)
    penalties = []
    for polynomial in (LINES[0], ChannelPolynomials(LINES[:1])):
        module = PolynomialActivation(polynomial).train()
        module(x.clone().requires_grad_())
        penalties.append(range_penalty(module))
    assert penalties[0] == penalties[1] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 12, 11)])
def test_the_boundary_is_each_channels_own(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    module = PolynomialActivation(POLYNOMIALS).train()
    ones = (1,) * (len(shape) - 2)
    low, high = (ends.view(-1, *ones) for ends in ENDS.T)
    wide = (torch.randn(shape, dtype=torch.float64) * high).requires_grad_()
    t = (wide - (low + high) / 2).abs() / ((high - low) / 2)
    expected = ((t - 0.8).clamp(min=0) ** 2 / 0.2**2).sum()
    x = wide.detach().to(dtype).requires_grad_()
    module(x)
    got = boundary_penalty(module, margin=0.8)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(
        gradient_of(got, x).double(), gradient_of(expected, wide), rtol=1e-3, atol=1e-4
    )


def report(x: Tensor, *, most_outside: float = 0.01) -> RangeReport:
    return range_report(
        PolynomialActivation(POLYNOMIALS), x.split(2), most_outside=most_outside
    )


def test_one_channel_outside_is_not_hidden_by_the_others() -> None:
    x = torch.zeros(4, 3, 5, 5)
    x[:, 0] = 4.0
    x[0, 1, :, :] = -0.51  # inside of the others' intervals, outside of its own
    (layer,) = report(x).layers
    assert layer.channel == 1 and layer.outside == 0.25
    assert layer.largest == 4.0
    assert "has 25.00% of channel 1's inputs outside the interval" in report(x).verdict
    assert report(x, most_outside=0.25).unsafe is None


def test_headroom_is_of_each_channels_own_polynomial() -> None:
    x = torch.zeros(2, 3)
    x[0, 2] = 2.0  # reaches 4 * 2; elsewhere 4 and 0.25
    x[1, 0], x[1, 1] = 4.0, -0.25
    (layer,) = report(x).layers
    assert layer.headroom_bits == pytest.approx(62 - 35 - 3)
    form = FixedPoint(frac_bits=50, out_bits=50)
    activation = PolynomialActivation(POLYNOMIALS)
    (layer,) = range_report(activation, [x], fixed_point=form).layers
    assert layer.headroom_bits == pytest.approx(62 - 50 - 3)


def test_values_that_are_not_finite_are_found_in_any_channel() -> None:
    x = torch.zeros(2, 3, 4)
    x[1, 2, 3] = math.nan
    (layer,) = report(x).layers
    assert not layer.finite and layer.largest == 0 and layer.outside == 0


def test_a_report_of_other_channels_is_refused() -> None:
    model = nn.Sequential(PolynomialActivation(POLYNOMIALS))
    with pytest.raises(PolynomialError, match="polynomials of 3 channels"):
        range_report(model, [torch.zeros(2, 4)])
