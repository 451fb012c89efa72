"""Calibration: trained networks made polynomial without training."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.resnet import BasicBlock, Bottleneck

from crypten_espn.errors import (
    CalibrationWarning,
    ConversionError,
    DataError,
    RangeError,
)
from crypten_espn.pillar.calibrate import KINDS, calibrate, fits
from crypten_espn.pillar.data import Normalization
from crypten_espn.pillar.guard import InputGuard, guard_of
from crypten_espn.pillar.guard_bounds import Sample
from crypten_espn.pillar.histogram import CellMeans
from crypten_espn.pillar.stress import corruptions, reaches
from crypten_espn.pillar.surgery import (
    activations,
    replace_activations,
)
from crypten_espn.polynomial import ChannelPolynomials, Polynomial


def images(count=48, *shape):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, *(shape or (2, 6, 6)), generator=generator)


def small(activation=nn.ReLU):
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        activation(),
        nn.Conv2d(4, 3, 3),
        activation(),
        nn.Flatten(),
        nn.Linear(12, 5),
    ).eval()


def distance(model, other, x):
    with torch.no_grad():
        y, z = model(x.clone()), other(x.clone())
    return float((y - z).norm() / y.norm())


def layers(model):
    done = fits(model)
    assert done is not None
    return done.layers


def at(model, name):
    return model.get_submodule(name)


def channels(model):
    polynomials = [module.polynomial for module in activations(model).values()]
    return [p.channels for p in polynomials if isinstance(p, ChannelPolynomials)]


def given(kind):
    return {nn.Threshold: (0.2, -0.3)}.get(kind, ())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_activation_becomes_a_polynomial_a_channel_close_to_it(kind):
    model, x = small(lambda: kind(*given(kind))), images()
    before = copy.deepcopy(model)
    found = calibrate(model, x, degree=8)
    assert channels(found) == [4, 3]
    jumps = kind in (nn.Hardshrink, nn.Threshold)
    assert distance(model, found, x) < (0.5 if jumps else 0.15)
    assert not activations(model) and not found.training
    for mine, theirs in zip(
        model.state_dict().values(), before.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs)


class Functions(nn.Module):
    """Functional calls, one of them with an argument, one in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.leaky_relu(self.a(x), 0.3)
        x = functional.selu(self.b(x))
        return torch.relu_(x - 0.1).flatten(1)


def test_functions_are_calibrated_with_their_arguments():
    torch.manual_seed(0)
    model, x = Functions().eval(), images()
    found = calibrate(model, x)
    assert len(activations(found)) == 3
    assert distance(model, found, x) < 0.15
    assert [f.replaced for f in layers(found)] == ["LeakyReLU", "Call", "ReLU"]


def test_activations_in_place_stay_so():
    model, x = small(lambda: nn.ReLU(inplace=True)), images()
    assert distance(model, calibrate(model, x), x) < 0.15


def test_a_channel_is_fitted_to_what_it_sees():
    model, x = nn.Sequential(nn.ReLU()), images(64, 3, 50)
    x *= torch.tensor([0.9, 1.0, 8.0]).view(3, 1)
    found = calibrate(model, x, degree=6, margin=2.0)
    rows = at(found, "0").polynomial.rows
    for row, scale in zip(rows, (0.9, 1.0, 8.0), strict=True):
        # The 99.95th percentile of |x| of 3,200 normal values is 3 to 6.
        fitted = row.interval[1] / 1.25
        assert 6.0 < fitted / scale < 12.0
        assert fitted <= 2.0**row.exponent < 2 * fitted
    assert all(layer.error < 0.15 for layer in layers(found))


def test_a_deep_network_gets_a_wider_margin():
    for depth, margin in ((16, 1.5), (17, 2.0)):
        model = nn.Sequential(*(nn.ELU() for _ in range(depth)))
        done = fits(calibrate(model, images(20, 3), degree=2))
        assert done is not None and done.margin == margin


def test_a_higher_degree_is_closer_and_a_wider_margin_coarser():
    model, x = small(), images()
    off = {
        (d, m): distance(model, calibrate(model, x, degree=d, margin=m), x)
        for d, m in [(2, 2.0), (6, 2.0), (10, 2.0), (6, 4.0)]
    }
    assert off[10, 2.0] < off[6, 2.0] < min(off[2, 2.0], off[6, 4.0])
    reach, bad, _ = reaches(calibrate(model, x, margin=1.5), x)
    assert float(reach.max()) <= 1.0 and not bad.any()


