"""Whether activation inputs stay inside the interval, and inside the ring.

`range_report` runs data through a trained network and judges every layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RangeError
from ..polynomial import RING_BITS, Polynomial
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
