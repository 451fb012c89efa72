"""Many channels fitted at once, and what a channel saw counted in bounded memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crypten_espn.errors import PolynomialError
from crypten_espn.pillar.histogram import ChannelHistogram
from crypten_espn.polynomial.channel_fit import cells, fit_channels
from crypten_espn.polynomial.fit import FLOOR, best_numerators


def relu_on(radii, count=200):
    return np.maximum(radii[:, None] * cells(count), 0.0)


def test_a_polynomial_is_found_again_in_every_unit():
    radii = np.array([0.07, 1.0, 3.0, 900.0])
    x = radii[:, None] * cells(64)
    values = radii[:, None] * (0.25 - 0.5 * cells(64) + 0.125 * cells(64) ** 3)
    found = fit_channels(values, np.ones_like(values), radii, 5)
    assert [row.exponent for row in found.rows] == [-3, 0, 2, 10]
    assert [row.interval[1] for row in found.rows] == radii.tolist()
    y = found(torch.from_numpy(x.T.copy())).numpy().T
    for off, row in zip(np.abs(y - values).max(1), found.rows, strict=True):
        assert off <= 6 / 2**21 * 2.0**row.exponent


@pytest.mark.parametrize("degree", [1, 4, 7, 10])
def test_rounding_costs_next_to_nothing_of_the_exact_closest_integers(degree):
    radii = np.array([1.0])
    # As best_numerators weighs for a spread of 1.
    weights = np.exp(-(cells(200) ** 2) / 2)[None] + FLOOR
    found = fit_channels(relu_on(radii), weights, radii, degree).rows[0]
    root, target = np.sqrt(weights[0]), relu_on(radii)[0]

    def error(numerators):
        powers = cells(200)[:, None] ** np.arange(len(numerators))
        off = powers @ np.array(numerators, float) / 2.0**20 - target
        return float(((root * off) ** 2).sum())

    exact = best_numerators(cells(200), target, degree, 20, 1.0)
    assert error(exact) <= error(found.numerators) <= error(exact) * (1 + 1e-8)


def test_channels_are_fitted_each_by_its_own_weights():
    radii = np.array([2.0, 2.0])
    weights = np.full((2, 200), 0.01)
    weights[0, cells(200) < 0] = 1.0
    weights[1, cells(200) > 0] = 1.0
    found = fit_channels(relu_on(radii), weights, radii, 3)
    both = found(torch.tensor([[-1.0, -1.0], [1.0, 1.0]], dtype=torch.float64))
    wrong = (both - torch.tensor([[0.0], [1.0]])).abs()
    assert wrong[0, 0] < wrong[0, 1] and wrong[1, 1] < wrong[1, 0]


def test_degrees_and_values_that_cannot_be_fitted_are_refused():
    radii = np.array([1.0])
    for degree in (0, 11, 2.0, True):
        with pytest.raises(PolynomialError, match="1 to 10"):
            fit_channels(relu_on(radii), np.ones((1, 200)), radii, degree)  # type: ignore[arg-type]
    with pytest.raises(PolynomialError, match="finite"):
        fit_channels(relu_on(radii) + np.nan, np.ones((1, 200)), radii, 4)


def seen(x):
    histogram = ChannelHistogram()
    for part in x.split(3):
        histogram.add(part)
    return histogram


def test_a_percentile_is_within_a_bin_above_the_truth():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 3, 5, 7, generator=generator) * torch.tensor(
        [0.01, 1.0, 300.0]
    ).view(3, 1, 1)
    for percent in (50.0, 99.0, 100.0):
        given = seen(x).percentile(percent)
        flat = x.transpose(0, 1).flatten(1).abs().sort(1).values
        rank = int(np.ceil(flat.shape[1] * percent / 100)) - 1
        truth = flat[:, rank].numpy()
        assert (truth <= given).all() and (given <= truth * 1.017).all()


def test_a_channel_of_one_value_is_constant():
    x = torch.tensor([[-1.0, 0.6], [0.25, 0.6], [9.0, 0.6], [0.25, 0.6]])
    histogram = seen(x)
    assert histogram.constant.tolist() == [False, True]
    assert histogram.largest.tolist() == [9.0, pytest.approx(0.6)]
