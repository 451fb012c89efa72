"""Penalties against their formulas, and what the range report says."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crypten_espn.errors import RangeError, TrainingError
from crypten_espn.pillar.penalty import (
    PAPER_WARMUP,
    PenaltyStage,
    boundary_penalty,
    range_penalty,
    warmup_stage,
)
from crypten_espn.pillar.ranges import FixedPoint, range_report
from crypten_espn.pillar.surgery import PolynomialActivation, replace_activations
from crypten_espn.polynomial import Polynomial

RELU = Polynomial((322, 512, 160, 0, -3), 10, (-5.0, 5.0))


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 7), nn.ReLU())
    return replace_activations(model, {nn.ReLU: RELU}).train()  # type: ignore[return-value]


def inputs_of(model: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inputs of both activations, computed without the module."""
    first = model[0](x)
    return first, model[2](RELU(first.clamp(-5, 5)))


@pytest.mark.parametrize("power", [2, 4, 6, 8, 10, 12])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_power_penalty_and_its_gradient(power: int, reduction: str) -> None:
    model = two_layers()
    x = 3 * torch.randn(8, 5)
    parts = [
        getattr((part / 4.5).abs() ** power, reduction)()
        for part in inputs_of(model, x)
    ]
    expected = sum(parts) / 2
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    model(x)
    got = range_penalty(model, gamma=4.5, power=power, reduction=reduction)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got, list(model.parameters())), gradients
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_beyond_its_tail_the_power_goes_on_as_its_tangent(dtype: torch.dtype) -> None:
    activation = PolynomialActivation(RELU).train()
    x = torch.tensor([-30.0, -8.0, 2.0, 9.0, 50.0], dtype=dtype, requires_grad=True)
    t = (x / 4.5).abs()
    expected = torch.where(t > 2, 2.0**10 + 10 * 2.0**9 * (t - 2), t**10).sum()
    (gradient,) = torch.autograd.grad(expected, x)
    activation(x)
    got = range_penalty(activation, gamma=4.5, tail=2.0)
    torch.testing.assert_close(got, expected.float())
    torch.testing.assert_close(torch.autograd.grad(got, x)[0], gradient)
    # One input cannot pull harder than at the tail's beginning.
    assert float(gradient.abs().max()) == pytest.approx(10 * 2**9 / 4.5, rel=1e-5)


def test_a_tail_within_what_costs_nothing_is_refused() -> None:
    for tail in (0.5, math.nan, math.inf):
        with pytest.raises(RangeError, match=f"tail={tail}; it is None or from 1 on"):
            range_penalty(two_layers(), tail=tail)


@pytest.mark.parametrize("interval", [(-5.0, 5.0), (-1.0, 3.0)])
def test_boundary_penalty_and_its_gradient(interval: tuple[float, float]) -> None:
    polynomial = Polynomial((0, 1024), 10, interval)
    activation = PolynomialActivation(polynomial).train()
    x = torch.linspace(-9, 9, 400).requires_grad_()
    low, high = interval
    distance = (x - (low + high) / 2).abs() / ((high - low) / 2)
    expected = (((distance - 0.8).clamp(min=0) / 0.2) ** 2).sum()
    (gradient,) = torch.autograd.grad(expected, x)
    activation(x)
    got = boundary_penalty(activation, margin=0.8)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, x)[0], gradient)
    activation(torch.tensor([low, high], requires_grad=True))
    assert boundary_penalty(activation).item() == pytest.approx(2, rel=1e-5)


def test_the_penalty_is_clear_of_the_clip() -> None:
    activation = PolynomialActivation(RELU).train()
    x = torch.tensor([50.0], requires_grad=True)
    activation(x)
    range_penalty(activation).backward()
    assert x.grad is not None and float(x.grad) > 0


