"""What a training loop of one's own calls: schedule, watch, replay, clip."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from crypten_espn.errors import RangeError, ShapeError, TrainingError
from crypten_espn.pillar.penalty import range_penalty
from crypten_espn.pillar.phases import clip_in_training, replace_share
from crypten_espn.pillar.replay import TailReplay
from crypten_espn.pillar.surgery import (
    PolynomialActivation,
    activations,
    replace_activations,
)
from crypten_espn.pillar.watch import image_reach, largest_inputs
from crypten_espn.polynomial import ChannelPolynomials, Polynomial

SQUARE = Polynomial((0, 0, 1), 0, (-2.0, 2.0))
CHANNELS = ChannelPolynomials(
    (Polynomial((0, 1), 0, (-2.0, 2.0)), Polynomial((0, 1), 0, (-1.0, 4.0)))
)


class Functional(nn.Module):
    """One activation as a module, one as a call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act = nn.Linear(3, 3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.act(self.first(x)) - 1)


def stack(count: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(count):
        layers += [nn.Linear(3, 3), nn.ReLU()]
    return nn.Sequential(*layers)


def passes(polynomial: Polynomial | ChannelPolynomials) -> nn.Module:
    """An activation alone, whose inputs are the network's."""
    return PolynomialActivation(polynomial).train()


# --- schedule --------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 7, 10])
def test_activations_give_way_first_to_last_as_the_share_grows(count: int) -> None:
    model = stack(count)
    assert replace_share(model, {nn.ReLU: SQUARE}, 0) is model
    assert not activations(model)
    for done in range(1, count + 1):
        assert replace_share(model, {nn.ReLU: SQUARE}, done / count) is model
        assert list(activations(model)) == [f"{2 * i + 1}" for i in range(done)]
    # What was replaced stays so, and nothing is left to replace.
    replace_share(model, {nn.ReLU: SQUARE}, 0.1)
    replace_share(model, {nn.ReLU: SQUARE}, 1)
    assert len(activations(model)) == count


def test_activations_that_a_forward_calls_give_way_too() -> None:
    parts = [Functional(), Functional()]
    model = nn.Sequential(*parts)
    counts = []
    for share in (0.25, 0.5, 0.6, 1.0):
        replace_share(model, {nn.ReLU: SQUARE}, share)
        counts.append(len(activations(model)))
    assert counts == [1, 2, 3, 4]
    x = expected = torch.randn(5, 3)
    for part in parts:
        expected = part.first(expected).square().sub(1).square()
    torch.testing.assert_close(model.eval()(x), expected)


def test_a_share_beyond_all_is_refused() -> None:
    for share in (-0.1, 1.5, math.nan):
        with pytest.raises(RangeError, match=f"share={share}"):
            replace_share(stack(2), {nn.ReLU: SQUARE}, share)


# --- watch -----------------------------------------------------------------------


def test_inputs_are_watched_in_radii_of_their_own_channel() -> None:
    model = nn.Sequential(passes(CHANNELS), nn.Flatten(), passes(SQUARE))
    x = torch.zeros(3, 2, 2, 2)
    x[0, 0, 1, 1] = -3.0  # 1.5 radii of channel 0, and of the second activation
    x[1, 1, 0, 1] = 3.0  # 0.75 radii of channel 1, clipped to 3: 1.5 of the second
    x.requires_grad_()
    model(x)
    assert largest_inputs(model) == {"0": 1.5, "2": 1.5}
    torch.testing.assert_close(image_reach(model), torch.tensor([1.5, 1.5, 0.0]))
    # Reading does not forget, a penalty does.
    assert largest_inputs(model)["0"] == 1.5
    range_penalty(model)
    assert largest_inputs(model) == {"0": 0.0, "2": 0.0}
    with pytest.raises(TrainingError, match="between its forward and backward"):
        image_reach(model)


def test_an_input_that_is_not_a_number_reaches_infinitely_far() -> None:
    model = passes(SQUARE)
    model(torch.tensor([[0.5, math.nan], [1.0, 3.0]], requires_grad=True))
    assert largest_inputs(model) == {"": math.inf}
    assert image_reach(model).tolist() == [math.inf, 1.5]


# --- clip ------------------------------------------------------------------------


def test_without_its_clip_training_computes_what_evaluation_does() -> None:
    model = replace_activations(stack(2), {nn.ReLU: SQUARE})
    x = 9 * torch.randn(4, 3)
    clipped = model.train()(x)
    clip_in_training(model, False)
    free = model(x)
    torch.testing.assert_close(free, model.eval()(x))
    assert not torch.allclose(free, clipped)
    clip_in_training(model, True)
    torch.testing.assert_close(model.train()(x), clipped)


def test_without_its_clip_a_far_input_has_the_polynomials_slope() -> None:
    model = passes(SQUARE)
    clip_in_training(model, False)
    x = torch.tensor([[5.0]], requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None and float(x.grad) == 10


# --- tail replay -----------------------------------------------------------------


def test_what_reaches_furthest_is_kept_and_mixed_in() -> None:
    model, replay = passes(SQUARE), TailReplay(2)
    x = torch.tensor([[1.0], [6.0], [0.5], [4.0]])
    labels = torch.tensor([0, 1, 2, 3])
    assert replay.mix(x, labels, 2)[0] is x and len(replay) == 0
    model(x.clone().requires_grad_())
    replay.keep(model, x, labels)
    assert len(replay) == 2
    fresh, numbers = torch.zeros(3, 1), torch.tensor([7, 8, 9])
    mixed, targets = replay.mix(fresh, numbers, 1)
    # The one kept first; the batch given is as it was.
    assert mixed.flatten().tolist() == [0, 0, 6]
    assert targets.tolist() == [7, 8, 1]
    assert float(fresh.sum()) == 0 and len(replay) == 1
    # It reaches less far by now: the others stay.
    range_penalty(model)
    model((mixed / 6).requires_grad_())
    replay.keep(model, mixed, targets)
    mixed, targets = replay.mix(torch.zeros(5, 1), torch.zeros(5).long(), 5)
    assert mixed.flatten().tolist() == [0, 0, 0, 4, 6]
    assert targets.tolist() == [0, 0, 0, 3, 1]


def test_a_batch_of_another_size_is_not_kept() -> None:
    model, replay = passes(SQUARE), TailReplay(4)
    model(torch.ones(3, 1, requires_grad=True))
    with pytest.raises(ShapeError, match="5 images were given to keep"):
        replay.keep(model, torch.ones(5, 1), torch.zeros(5))
    with pytest.raises(RangeError, match="size=0"):
        TailReplay(0)