def test_intervals_cover_what_the_layers_before_make_of_all_the_guard_lets_pass():
    model, x = small(), images()
    found = calibrate(model, x, degree=2, margin=1.0)
    sample = Sample.of(x, None)
    covered = sample.images[sample.admitted]
    assert sample.clean[sample.admitted].sum() == len(x) < len(covered)
    inputs = []
    at(found, "4").register_forward_pre_hook(
        lambda module, given: inputs.append(given[0])
    )
    with torch.no_grad():
        found(covered)
    seen = inputs[0].transpose(0, 1).flatten(1).abs().amax(1)
    least = 1.5 * float(seen.max()) / 16
    for largest, row in zip(seen.tolist(), at(found, "4").polynomial.rows, strict=True):
        assert row.interval[1] == pytest.approx(max(1.5 * largest, least), rel=1e-3)


def test_a_layer_is_fitted_to_what_the_network_was_meant_to_make_of_the_images():
    """What the first polynomial is off by on average, the second makes up for."""
    torch.manual_seed(4)
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU()).eval()
    x = images(400, 6)
    found = calibrate(model, x, degree=2)
    with torch.no_grad():
        inputs, meant = found.get_submodule("2")(at(found, "1")(first(x))), model(x)
        off = (at(found, "3")(inputs) - meant).mean(0)
        alone = (inputs.relu() - meant).mean(0)
    assert off.norm() < 0.2 * alone.norm()


def test_means_in_cells_are_those_of_what_was_meant_there():
    met = CellMeans(np.array([1.0, 2.0]), 4)
    met.add(
        torch.tensor([[-5.0, 0.1], [0.6, 0.2]]), torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    )
    met.add(torch.tensor([[0.9, 9.0]]), torch.tensor([[4.0, 8.0]]))
    thirds = np.array([[1, 0, 0, 2], [0, 0, 2, 1]])
    assert np.allclose(met.shares(), thirds / 3)
    means = met.means(np.full((2, 4), 7.0))
    assert np.allclose(means, np.array([[1, 7, 7, 3.5], [7, 7, 4, 8]]))


def test_a_calibrated_network_carries_a_guard_that_lets_nothing_pass_that_escapes():
    model, x = small(), images().clamp(-1.5, 1.5)
    found = calibrate(model, x)
    guard = guard_of(found)
    assert guard is not None and not guard.refused(x).any()
    made = torch.cat(list(corruptions(x, seed=1).values()))
    reach, _, _ = reaches(found, made)
    assert (reach[~guard.refused(made)] <= 1.0).all() and (reach > 1.0).any()
    model.normalization = Normalization((0.5, 0.5), (0.5, 0.5))
    guard = guard_of(calibrate(model, x.clamp(-1, 1)))
    assert guard is not None and guard.mean == (0.5, 0.5)


def test_a_layer_called_normalization_is_no_normalisation_of_images():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.normalization, self.act = nn.BatchNorm2d(2), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.normalization(x))

    assert guard_of(calibrate(Named().eval(), images())) is not None


def test_more_channels_than_a_guard_is_of_are_calibrated_without_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5000, 3), nn.ReLU())
    assert guard_of(calibrate(model, images(20, 5000))) is None


def test_batch_norm_is_estimated_again_if_asked():
    model, x = small(), images()
    model[1].running_mean -= 0.5
    kept, found = calibrate(model, x), calibrate(model, x, batch_norm=True)
    assert torch.equal(at(kept, "1").running_mean, model[1].running_mean)
    with torch.no_grad():
        y = model[0](x).transpose(0, 1).flatten(1)
    torch.testing.assert_close(at(found, "1").running_mean, y.mean(1))
    torch.testing.assert_close(at(found, "1").running_var, y.var(1))


@pytest.mark.parametrize("build", [lambda: BasicBlock(8, 8), lambda: Bottleneck(8, 2)])
def test_torchvisions_blocks_get_a_polynomial_at_each_place(build):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), build(), build()).eval()
    found = calibrate(model, images(), degree=8)
    assert channels(found) in ([8, 8] * 2, [2, 2, 8] * 2)
    assert distance(model, found, images()) < 0.2
    assert len([m for m in model.modules() if isinstance(m, nn.ReLU)]) == 2


def test_one_module_registered_twice_becomes_two():
    torch.manual_seed(0)
    act = nn.Tanh()
    model = nn.Sequential(nn.Linear(4, 6), act, nn.Linear(6, 3), act)
    found = calibrate(model, images(32, 4))
    assert channels(found) == [6, 3]


class Branches(nn.Module):
    """One activation at two places, in a forward that cannot be traced."""

    def __init__(self, second: int) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(3, second)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.b(self.act(self.a(x)))) if x.sum() < 1e9 else x