def test_mean_and_sum_convert_as_documented() -> None:
    model = two_layers()
    x = 3 * torch.randn(8, 5)
    model(x)
    total = range_penalty(model)
    model(x)
    mean = range_penalty(model, reduction="mean")
    by_layer = [(p / 4.8).pow(10) for p in inputs_of(model, x)]
    assert total.item() == pytest.approx(
        sum(p.sum().item() for p in by_layer) / 2, rel=1e-4
    )
    assert mean.item() == pytest.approx(
        sum(p.mean().item() for p in by_layer) / 2, rel=1e-4
    )


def test_every_input_counts_once_under_gradient_accumulation() -> None:
    model = two_layers()
    halves = (3 * torch.randn(8, 5)).split(4)

    def gradients(together: bool) -> list[Tensor]:
        model.zero_grad()
        if together:
            outputs = [model(half).sum() for half in halves]
            (sum(outputs) + range_penalty(model) * 2).backward()
        else:
            for half in halves:
                (model(half).sum() + range_penalty(model)).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    # Two forward passes are four recorded layers: the mean is over all of them.
    torch.testing.assert_close(gradients(True), gradients(False))
    assert range_penalty(model).item() == 0


def test_float32_under_mixed_precision() -> None:
    model = two_layers()
    with torch.autocast("cpu", torch.bfloat16):
        model(200 * torch.randn(8, 5))
        penalty = range_penalty(model)
    assert penalty.dtype == torch.float32
    assert bool(torch.isfinite(penalty))


def test_no_activation_and_no_recording_give_zero() -> None:
    assert range_penalty(nn.Linear(1, 1)).item() == 0
    assert boundary_penalty(two_layers()).item() == 0


def test_bad_arguments_are_named() -> None:
    model = two_layers()
    for power in (0, 3, -2):
        with pytest.raises(RangeError, match=f"power={power}"):
            range_penalty(model, power=power)
    with pytest.raises(RangeError, match="gamma=0"):
        range_penalty(model, gamma=0)
    with pytest.raises(RangeError, match="'max'"):
        range_penalty(model, reduction="max")
    with pytest.raises(RangeError, match="margin=1"):
        boundary_penalty(model, margin=1)


def test_warm_up_is_the_papers() -> None:
    stages = [warmup_stage(epoch) for epoch in range(7)]
    assert [(s.power, s.factor) for s in stages] == [
        (4, 1 / 100),
        (6, 1 / 50),
        (8, 1 / 10),
        (10, 1 / 5),
        (10, 1),
        (10, 1),
        (10, 1),
    ]
    assert [s.loss_weight for s in stages] == [0, 1, 1, 1, 1, 1, 1]


def test_warm_up_in_parts_of_an_epoch() -> None:
    steps = 429
    seen = [warmup_stage(s / steps, stage_epochs=0.25) for s in range(2 * steps)]
    firsts = [seen.index(stage) for stage in PAPER_WARMUP]
    assert firsts == [math.ceil(i * steps / 4) for i in range(5)]
    assert warmup_stage(0, stage_epochs=0) == PAPER_WARMUP[-1]
    assert warmup_stage(3, stages=(PenaltyStage(2, 1),)) == PenaltyStage(2, 1)


class Affine(nn.Module):
    """Multiplies by known factors, so that the ranges are known."""

    def __init__(self, first: float, second: float) -> None:
        super().__init__()
        self.factors = (first, second)
        self.one = PolynomialActivation(Polynomial((0, 1024), 10, (-5.0, 5.0)))
        self.two = PolynomialActivation(RELU)

    def forward(self, x: Tensor) -> Tensor:
        first = self.one(x * self.factors[0])
        return self.two(self.two(first * self.factors[1]))


