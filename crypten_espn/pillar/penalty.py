"""Keep activation inputs inside the interval, and check that they stay there.

`range_penalty` is the PILLAR paper's, with the warm-up of `PAPER_WARMUP`;
`boundary_penalty` acts only near and outside the interval. Both read the inputs that
`PolynomialActivation` recorded since the last call or backward pass, so they work
under gradient accumulation, automatic mixed precision and DistributedDataParallel.
`range_report` runs data through a trained network and judges every layer.

Source: Diaa et al., USENIX Security 2024, section on the PILLAR training (penalty,
clip, warm-up); the boundary form after arXiv 2505.11589.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RangeError, TrainingError
from ..polynomial import RING_BITS, Polynomial
from . import elementwise
from .surgery import activations


@dataclass(frozen=True)
class PenaltyStage:
    """What holds during one part of the warm-up."""

    power: int
    factor: float
    loss_weight: float = 1.0


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
    model: nn.Module, *, gamma: float = 4.8, power: int = 10, reduction: str = "sum"
) -> Tensor:
    """Return the penalty on large activation inputs, a float32 scalar.

    1. Each layer's penalty is the sum over its recorded inputs of |x / gamma|^power.
    2. The result is the mean over the layers.

    With reduction="mean" the sum of step 1 is divided by the number of elements, batch
    included. A sum grows with batch and layer: beta for the mean is the paper's beta
    times the batch size times the mean number of activations in a layer.

    Args:
        model: a network in training mode, after its forward pass.
        gamma: where the penalty of one element reaches 1.
        power: even and positive.
        reduction: "sum" (the paper's) or "mean".

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
    return _mean_over_layers(
        model, reduction, lambda x, _: _PowerSum.apply(x, gamma, power)
    )


def boundary_penalty(
    model: nn.Module, *, margin: float = 0.9, reduction: str = "sum"
) -> Tensor:
    """Return a penalty that is zero well inside the interval, a float32 scalar.

    With c and r the interval's centre and half-width and t = |x - c| / r, an element
    costs max(t - margin, 0)^2 / (1 - margin)^2, which is 1 at the interval's ends. It
    grows quadratically, so its gradient stays bounded where a power's explodes.

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
        lambda x, polynomial: _BoundarySum.apply(x, *polynomial.interval, margin),
    )


def _mean_over_layers(model: nn.Module, reduction: str, penalty: Any) -> Tensor:
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
    """sum |x / gamma|^power for an even power."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: float, power: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.gamma, ctx.power = gamma, power
        return (elementwise.power_sum(x, power) / gamma**power).float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        scale = gradients[0].double() * (ctx.power / ctx.gamma**ctx.power)
        return elementwise.power_slope(x, ctx.power, scale), None, None


class _BoundarySum(torch.autograd.Function):
    """sum max(|x - c| / r - margin, 0)^2 / (1 - margin)^2."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float, margin: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.form = (low + high) / 2, (high - low) / 2, margin
        return (elementwise.excess_sum(x, *ctx.form) / (1 - margin) ** 2).float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        centre, radius, margin = ctx.form
        scale = gradients[0] * (2 / radius / (1 - margin) ** 2)
        slope = elementwise.excess_slope(x, centre, radius, margin, scale)
        return slope, None, None, None


@dataclass(frozen=True)
class FixedPoint:
    """The format in which parties will hold a layer's input and output.

    Args:
        frac_bits: fractional bits of the input.
        out_bits: fractional bits of the polynomial before its truncation.
        ring_bits: bits of the largest magnitude that may appear.
    """

    frac_bits: int = 16
    out_bits: int = 35
    ring_bits: int = RING_BITS


@dataclass(frozen=True)
class LayerRange:
    """What one activation saw.

    Attributes:
        name: the module's dotted name, with "#2" and so on for a module called again.
        largest: largest |input|.
        outside: share of the inputs outside the interval.
        percentiles: |input| not exceeded by 50, 99, 99.9 and 99.99 % of the inputs.
        headroom_bits: bits left, for the largest input, before the input or the
            polynomial's value overflows the format; negative means overflow.
        finite: whether every input was finite.
    """

    name: str
    largest: float
    outside: float
    percentiles: tuple[float, ...]
    headroom_bits: float
    finite: bool


PERCENTILES = (50.0, 99.0, 99.9, 99.99)


@dataclass(frozen=True)
class RangeReport:
    """Every layer's ranges; `str` is a table with the verdict as its last line."""

    layers: tuple[LayerRange, ...]
    images: int
    fixed_point: FixedPoint
    most_outside: float
    spare_bits: float

    @property
    def unsafe(self) -> LayerRange | None:
        """The first layer that would not run safely, or None."""
        for layer in self.layers:
            if self._fault(layer):
                return layer
        return None

    @property
    def verdict(self) -> str:
        """One sentence: safe, or the first unsafe layer, what is wrong, the cure."""
        layer = self.unsafe
        if layer is None:
            least = min((x.headroom_bits for x in self.layers), default=math.inf)
            return f"safe on {self.images} inputs: at least {least:.1f} bits to spare"
        return f"UNSAFE: {layer.name} {self._fault(layer)}"

    def _fault(self, layer: LayerRange) -> str:
        if not layer.finite:
            return "has inputs that are not finite; train again with a larger beta"
        if layer.headroom_bits < self.spare_bits:
            return (
                f"leaves {layer.headroom_bits:.1f} bits at |input| "
                f"{layer.largest:.3g}, {self.spare_bits:g} are wanted; train with a "
                "larger beta or lower out_bits"
            )
        if layer.outside > self.most_outside:
            return (
                f"has {layer.outside:.2%} of its inputs outside the interval, at most "
                f"{self.most_outside:.2%} is allowed; train with a larger beta or a "
                "smaller gamma"
            )
        return ""

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers] + [5])
        head = "  ".join(f"{f'{p:g} %':>8}" for p in PERCENTILES)
        lines = [
            f"{'layer':<{width}}  {'largest':>8}  {'outside':>8}  {head}  {'bits':>5}"
        ]
        for layer in self.layers:
            cells = "  ".join(f"{p:>8.3f}" for p in layer.percentiles)
            lines.append(
                f"{layer.name:<{width}}  {layer.largest:>8.3g}  {layer.outside:>8.4%}  "
                f"{cells}  {layer.headroom_bits:>5.1f}"
            )
        return "\n".join([*lines, self.verdict])


