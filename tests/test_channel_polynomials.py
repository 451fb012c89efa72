"""A polynomial a channel, and a polynomial whose unit is not 1."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crypten_espn.errors import PolynomialError
from crypten_espn.polynomial import (
    ChannelPolynomials,
    Polynomial,
    polynomial_from_json,
)

QUARTIC = Polynomial((322, 512, 160, 0, -3), 10, (-5.0, 5.0))


def scaled(exponent):
    return Polynomial(
        QUARTIC.numerators,
        10,
        (-5 * 2.0**exponent, 5 * 2.0**exponent),
        exponent=exponent,
    )


@pytest.mark.parametrize("exponent", [-12, -3, 0, 2, 9])
def test_a_unit_scales_input_and_result(exponent):
    p, unit = scaled(exponent), 2.0**exponent
    x = torch.linspace(-5, 5, 41, dtype=torch.float64) * unit
    torch.testing.assert_close(p(x), unit * QUARTIC(x / unit))
    slope = QUARTIC.derivative()(x / unit)
    torch.testing.assert_close(p.derivative()(x), slope)
    assert polynomial_from_json(p.to_json()) == p


@pytest.mark.parametrize("exponent", [-12, 0, 9])
@pytest.mark.parametrize("k", range(6))
def test_a_coefficient_is_its_float_exactly_and_0_above_the_degree(exponent, k):
    p = scaled(exponent)
    assert float(p.coefficient(k)) == ((*p.coeffs, 0.0)[k])


@pytest.mark.parametrize("exponent", [-6, 5])
def test_a_ring_form_knows_the_unit(exponent):
    p = scaled(exponent)
    form = p.ring_form(frac_bits=16, out_bits=40)
    x = torch.linspace(-5, 5, 99, dtype=torch.float64) * 2.0**exponent
    fixed = (x * 2**16).round().long()
    y = form.evaluate(fixed, form.reduce(fixed)).double() / 2.0**40
    off = (y - p(fixed.double() / 2**16)).abs().max()
    assert off <= form.error_bound < 1e-2 * max(1.0, 2.0**exponent)


@pytest.mark.parametrize("exponent", [41, -41, 1.0, True])
def test_an_exponent_that_is_none_is_refused(exponent):
    with pytest.raises(PolynomialError, match="exponent"):
        Polynomial((1, 2), 10, (-1.0, 1.0), exponent=exponent)


def three():
    return ChannelPolynomials((QUARTIC, scaled(-3), Polynomial((0, 1), 0, (-9, 9))))


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 3, 4, 5)])
def test_every_channel_has_its_own(shape):
    ps, x = three(), torch.randn(*shape, dtype=torch.float64)
    expected = torch.stack([p(x[:, c]) for c, p in enumerate(ps.rows)], dim=1)
    torch.testing.assert_close(ps(x), expected)
    slopes = torch.stack([p.derivative()(x[:, c]) for c, p in enumerate(ps.rows)], 1)
    torch.testing.assert_close(ps.derivative()(x), slopes)
    x.requires_grad_(True)
    (gradient,) = torch.autograd.grad(ps(x).sum(), x)
    torch.testing.assert_close(gradient, slopes)


def test_what_all_channels_say_together():
    ps = three()
    assert (ps.channels, ps.degree, ps.interval) == (3, 4, (-9.0, 9.0))
    assert ps.coeffs.shape == (3, 5) and ps.coeffs[2].tolist() == [0, 1, 0, 0, 0]
    assert np.array_equal(ps.intervals[1], [-0.625, 0.625])
    assert polynomial_from_json(ps.to_json()) == ps
    assert "3 channels on radii 0.625 to 9, degree 4" in str(ps)
    assert ps.max_abs(-1.0, 1.0) == max(p.max_abs(-1.0, 1.0) for p in ps.rows)


def test_other_channels_and_other_files_are_refused():
    with pytest.raises(PolynomialError, match=r"shape \(2, 4\)"):
        three()(torch.zeros(2, 4))
    with pytest.raises(PolynomialError, match="0 polynomials"):
        ChannelPolynomials(())
    with pytest.raises(PolynomialError, match="a str"):
        ChannelPolynomials(("x",))  # type: ignore[arg-type]
    for text in ('{"channels": []}', '{"channels": [1]}', '{"rows": []}', "[", "7"):
        with pytest.raises(PolynomialError):
            polynomial_from_json(text)