def test_a_shared_activation_that_cannot_be_told_apart_is_fitted_for_both_places():
    torch.manual_seed(2)
    model, x = Branches(3).eval(), images(64, 4)
    found = calibrate(model, x)
    assert list(activations(found)) == ["act"]
    assert distance(model, found, x) < 0.2
    with pytest.raises(ConversionError, match="places of 3 and 5 channels"):
        calibrate(Branches(5).eval(), x)


def test_what_was_replaced_before_is_kept():
    model = small()
    fixed = Polynomial((0, 1), 0, (-1.0, 1.0))
    replace_activations(model, {"2": fixed})
    with pytest.warns(CalibrationWarning, match="leave the intervals"):
        found = calibrate(model, images())
    assert at(found, "2").polynomial == fixed and len(layers(found)) == 1
    assert guard_of(found) == InputGuard.fit(images())
    replace_activations(model, {"4": fixed})
    with pytest.raises(ConversionError, match="polynomial already"):
        calibrate(model, images())


def test_a_network_without_a_known_activation_is_named():
    with pytest.raises(ConversionError, match=r"built of Flatten, Linear\. Known are"):
        calibrate(nn.Sequential(nn.Flatten(), nn.Linear(72, 3)), images())
    with pytest.raises(ConversionError, match="built of Linear, Softmax"):
        calibrate(nn.Sequential(nn.Linear(6, 3), nn.Softmax(1)), images(20, 6))


def test_max_pools_are_named():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2))
    with pytest.raises(ConversionError, match=r"2 \(MaxPool2d\).*replace_pooling"):
        calibrate(model, images())
    assert isinstance(model[2], nn.MaxPool2d)
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.MaxPool1d(2))
    with pytest.raises(ConversionError, match=r"maximum: 2 \(MaxPool1d\)"):
        calibrate(model, images(20, 2, 9))


def test_activations_that_learn_nothing_are_named():
    linear = nn.Linear(6, 3)
    quiet = nn.Sequential(linear, nn.ReLU())
    nn.init.constant_(linear.bias, -100.0)
    with pytest.warns(CalibrationWarning, match="1 never fires"):
        found = calibrate(quiet, images(20, 6))
    assert layers(found)[0].silent == (0, 1, 2)
    with torch.no_grad():
        assert float(found(images(20, 6)).abs().max()) < 0.1

    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Tanh(), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    with pytest.warns(CalibrationWarning, match="unused was never called"):
        found = calibrate(Unused(), images(20, 6))
    assert isinstance(at(found, "unused"), nn.ReLU)


@pytest.mark.parametrize("other", [nn.GLU(1), nn.Softmax(1)])
def test_an_unknown_activation_beside_known_ones_is_named(other):
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), other)
    name = type(other).__name__
    with pytest.warns(CalibrationWarning, match=rf"2 \({name}\) is no .* espn.check"):
        found = calibrate(model, images(20, 6))
    assert type(at(found, "2")) is type(other) and channels(found) == [4]


def test_constant_channels_are_kept_and_counted():
    x = images(20, 3, 8)
    x[:, 1] = 0.5
    x[:, 2] = 0.0
    found = calibrate(nn.Sequential(nn.ReLU()), x)
    (layer,) = layers(found)
    assert layer.constant == (1, 2) and "2" in str(fits(found))
    y = found(x)
    assert float((y[:, 1] - 0.5).abs().max()) < 0.01
    assert float(y[:, 2].abs().max()) < 0.01


def test_images_and_numbers_that_cannot_be_used_are_named():
    model = small()
    with pytest.raises(DataError, match="one input"):
        calibrate(model, images(1))
    with pytest.raises(DataError, match="copies of one input"):
        calibrate(model, images(1).expand(5, -1, -1, -1))
    bad = images()
    bad[3, 1, 2, 2] = torch.nan
    with pytest.raises(RangeError, match="NaN or infinite"):
        calibrate(model, bad)
    for degree in (0, 11, 4.0, True):
        with pytest.raises(RangeError, match="1 to 10"):
            calibrate(model, images(), degree=degree)  # type: ignore[arg-type]
    for margin in (0.9, 17.0, float("nan")):
        with pytest.raises(RangeError, match="1 to 16"):
            calibrate(model, images(), margin=margin)
    with torch.no_grad():
        model[3].weight.fill_(1e38)
    with pytest.raises(RangeError, match="4 gets values that are not finite"):
        calibrate(model, images())


def test_double_precision_and_training_mode_are_taken():
    model, x = small().double().train(), images()
    found = calibrate(model, x)
    assert model.training and not found.training
    assert distance(copy.deepcopy(model).eval(), found, x.double()) < 0.15
