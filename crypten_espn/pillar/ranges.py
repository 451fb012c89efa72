"""Whether activation inputs stay inside the interval, and inside the ring.

`range_report` runs data through a trained network and judges every layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import RangeError
from ..polynomial import RING_BITS, AnyPolynomial, ChannelPolynomials
from .activation import PolynomialActivation
from .guard import guard_of
from .keeping import evaluating
from .stress import StressReport, corruptions, reaches
from .stress import stress as run_stress
from .surgery import activations


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
        outside: share of the inputs outside the interval. Where channels have
            polynomials of their own, each is held to its own, and this is the share in
            the worst channel.
        percentiles: |input| not exceeded by 50, 99, 99.9 and 99.99 % of the inputs.
        headroom_bits: bits left, for the largest input, before the input or the
            polynomial's value overflows the format; negative means overflow. The
            least of the channels', each with its own polynomial and largest input.
        finite: whether every input was finite.
        channel: the worst channel, by `outside`; None if one polynomial serves all.
    """

    name: str
    largest: float
    outside: float
    percentiles: tuple[float, ...]
    headroom_bits: float
    finite: bool
    channel: int | None = None


# Images that are corrupted: enough to see what blows up.
STRESSED = 16
PERCENTILES = (50.0, 99.0, 99.9, 99.99)


@dataclass(frozen=True)
class Stressed:
    """What corruptions of the first images do; `str` is two lines.

    Attributes:
        report: what escapes, by corruption and by layer.
        layers: every activation's ranges on all corruptions together.
        refused: of the inputs that leave an interval, how many the network's guard
            refuses; None if it carries none.
    """

    report: StressReport
    layers: tuple[LayerRange, ...]
    refused: int | None

    def __str__(self) -> str:
        least = min(self.layers, key=lambda layer: (layer.finite, layer.headroom_bits))
        escaping = sum(row.escaping for row in self.report.rows)
        bits = least.headroom_bits if least.finite else -math.inf
        ring = "fits the ring" if bits >= 0 else "overflows the ring"
        guard = (
            "the network carries no input guard"
            if self.refused is None
            else f"the input guard refuses {self.refused} of the {escaping}"
        )
        return (
            f"stress: {self.report.verdict}\n"
            f"the largest value {ring}, with {bits:.1f} bits to spare at "
            f"{least.name}; {guard}"
        )


