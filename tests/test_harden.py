"""Networks taught to keep corrupted images inside their intervals."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from crypten_espn.errors import RangeError, TrainingError
from crypten_espn.pillar.data import Normalization
from crypten_espn.pillar.guard import guard_of
from crypten_espn.pillar.harden import harden
from crypten_espn.pillar.stress import Levels, corruptions, drawn, reaches
from crypten_espn.pillar.surgery import replace_activations
from crypten_espn.polynomial import Polynomial

UNIT = Normalization((0.0,), (1.0,))


def images(count: int = 48) -> Tensor:
    """Soft blobs, nothing like noise or stripes."""
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(count, 1, 3, 3, generator=generator)
    return nn.functional.interpolate(x, size=8, mode="bilinear")


def network() -> nn.Module:
    """Three layers, each of whose intervals is just what clean images need."""
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for inputs in (1, 6, 6):
        layers += [nn.Conv2d(inputs, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()]
    plain = nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 64, 4))
    square = Polynomial.fit(torch.relu, degree=2, interval=(-1.5, 1.5), frac_bits=10)
    model = replace_activations(plain, {nn.ReLU: square})
    for _ in range(20):
        model(images())  # batch-norm's statistics
    return model.eval()


def furthest(model: nn.Module) -> float:
    made = [image for n, image in corruptions(images(24)).items() if "beyond" not in n]
    return float(reaches(model, torch.cat(made))[0].max())


def test_corrupted_images_stay_inside_and_clean_ones_are_answered_alike():
    model = network()
    before = copy.deepcopy(model.state_dict())
    hardened = harden(
        model,
        images(),
        normalization=UNIT,
        steps=60,
        batch_size=24,
        learning_rate=0.02,
        beta=0.05,
    )
    assert furthest(model) > 1.5 * furthest(hardened)
    assert guard_of(hardened) is not None and not hardened.training
    with torch.no_grad():
        same = model(images()).argmax(1) == hardened(images()).argmax(1)
    assert same.float().mean() > 0.9
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    # Batch-norm's statistics are not the corrupted images'.
    mean = hardened.get_buffer("1.running_mean")
    assert torch.equal(mean, before["1.running_mean"])


def test_the_same_seed_gives_the_same_network():
    one, two, three = (
        harden(network(), images(), normalization=UNIT, steps=3, batch_size=8, seed=s)
        for s in (1, 1, 2)
    )
    weights = [m.get_parameter("0.weight") for m in (one, two, three)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_drawn_corruptions_differ_and_stay_within_the_levels():
    x = images(200)
    levels = Levels(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    made = drawn(x, levels, torch.Generator().manual_seed(0))
    assert made.shape == x.shape and made.min() >= 0 and made.max() <= 1
    changed = (made - x).flatten(1).abs().amax(1)
    assert (changed > 0.05).float().mean() > 0.8 and (changed < 0.5).any()


def test_what_cannot_be_hardened_is_named(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(RangeError, match="no polynomial activation"):
        harden(nn.Sequential(nn.ReLU()), images())
    for steps, batch_size, rate in ((0, 8, 0.1), (1, 49, 0.1), (1, 8, 0.0)):
        with pytest.raises(RangeError, match="with 48 images"):
            harden(
                network(),
                images(),
                steps=steps,
                batch_size=batch_size,
                learning_rate=rate,
            )
    x = images()
    x[0, 0, 0, 0] = torch.nan
    with pytest.raises(RangeError):
        harden(network(), x)
    broken = network()
    with torch.no_grad():
        broken.get_parameter("0.weight").fill_(torch.inf)
    with pytest.raises(TrainingError, match="none of 2 steps"):
        harden(broken, images(), steps=2, batch_size=8)
