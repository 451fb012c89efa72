"""Fit, float and ring evaluation of polynomials, against exhaustive oracles."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from crypten_espn.errors import (
    DegreeCollapsedWarning,
    HeadroomError,
    PolynomialError,
)
from crypten_espn.polynomial import FLOOR, GRID_POINTS, Polynomial
from tests import oracle

FUNCTIONS = [
    torch.relu,
    torch.nn.functional.silu,
    torch.nn.functional.gelu,
    torch.sigmoid,
    torch.tanh,
]


def squared_error(
    numerators, frac_bits, function, interval=(-5.0, 5.0), spread=math.inf
):
    x = np.linspace(interval[0], interval[1], GRID_POINTS)
    y = function(torch.from_numpy(x)).numpy()
    p = sum(c / 2**frac_bits * x**k for k, c in enumerate(numerators))
    density = np.exp(-((x / spread) ** 2) / 2) + FLOOR
    return float((density / (1 + FLOOR) * (p - y) ** 2).sum())


def fit_quietly(function, **arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegreeCollapsedWarning)
        return Polynomial.fit(function, **arguments)


@pytest.mark.parametrize(
    ("frac_bits", "published"),
    [(10, (322, 512, 160, 0, -3)), (8, (70, 128, 45, 0, -1))],
)
def test_fit_is_no_worse_than_the_published_coefficients(frac_bits, published):
    p = Polynomial.fit(torch.relu, degree=4, frac_bits=frac_bits)
    ours = squared_error(p.numerators, frac_bits, torch.relu)
    assert ours <= squared_error(published, frac_bits, torch.relu) + 1e-9
    assert max(map(abs, p.numerators)) <= 2 ** (frac_bits - 1)


@pytest.mark.slow
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("spread", [None, 0.8])
def test_fit_is_optimal_among_all_neighbours(function, degree, spread):
    p = fit_quietly(function, degree=degree, frac_bits=6, spread=spread)

    def error(numerators):
        return squared_error(numerators, 6, function, spread=spread or math.inf)

    best = error(p.numerators)
    padded = [*p.numerators, *[0] * (degree - p.degree)]
    for move in itertools.product(range(-4, 5), repeat=degree + 1):
        moved = [c + d for c, d in zip(padded, move, strict=True)]
        assert error(moved) >= best - 1e-9


def test_a_spread_is_worth_two_degrees_where_inputs_crowd():
    ends = (-3.0, 3.0)
    even = Polynomial.fit(torch.relu, degree=6, interval=ends, frac_bits=14)
    dense = Polynomial.fit(
        torch.relu, degree=4, interval=ends, frac_bits=14, spread=0.6
    )
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(3)) * 0.6
    errors = [float((p(x) - x.relu()).square().mean()) for p in (even, dense)]
    assert errors[1] < 1.1 * errors[0]
    assert dense.rmse(torch.relu) > 1.5 * even.rmse(torch.relu)  # at the ends


@pytest.mark.parametrize("spread", [0.0, -1.0, math.nan, math.inf])
def test_a_spread_that_is_none_is_refused(spread):
    with pytest.raises(PolynomialError, match="spread="):
        Polynomial.fit(torch.relu, degree=4, spread=spread)


def test_fit_beats_rounding_the_real_solution():
    x = np.linspace(-5, 5, GRID_POINTS)
    real = np.polynomial.polynomial.polyfit(x, np.maximum(x, 0), 4)
    rounded = [round(c * 2**8) for c in real]
    p = Polynomial.fit(torch.relu, degree=4, frac_bits=8)
    assert squared_error(p.numerators, 8, torch.relu) < squared_error(
        rounded, 8, torch.relu
    )


@pytest.mark.parametrize("degree", [5, 6, 8, 10])
def test_collapsed_degree_is_reported(degree):
    with pytest.warns(DegreeCollapsedWarning, match=f"degree {degree} was asked"):
        p = Polynomial.fit(torch.relu, degree=degree, frac_bits=10)
    assert p.degree == 4 and p.collapsed and p.requested_degree == degree
    assert "asked" in str(p)
    assert not fit_quietly(torch.relu, degree=6, frac_bits=16).collapsed


@settings(deadline=None, max_examples=40)
@given(
    degree=st.integers(1, 10),
    frac_bits=st.integers(6, 20),
    low=st.floats(-20, 5),
    width=st.floats(0.5, 30),
    which=st.sampled_from(FUNCTIONS),
)
def test_fit_is_as_close_as_quantisation_allows(degree, frac_bits, low, width, which):
    interval = (low, low + width)
    p = fit_quietly(which, degree=degree, interval=interval, frac_bits=frac_bits)
    # Rounding every real coefficient is one candidate the optimum must not lose to.
    x = np.linspace(*interval, GRID_POINTS)
    y = which(torch.from_numpy(x)).numpy()
    scaled = np.polynomial.Polynomial.fit(x, y, degree).convert().coef
    rounded = [round(c * 2**frac_bits) for c in scaled]
    ours = squared_error(p.numerators, frac_bits, which, interval)
    theirs = squared_error(rounded, frac_bits, which, interval)
    assert ours <= theirs * (1 + 1e-6) + 1e-9


def test_float_evaluation_and_gradient():
    p = Polynomial((3, -2, 5, 0, 1), 2, (-2.0, 2.0))
    x = torch.linspace(-2, 2, 9, dtype=torch.float64, requires_grad=True)
    y = p(x)
    expected = 0.75 - 0.5 * x + 1.25 * x**2 + 0.25 * x**4
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    torch.testing.assert_close(x.grad, p.derivative()(x.detach()))


@settings(deadline=None, max_examples=60)
@example(numerators=[0, 0, 0, 1, 0, 1], frac_bits=8, out_bits=40, values=[3, -5])
@given(
    numerators=st.lists(st.integers(-2000, 2000), min_size=1, max_size=11),
    frac_bits=st.sampled_from([8, 12, 16]),
    out_bits=st.sampled_from([24, 31, 35, 40]),
    values=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=8),
)
def test_ring_evaluation_is_exact(numerators, frac_bits, out_bits, values):
    p = Polynomial(tuple(numerators), 10, (-1.0, 1.0))
    form = p.ring_form(frac_bits=frac_bits, out_bits=out_bits)
    x = torch.tensor(values)
    reduced = form.reduce(x)
    scaled = [oracle.signed(v * form.factor) >> form.shift for v in values]
    assert reduced.tolist() == scaled
    got = form.evaluate(x, reduced).tolist()
    assert got == oracle.polynomial(form, values, reduced.tolist())


@pytest.mark.parametrize("degree", range(1, 11))
@pytest.mark.parametrize("out_bits", [31, 35, 39, 50])
def test_error_bound_holds_for_every_input(degree, out_bits):
    p = fit_quietly(torch.relu, degree=degree, frac_bits=16)
    form = p.ring_form(frac_bits=16, out_bits=out_bits)
    x = torch.randint(-5 * 2**16, 5 * 2**16 + 1, (20_000,))
    exact = sum(
        c / 2**16 * (x.double() / 2**16) ** k for k, c in enumerate(p.numerators)
    )
    worst = 0.0
    for unit in (0, 1) if form.shift else (0,):
        y = form.evaluate(x, form.reduce(x) + unit).double() / 2.0**out_bits
        worst = max(worst, (y - exact).abs().max().item())
    assert worst <= form.error_bound + 1e-9
    # A bound is only worth declaring if it is not far off.
    assert form.error_bound <= max(20 * worst, 1e-7)
    assert form.shift == 0 or form.factor < 4096


def test_headroom_is_what_is_left_of_the_ring():
    p = Polynomial((0, 0, 2**10), 10, (-4.0, 4.0))
    form = p.ring_form(frac_bits=16, out_bits=40)
    assert form.headroom_bits == pytest.approx(62 - 40 - math.log2(16))
    assert p.widest_out_bits(16) == 62 - 3 - 4
    with pytest.raises(HeadroomError, match="lower out_bits"):
        p.ring_form(frac_bits=16, out_bits=60)
    huge = Polynomial((2**60,), 0, (-1.0, 1.0))
    with pytest.raises(HeadroomError, match="scale the coefficients down"):
        huge.widest_out_bits(16)
    with pytest.raises(HeadroomError, match="at least the input's"):
        p.ring_form(frac_bits=16, out_bits=8)


def test_json_round_trip():
    p = Polynomial((1, 2, 3), 10, (-4.8, 4.8), 5)
    assert Polynomial.from_json(p.to_json()) == p
    for text in ("", "[]", "{}", '{"numerators": [1.5]}', "null"):
        with pytest.raises(PolynomialError, match="not a stored polynomial"):
            Polynomial.from_json(text)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Polynomial.fit(torch.relu, degree=0), "from 1 to 10"),
        (lambda: Polynomial.fit(torch.relu, degree=11), "from 1 to 10"),
        (lambda: Polynomial.fit(torch.relu, degree=cast(int, 2.0)), "from 1 to 10"),
        (lambda: Polynomial.fit(torch.relu, degree=2, frac_bits=5), "from 6 to 20"),
        (lambda: Polynomial.fit(torch.relu, degree=2, interval=(5, -5)), "below"),
        (
            lambda: Polynomial.fit(torch.relu, degree=2, interval=(0, math.inf)),
            "two finite",
        ),
        (lambda: Polynomial.fit(torch.log, degree=2), "non-finite"),
        (lambda: Polynomial.fit(torch.sum, degree=2), "element by element"),
        (lambda: Polynomial.from_coeffs([1.0, math.nan]), "finite"),
        (lambda: Polynomial.from_coeffs([]), "at least one"),
        (lambda: Polynomial((cast(int, 0.5),), 10, (-1, 1)), "one Python int"),
        (lambda: Polynomial((1,) * 12, 10, (-1, 1)), "at most 10"),
        (lambda: Polynomial((1, 1), 99, (-1, 1)), "0 to 40"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(PolynomialError, match=message):
        call()