def test_report_of_known_ranges() -> None:
    model = Affine(1.0, 2.0).train()
    x = torch.linspace(-4, 4, 8001).view(-1, 1)
    report = range_report(model, [x[:5000], (x[5000:], "labels")])
    assert model.training and model.two.training
    one, two, again = report.layers
    assert (one.name, two.name, again.name) == ("one", "two", "two #2")
    assert one.largest == 4 and one.outside == 0
    assert two.largest == 8
    assert two.outside == pytest.approx(3 / 8, abs=1e-3)
    for got, percent in zip(one.percentiles, (50, 99, 99.9, 99.99), strict=True):
        assert got == pytest.approx(4 * percent / 100, abs=0.01)
    # 62 bits, 35 of fraction, |p| up to 4.
    assert one.headroom_bits == pytest.approx(62 - 35 - 2, abs=1e-3)
    assert report.images == 8001
    assert report.unsafe is two
    assert "UNSAFE: two has 37.5" in report.verdict
    assert str(report).splitlines()[-1] == report.verdict
    assert range_report(model, [x], most_outside=0.5).unsafe is None


def test_overflow_is_found_at_the_first_layer() -> None:
    model = Affine(1.0, 1.0)
    x = torch.linspace(-4, 4, 100).view(-1, 1)
    report = range_report(model, [x], fixed_point=FixedPoint(frac_bits=16, out_bits=61))
    assert report.unsafe is report.layers[0]
    assert report.layers[0].headroom_bits == pytest.approx(-1, abs=1e-3)
    assert "lower out_bits" in report.verdict
    assert range_report(model, [x]).verdict.startswith("safe on 100 inputs")
    wanting = range_report(model, [x], spare_bits=25.5)
    assert wanting.unsafe is wanting.layers[0]


def test_inputs_that_are_not_finite_are_named() -> None:
    model = Affine(1.0, math.inf)
    report = range_report(model, [torch.tensor([[1.0], [0.0]])])
    assert report.unsafe is report.layers[1]
    assert "not finite" in report.verdict


def test_a_report_needs_activations_and_data() -> None:
    with pytest.raises(RangeError, match="the network has none"):
        range_report(nn.Linear(1, 1), [])
    with pytest.raises(RangeError, match="empty"):
        range_report(two_layers(), [])


def penalised(run) -> tuple[Tensor, list[Tensor]]:
    """Penalty and gradients of the second of two equal steps."""
    model = two_layers()
    x = 3 * torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        model.zero_grad()
        out = run(model, x)
        penalty = range_penalty(model)
        (out.sum() + penalty).backward()
    return penalty, [p.grad for p in model.parameters() if p.grad is not None]


def test_a_checkpoint_changes_neither_penalty_nor_gradient() -> None:
    plain = penalised(lambda model, x: model(x))
    again = penalised(lambda model, x: checkpoint(model, x, use_reentrant=False))
    torch.testing.assert_close(again, plain)
    assert plain[0] > 0


@pytest.mark.parametrize("penalty", [range_penalty, boundary_penalty])
def test_a_reentrant_checkpoint_is_an_error_where_a_penalty_would_be_zero(
    penalty,
) -> None:
    model = two_layers()
    x = torch.randn(8, 5, requires_grad=True)
    out = checkpoint(model, x, use_reentrant=True)
    with pytest.raises(TrainingError, match=r"of 1, 3 .*use_reentrant=False"):
        penalty(model)
    # Without a penalty it works as ever, and the next plain step has its penalty.
    out.sum().backward()
    checkpoint(model, x, use_reentrant=True).sum().backward()
    assert penalty(model) == 0
    model(40 * x)
    assert penalty(model) > 0


def test_a_pass_without_gradients_leaves_the_next_penalty_alone() -> None:
    model = two_layers()
    with torch.no_grad():
        model(torch.ones(2, 5))
    assert range_penalty(model) == 0
    model(9 * torch.ones(2, 5))
    assert range_penalty(model) > 0


def test_an_old_backward_pass_does_not_forget_a_new_input() -> None:
    model = two_layers()
    x = 3 * torch.randn(8, 5)
    first = model(x)
    expected = range_penalty(model)
    model(x)
    first.sum().backward()
    torch.testing.assert_close(range_penalty(model), expected)