@dataclass(frozen=True)
class RangeReport:
    """Every layer's ranges; `str` is a table with the verdict as its last line.

    Attributes:
        layers: on the data, which the verdict is of.
        stressed: likewise on corruptions of the first images; None if not asked for.
    """

    layers: tuple[LayerRange, ...]
    images: int
    fixed_point: FixedPoint
    most_outside: float
    spare_bits: float
    stressed: Stressed | None = None

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
            where = (
                "its inputs"
                if layer.channel is None
                else (f"channel {layer.channel}'s inputs")
            )
            return (
                f"has {layer.outside:.2%} of {where} outside the interval, at most "
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
        lines += [] if self.stressed is None else [str(self.stressed)]
        return "\n".join([*lines, self.verdict])


def range_report(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    fixed_point: FixedPoint | None = None,
    most_outside: float = 0.01,
    spare_bits: float = 0.0,
    stress: bool = False,
) -> RangeReport:
    """Return the ranges of every activation input over the data, with a verdict.

    The network runs in evaluation mode, without gradients, and is put back.

    Args:
        model: a network with `PolynomialActivation`s.
        loader: batches: a tensor, or a tuple that starts with one.
        fixed_point: the parties' format; the default is `FixedPoint()`.
        most_outside: share of inputs outside the interval that is still called safe.
        spare_bits: headroom below which a layer is called unsafe.
        stress: whether the first 16 images are corrupted as `stress` does, too, and
            what that does reported beside the verdict; some sixty more passes over
            them.

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
                assert isinstance(module, PolynomialActivation)
                seen[key] = _Tally(module.polynomial)
            seen[key].add(inputs[0].detach())

        handles.append(module.register_forward_pre_hook(hook))
    parameter = next(model.parameters(), None)
    images = 0
    first: list[Tensor] = []
    try:
        with evaluating(model):
            for batch in loader:
                x = batch if isinstance(batch, Tensor) else batch[0]
                if stress and images < STRESSED:
                    first.append(x[: STRESSED - images].detach().cpu())
                calls.clear()
                model(x if parameter is None else x.to(parameter.device))
                images += len(x)
    finally:
        for handle in handles:
            handle.remove()
    if not images:
        raise RangeError("range_report was given no data; the loader is empty")
    layers = tuple(
        tally.layer(name if call == 1 else f"{name} #{call}", form)
        for (name, call), tally in seen.items()
    )
    stressed = _stressed(model, torch.cat(first), form) if first else None
    return RangeReport(layers, images, form, most_outside, spare_bits, stressed)


def _stressed(model: nn.Module, images: Tensor, form: FixedPoint) -> Stressed:
    given = corruptions(images.float()).values()
    ranges = range_report(model, given, fixed_point=form)
    guard, refused = guard_of(model), None
    if guard is not None:
        refused = sum(
            int((guard.refused(x) & (reaches(model, x)[0] > 1.0)).sum()) for x in given
        )
    return Stressed(run_stress(model, images), ranges.layers, refused)


# |input| is counted in bins of 1/_BINS_PER_UNIT of the interval's farther end.
_BINS_PER_UNIT = 1024
_BINS = 8 * _BINS_PER_UNIT


class _Tally:
    """Counts over batches, in bounded memory.

    What is counted by channel has one channel where one polynomial serves all.
    """

    def __init__(self, polynomial: AnyPolynomial) -> None:
        self.polynomial = polynomial
        self.by_channel = isinstance(polynomial, ChannelPolynomials)
        self.rows = polynomial.rows
        intervals = torch.tensor([row.interval for row in self.rows])
        self.low, self.high = intervals.T
        self.unit = float(intervals.abs().max())
        self.lowest = torch.zeros(len(self.rows))
        self.highest = torch.zeros(len(self.rows))
        self.outside = torch.zeros(len(self.rows), dtype=torch.int64)
        self.counts = torch.zeros(len(self.rows), dtype=torch.int64)
        self.finite = True
        self.histogram = torch.zeros(_BINS, dtype=torch.int64)

    @property
    def largest(self) -> float:
        """The largest |input| of all channels."""
        return float(torch.maximum(self.highest, -self.lowest).max())

    def add(self, x: Tensor) -> None:
        if isinstance(self.polynomial, ChannelPolynomials):
            self.polynomial.check_channels(tuple(x.shape))
            x = x.transpose(0, 1)
        x = x.float().reshape(len(self.rows), -1)
        good = torch.isfinite(x)
        self.finite = self.finite and bool(good.all())
        self.counts += good.sum(1).cpu()
        if not x.numel():
            return
        # Zero is among what the smallest and the largest are taken of.
        kept = x.where(good, torch.zeros_like(x))
        low, high = self.low.to(x.device)[:, None], self.high.to(x.device)[:, None]
        self.lowest = torch.minimum(self.lowest, kept.amin(1).cpu())
        self.highest = torch.maximum(self.highest, kept.amax(1).cpu())
        self.outside += (((x < low) | (x > high)) & good).sum(1).cpu()
        magnitude = x[good].abs() * (_BINS_PER_UNIT / self.unit)
        bins = magnitude.clamp_(max=_BINS - 1).long()
        self.histogram += torch.bincount(bins.cpu(), minlength=_BINS)

    def layer(self, name: str, form: FixedPoint) -> LayerRange:
        largest, total = self.largest, int(self.counts.sum())
        running = self.histogram.cumsum(0)
        percentiles = []
        for percent in PERCENTILES:
            rank = math.ceil(total * percent / 100)
            index = int(torch.searchsorted(running, rank))
            at_end = index >= _BINS - 1
            bound = largest if at_end else (index + 1) * self.unit / _BINS_PER_UNIT
            percentiles.append(min(bound, largest))
        shares = self.outside.double() / self.counts.clamp(min=1)
        return LayerRange(
            name,
            largest,
            float(shares.max()),
            tuple(percentiles),
            self._headroom(form),
            self.finite,
            int(shares.argmax()) if self.by_channel else None,
        )

    def _headroom(self, form: FixedPoint) -> float:
        ends = zip(self.rows, self.lowest.tolist(), self.highest.tolist(), strict=True)
        # Of inputs that stress makes huge, a value may be beyond float64.
        with np.errstate(over="ignore", invalid="ignore"):
            values = [row.max_abs(low, high) for row, low, high in ends]
        value = max(math.inf if math.isnan(v) else v for v in values)
        return form.ring_bits - max(
            form.frac_bits + math.log2(max(self.largest, 2.0**-30)),
            form.out_bits + math.log2(max(value, 2.0**-30)),
        )
