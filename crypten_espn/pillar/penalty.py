"""Keep activation inputs inside the interval.

`range_penalty` is the PILLAR paper's, with the warm-up of `PAPER_WARMUP`;
`boundary_penalty` acts only near and outside the interval. Both read the inputs that
`PolynomialActivation` recorded since the last call or backward pass, so they work
under gradient accumulation, automatic mixed precision and DistributedDataParallel.

Source: Diaa et al., USENIX Security 2024, section on the PILLAR training (penalty,
clip, warm-up); the boundary form after arXiv 2505.11589.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RangeError, TrainingError
from ..polynomial import AnyPolynomial, ChannelPolynomials
from . import elementwise
from .activation import interval_of
from .elementwise import Number
from .surgery import activations


@dataclass(frozen=True)
class PenaltyStage:
    """What holds during one part of the warm-up."""

    power: int
    factor: float
    loss_weight: float = 1.0


# Of the interval that the paper's gammas are for.
PAPER_RADIUS = 5.0

# One stage an epoch in the paper; the last stays for the rest of the training. The
# first leaves the cross-entropy out, so that ranges shrink before anything is learnt.
PAPER_WARMUP = (
    PenaltyStage(4, 1 / 100, loss_weight=0.0),
    PenaltyStage(6, 1 / 50),
    PenaltyStage(8, 1 / 10),
    PenaltyStage(10, 1 / 5),
    PenaltyStage(10, 1.0),
)


def warmup_stage(
    epoch: float,
    *,
    stage_epochs: float = 1.0,
    stages: tuple[PenaltyStage, ...] = PAPER_WARMUP,
) -> PenaltyStage:
    """Return the stage that holds at a (fractional) epoch.

    Args:
        epoch: epochs trained so far, from 0.
        stage_epochs: length of each stage but the last; the paper's is one epoch.
        stages: what to go through.
    """
    if stage_epochs <= 0:
        return stages[-1]
    # The nudge keeps a stage's first step in it despite the division.
    return stages[min(int(epoch / stage_epochs + 1e-9), len(stages) - 1)]


def range_penalty(
    model: nn.Module,
    *,
    gamma: float = 4.8,
    power: int = 10,
    reduction: str = "sum",
    tail: float | None = None,
) -> Tensor:
    """Return the penalty on large activation inputs, a float32 scalar.

    1. Each layer's penalty is the sum over its recorded inputs of |x / gamma|^power.
       Where channels have polynomials of their own, gamma counts as for the paper's
       radius of 5: the sum is of |x / (gamma R / 5)|^power, with R the larger end of
       the channel's interval in magnitude.
    2. The result is the mean over the layers.

    With reduction="mean" the sum of step 1 is divided by the number of elements, batch
    included. A sum grows with batch and layer: beta for the mean is the paper's beta
    times the batch size times the mean number of activations in a layer.

    Args:
        model: a network in training mode, after its forward pass.
        gamma: where the penalty of one element reaches 1; for a channel's own
            polynomial, at gamma / 5 of its radius.
        power: even and positive.
        reduction: "sum" (the paper's) or "mean".
        tail: how far out, in units of gamma, the power stops and its tangent goes on,
            so that one input far outside does not outweigh all the others; nowhere if
            None, as in the paper.

    Returns:
        A scalar on the network's device; zero if nothing was recorded. Recorded inputs
        are forgotten, so each counts once.

    Raises:
        RangeError: an argument is out of range.
        TrainingError: inputs passed under a reentrant checkpoint, where autograd does
            not see them; use_reentrant=False does.
    """
    if power < 2 or power % 2 or not gamma > 0:
        raise RangeError(
            f"range_penalty was given power={power}, gamma={gamma}; power must be even "
            "and positive, gamma positive"
        )
    if tail is not None and not 1 <= tail < math.inf:
        raise RangeError(
            f"range_penalty was given tail={tail}; it is None or from 1 on, in units "
            "of gamma"
        )
    bend = math.inf if tail is None else tail
    return _mean_over_layers(
        model, reduction, lambda x, p: _PowerSum.apply(x, _unit(gamma, p), power, bend)
    )


def boundary_penalty(
    model: nn.Module, *, margin: float = 0.9, reduction: str = "sum"
) -> Tensor:
    """Return a penalty that is zero well inside the interval, a float32 scalar.

    With c and r the centre and half-width of the interval, the channel's own where it
    has one, and t = |x - c| / r, an element costs max(t - margin, 0)^2 /
    (1 - margin)^2, which is 1 at the interval's ends. It grows quadratically, so its
    gradient stays bounded where a power's explodes.

    Args:
        model: a network in training mode, after its forward pass.
        margin: the share of the interval, from its centre, that costs nothing.
        reduction: "sum" or "mean" over the elements of a layer; then the mean over
            the layers.

    Returns:
        A scalar on the network's device; zero if nothing was recorded. Recorded inputs
        are forgotten, so each counts once.

    Raises:
        RangeError: an argument is out of range.
        TrainingError: inputs passed under a reentrant checkpoint, where autograd does
            not see them; use_reentrant=False does.
    """
    if not 0 <= margin < 1:
        raise RangeError(
            f"boundary_penalty was given margin={margin}; it must be in [0, 1)"
        )
    return _mean_over_layers(
        model,
        reduction,
        lambda x, p: _BoundarySum.apply(x, *interval_of(p), margin),
    )


def _unit(gamma: float, polynomial: AnyPolynomial) -> Number:
    """What an input of penalty 1 measures."""
    if isinstance(polynomial, ChannelPolynomials):
        return polynomial.radii * (gamma / PAPER_RADIUS)
    return gamma


def _mean_over_layers(
    model: nn.Module,
    reduction: str,
    penalty: Callable[[Tensor, AnyPolynomial], Tensor],
) -> Tensor:
    if reduction not in ("sum", "mean"):
        raise RangeError(
            f"a penalty was given reduction={reduction!r}; it is 'sum' or 'mean'"
        )
    layers, hidden = [], []
    for name, module in activations(model).items():
        if module.take_hidden():
            hidden.append(name or "(model)")
        for x in module.take_recorded():
            value = penalty(x, module.polynomial)
            layers.append(value / x.numel() if reduction == "mean" else value)
    if hidden:
        more = f" and {len(hidden) - 3} more" if len(hidden) > 3 else ""
        raise TrainingError(
            f"the inputs of {', '.join(hidden[:3])}{more} passed inside "
            "an autograd.Function, such as torch.utils.checkpoint with "
            "use_reentrant=True, where they carry no gradient yet and a penalty would "
            "be zero; checkpoint with use_reentrant=False"
        )
    if not layers:
        parameter = next(model.parameters(), None)
        return torch.zeros((), device=None if parameter is None else parameter.device)
    return torch.stack(layers).mean()


class _PowerSum(torch.autograd.Function):
    """sum |x / unit|^power for an even power, its tangent beyond |x / unit| = bend."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, unit: Number, power: int, bend: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.form = unit, power, bend
        return elementwise.power_sum(x, *ctx.form).float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (x,), (unit, power, bend) = ctx.saved_tensors, ctx.form
        scale = gradients[0].double() * power
        slope = elementwise.power_slope(x, unit, power, scale, bend)
        return slope, None, None, None


class _BoundarySum(torch.autograd.Function):
    """sum max(|x - c| / r - margin, 0)^2 / (1 - margin)^2."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, low: Number, high: Number, margin: float
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.form = (low + high) / 2, (high - low) / 2, margin
        return (elementwise.excess_sum(x, *ctx.form) / (1 - margin) ** 2).float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (x,), (centre, radius, margin) = ctx.saved_tensors, ctx.form
        scale = gradients[0] * (2 / (1 - margin) ** 2)
        slope = elementwise.excess_slope(x, centre, radius, margin, scale)
        return slope, None, None, None