def range_report(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    fixed_point: FixedPoint | None = None,
    most_outside: float = 0.01,
    spare_bits: float = 0.0,
) -> RangeReport:
    """Return the ranges of every activation input over the data, with a verdict.

    The network runs in evaluation mode, without gradients, and is put back.

    Args:
        model: a network with `PolynomialActivation`s.
        loader: batches: a tensor, or a tuple that starts with one.
        fixed_point: the parties' format; the default is `FixedPoint()`.
        most_outside: share of inputs outside the interval that is still called safe.
        spare_bits: headroom below which a layer is called unsafe.

    Returns:
        A RangeReport, layers in the order of their first call.

    Raises:
        RangeError: the network has no polynomial activation, or the loader is empty.
    """
    form = fixed_point or FixedPoint()
    modules = activations(model)
    if not modules:
        raise RangeError(
            "range_report needs polynomial activations and the network has none; "
            "use replace_activations first"
        )
    seen: dict[tuple[str, int], _Tally] = {}
    calls: dict[str, int] = {}
    handles = []
    for name, module in modules.items():

        def hook(
            module: nn.Module, inputs: tuple[Tensor, ...], name: str = name
        ) -> None:
            calls[name] = calls.get(name, 0) + 1
            key = (name, calls[name])
            if key not in seen:
                polynomial = module.polynomial
                assert isinstance(polynomial, Polynomial)
                seen[key] = _Tally(polynomial)
            seen[key].add(inputs[0].detach())

        handles.append(module.register_forward_pre_hook(hook))
    training = {module: module.training for module in model.modules()}
    parameter = next(model.parameters(), None)
    images = 0
    try:
        model.eval()
        with torch.no_grad():
            for batch in loader:
                x = batch if isinstance(batch, Tensor) else batch[0]
                calls.clear()
                model(x if parameter is None else x.to(parameter.device))
                images += len(x)
    finally:
        for handle in handles:
            handle.remove()
        for part, mode in training.items():
            part.training = mode
    if not images:
        raise RangeError("range_report was given no data; the loader is empty")
    layers = tuple(
        tally.layer(name if call == 1 else f"{name} #{call}", form)
        for (name, call), tally in seen.items()
    )
    return RangeReport(layers, images, form, most_outside, spare_bits)


# |input| is counted in bins of 1/_BINS_PER_UNIT of the interval's farther end.
_BINS_PER_UNIT = 1024
_BINS = 8 * _BINS_PER_UNIT


@dataclass
class _Tally:
    """Counts over batches, in bounded memory."""

    polynomial: Polynomial
    largest: float = 0.0
    lowest: float = 0.0
    highest: float = 0.0
    outside: int = 0
    total: int = 0
    finite: bool = True
    histogram: Tensor = field(
        default_factory=lambda: torch.zeros(_BINS, dtype=torch.int64)
    )

    def add(self, x: Tensor) -> None:
        low, high = self.polynomial.interval
        x = x.float()
        good = torch.isfinite(x)
        if not bool(good.all()):
            self.finite = False
            x = x[good]
        self.total += x.numel()
        if not x.numel():
            return
        smallest, greatest = (float(v) for v in torch.aminmax(x))
        self.lowest = min(self.lowest, smallest)
        self.highest = max(self.highest, greatest)
        self.largest = max(self.largest, abs(smallest), abs(greatest))
        self.outside += int(((x < low) | (x > high)).sum())
        unit = max(abs(low), abs(high))
        bins = (x.abs() * (_BINS_PER_UNIT / unit)).clamp_(max=_BINS - 1).long()
        self.histogram += torch.bincount(bins.flatten().cpu(), minlength=_BINS)

    def layer(self, name: str, form: FixedPoint) -> LayerRange:
        unit = max(abs(end) for end in self.polynomial.interval)
        running = self.histogram.cumsum(0)
        percentiles = []
        for percent in PERCENTILES:
            rank = math.ceil(self.total * percent / 100)
            index = int(torch.searchsorted(running, rank))
            at_end = index >= _BINS - 1
            bound = self.largest if at_end else (index + 1) * unit / _BINS_PER_UNIT
            percentiles.append(min(bound, self.largest))
        return LayerRange(
            name,
            self.largest,
            self.outside / max(self.total, 1),
            tuple(percentiles),
            self._headroom(form),
            self.finite,
        )

    def _headroom(self, form: FixedPoint) -> float:
        value = self.polynomial.max_abs(self.lowest, self.highest)
        return form.ring_bits - max(
            form.frac_bits + math.log2(max(self.largest, 2.0**-30)),
            form.out_bits + math.log2(max(value, 2.0**-30)),
        )
