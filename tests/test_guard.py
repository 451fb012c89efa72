"""The guard of inputs: what it lets through, what it names, what its file may be."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from crypten_espn.errors import DataError, RangeError, ShapeError
from crypten_espn.pillar.data import FASHION_NORMALIZATION, fashion_sample
from crypten_espn.pillar.data.splits import Normalization
from crypten_espn.pillar.guard import InputGuard, attach_guard, guard_of
from crypten_espn.pillar.stress import BEYOND, corruptions, reaches
from crypten_espn.pillar.surgery import PolynomialActivation
from crypten_espn.polynomial import Polynomial

PLAIN = (0.0,), (1.0,)


def images():
    return next(fashion_sample().batches(256))[0]


def guard():
    return InputGuard.fit(images()[:64], normalization=FASHION_NORMALIZATION)


def test_bounds_are_powers_of_two_of_pixels():
    assert guard() == InputGuard(
        (0.0,), (1.0,), (1.0,), (0.25,), FASHION_NORMALIZATION.mean, (0.353,)
    )
    values = torch.tensor([[[3.0, -0.4, 0.0]], [[1.0, -5.0, 2.0]]])
    # -5 -> 8; 3 -> 4; 30 / 3 x 1.125 -> 16; (36 + 49) / 2 x 1.125 -> 64.
    assert InputGuard.fit(values) == InputGuard(
        (8.0,), (4.0,), (16.0,), (64.0,), *PLAIN
    )


def test_every_other_image_passes_and_what_blows_up_is_refused():
    fitted, given = guard(), corruptions(images()[64:])
    assert not fitted.refused(given["clean"]).any()
    fitted.check(given["clean"])
    for name, corrupted in given.items():
        if name.startswith(BEYOND):
            assert fitted.refused(corrupted).all(), name
            with pytest.raises(RangeError, match="as in training"):
                fitted.check(corrupted)


def test_a_refusal_names_input_channel_value_and_bound():
    fitted = InputGuard.fit(torch.ones(4, 2, 3, 3))
    x = torch.ones(3, 2, 3, 3)
    x[1, 1, 0, 0] = 7.0
    with pytest.raises(RangeError, match=r"input 1 .* is 7 in channel 1, at most 1 is"):
        fitted.check(x)
    assert fitted.refused(x).tolist() == [False, True, False]
    x[2, 0, 0, 0] = torch.nan
    assert fitted.refused(x).tolist() == [False, True, True]
    with pytest.raises(RangeError, match="before the normalisation"):
        guard().check(images() * 3)


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 8), (5, 3, 4, 4), (5, 3, 2, 2, 2)])
def test_inputs_of_every_number_of_axes_are_guarded(shape):
    x = torch.rand(*shape, generator=torch.Generator().manual_seed(0))
    fitted = InputGuard.fit(x)
    fitted.check(x)
    assert fitted.refused(4 * x + 1).all()
    assert (max(fitted.roughness) == 0.0) == (len(shape) == 2)


def test_a_rough_input_of_allowed_values_is_refused():
    smooth = torch.linspace(0, 1, 16).expand(4, 1, 16)
    rough = torch.tensor([0.0, 1.0] * 8).expand(1, 1, 16)
    with pytest.raises(RangeError, match="between neighbours"):
        InputGuard.fit(smooth).check(rough)


def test_other_shapes_and_no_data_are_refused():
    with pytest.raises(ShapeError, match=r"\(n, 1, \.\.\.\)"):
        guard().check(torch.zeros(2, 3, 28, 28))
    with pytest.raises(RangeError, match="NaN"):
        InputGuard.fit(images() * torch.nan)
    with pytest.raises(DataError, match="shape"):
        InputGuard.fit(torch.ones(4))
    with pytest.raises(RangeError, match="normalise"):
        InputGuard.fit(torch.full((2, 1, 3), 1e8))
    with pytest.raises(DataError, match="1 channels, the normalisation 2"):
        InputGuard.fit(images(), normalization=Normalization((0.0,) * 2, (1.0,) * 2))


def test_a_guard_comes_back_from_its_file():
    assert InputGuard.from_json(guard().to_json()) == guard()


@pytest.mark.parametrize(
    "change",
    [
        {"depth": []},
        {"depth": [0.3]},
        {"height": [-1.0]},
        {"height": [2.0**41]},
        {"height": ["1"]},
        {"energy": [1.0, 1.0]},
        {"roughness": [-0.0]},
        {"mean": [1e300]},
        {"std": [0.0]},
        {"more": [1.0]},
    ],
)
def test_a_changed_file_is_refused(change):
    fields = json.loads(guard().to_json()) | change
    with pytest.raises(DataError):
        InputGuard.from_json(json.dumps(fields))


def test_what_is_no_guard_at_all_is_refused():
    for text in ("", "[", "{}", "null", "[" * 5000):
        with pytest.raises(DataError, match="not a stored guard"):
            InputGuard.from_json(text)


def test_a_network_carries_its_guard_and_its_copies_do():
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 2))
    assert guard_of(network) is None
    attach_guard(network, guard())
    assert guard_of(copy.deepcopy(network)) == guard() == guard_of(network)
    assert len(network.state_dict()) == 2
    attach_guard(network, None)
    assert guard_of(network) is None
    with pytest.raises(DataError, match="dict is no guard"):
        attach_guard(network, {})  # type: ignore[arg-type]


class Mean(nn.Module):
    """A network of one number: the mean of some columns, squared."""

    def __init__(self, columns: slice, radius: float) -> None:
        super().__init__()
        self.columns = columns
        self.act = PolynomialActivation(Polynomial((0, 0, 1), 0, (-radius, radius)))

    def forward(self, x):
        return self.act(x[..., self.columns].flatten(1).mean(1, keepdim=True))


def dark(count=200):
    """(n, 1, 8, 8) with black and white in each, of mean below 0.3; right half 0."""
    x = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(4)) * 0.8
    x[..., 4:] = 0.0
    x[..., 0, 0] = 1.0
    return x


def test_a_guard_closes_until_nothing_passes_that_escapes():
    network, x = Mean(slice(None), 0.6), dark()
    fitted = InputGuard.fit(x, network=network)
    # Inverted and bright images have a mean square of 0.5 and more, the dark of 0.125.
    assert fitted == InputGuard((0.0,), (1.0,), (0.25,), fitted.roughness, *PLAIN)
    assert not fitted.refused(x).any()
    escaping = 0
    for made in corruptions(x, seed=7).values():
        reach, _, _ = reaches(network, made)
        escaping += int((reach > 1.0).sum())
        assert (reach[~fitted.refused(made)] <= 1.0).all()
    assert escaping > 400
    open_wide = InputGuard.fit(x, network=Mean(slice(None), 50.0))
    assert open_wide.energy == (1.0,) and open_wide.height == (1.0,)


def test_black_and_white_that_many_images_share_are_exact_ends():
    x = dark() * 3.0 - 0.7
    fitted = InputGuard.fit(x, network=Mean(slice(None), 50.0))
    assert (fitted.depth, fitted.height) == ((0.0,), (1.0,))
    fitted.check(x)
    assert fitted.refused(x + 0.05).all() and fitted.refused(x - 0.05).all()


def test_images_that_escape_themselves_are_named():
    with pytest.raises(RangeError, match=r"of 200 images leave .* act\); espn.settle"):
        InputGuard.fit(dark(), network=Mean(slice(None), 0.1))


def test_what_no_bound_tells_from_the_images_is_named():
    # What is shifted to the right half has the statistics of what was there.
    with pytest.raises(RangeError, match=r"no bound tells .*shift.*settle_intervals"):
        InputGuard.fit(dark(), network=Mean(slice(4, None), 0.05))


def test_features_share_their_bounds():
    x = torch.rand(300, 40, generator=torch.Generator().manual_seed(5)) * 2 - 1
    x[:, :39] *= 0.3
    fitted = InputGuard.fit(x)
    assert set(fitted.height) == set(fitted.depth) == {2.0}
    assert set(fitted.energy) == {0.125} and set(fitted.roughness) == {0.0}
    # Each feature alone would be bounded by 0.5 and less.
    assert not fitted.refused(x.roll(1, 1)).any()
    assert fitted.refused(torch.full((1, 40), 0.5)).all()
