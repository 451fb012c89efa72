"""What `explain` found: errors by layer, first fault, verdict and its cure."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..engines import MASKED
from ..table import aligned

# Failed truncations an input may have before the verdict speaks of them.
_RARE = 1e-3


@dataclass(frozen=True)
class Fault:
    """A value that the ring could not hold.

    Args:
        layer: where.
        kind: "wraps" (too large for the ring, wrong in every run) or "truncation
            failed" (a local truncation met an unlucky share, wrong in some runs).
        element: its index; the first number is the input's.
        value: what it should have been, in the network's units.
        headroom_bits: bits left for it in the ring; negative when it does not fit.
    """

    layer: str
    kind: str
    element: tuple[int, ...]
    value: float
    headroom_bits: float

    def __str__(self) -> str:
        place = ", ".join(map(str, self.element))
        return (
            f"{self.layer}: {self.kind} at element ({place}), value {self.value:.4g}, "
            f"headroom {self.headroom_bits:.1f} bits"
        )


# What one of a value's integers stands for; a tensor broadcasts over them.
Unit = float | torch.Tensor


def fault_at(kind: str, wide: torch.Tensor, at: int, unit: Unit, limit: int) -> Fault:
    """The fault at flat index `at` of integers `wide`; the layer is not set."""
    value = float(wide.flatten()[at])
    place = [int(i) for i in torch.unravel_index(torch.tensor(at), wide.shape)]
    room = limit - math.log2(max(abs(value), 1.0))
    own = float(torch.as_tensor(unit).expand(wide.shape).flatten()[at])
    return Fault("", kind, tuple(place), value * own, room)


@dataclass(frozen=True)
class LayerError:
    """One layer's integers against the real network. Values in the network's units.

    Args:
        layer, operation: which.
        unit: 2**-frac_bits, one unit of its result.
        largest: largest |value| of the real network.
        max_error, mean_error: of |simulated - real|, all layers before included.
        added: what this layer added itself, root mean square; NaN where it is not
            measured (the masked engine states it as the plan's noise).
        rounding: what two private runs may differ by here: twice the largest difference
            between any two simulated runs, and at least two units. An estimate; NaN
            when one run was simulated.
        headroom_bits: what the largest integer leaves in the ring.
        failures: expected failed truncations for one input.
    """

    layer: str
    operation: str
    unit: float
    largest: float
    max_error: float
    mean_error: float
    added: float
    rounding: float
    headroom_bits: float
    failures: float

    @property
    def max_error_units(self) -> float:
        """`max_error` in units of the layer's result."""
        return self.max_error / self.unit

    @property
    def mean_error_units(self) -> float:
        """`mean_error` in units of the layer's result."""
        return self.mean_error / self.unit


@dataclass(frozen=True)
class Explanation:
    """What `explain` found. `str()` is a table with a verdict and the cure.

    Args:
        protocol: how it was computed, in words.
        layers: in the order of computation.
        logits: float32 (batch, *output_shape), of one simulated run.
        clear: the real network's.
        overflow: the first value that wraps, or None.
        failure: the first truncation that failed in the simulated runs, or None.
    """

    protocol: str
    layers: tuple[LayerError, ...]
    logits: torch.Tensor
    clear: torch.Tensor
    overflow: Fault | None
    failure: Fault | None

    @property
    def max_error(self) -> float:
        """Largest error of a logit."""
        return float((self.logits.double() - self.clear).abs().max())

    @property
    def agreement(self) -> float:
        """Share of inputs with the same largest logit as in the clear."""
        same = self.logits.flatten(1).argmax(1) == self.clear.flatten(1).argmax(1)
        return float(same.double().mean())

    @property
    def rounding(self) -> float:
        """The declared rounding of the logits: what two private runs may differ by."""
        return self.layers[-1].rounding

    @property
    def failures(self) -> float:
        """Expected failed truncations for one input."""
        return sum(layer.failures for layer in self.layers)

    @property
    def least_headroom(self) -> LayerError:
        """The layer that leaves the fewest bits."""
        return min(self.layers, key=lambda layer: layer.headroom_bits)

    @property
    def noisiest(self) -> LayerError | None:
        """The layer that adds most error for its size; None if it is not measured."""
        measured = [layer for layer in self.layers if not math.isnan(layer.added)]
        if not measured:
            return None
        return max(measured, key=lambda layer: layer.added / max(layer.largest, 1e-9))

    @property
    def verdict(self) -> str:
        """One sentence: does the private result stand, and if not, why."""
        if self.overflow is not None:
            return f"overflow: {self.overflow}"
        if self.failures > _RARE:
            return (
                f"{self.failures:.2g} truncations fail per input, first in "
                f"{max(self.layers, key=lambda layer: layer.failures).layer}"
            )
        count = len(self.clear)
        agree = round(self.agreement * count)
        text = f"fits the ring; {agree} of {count} answers are those in the clear"
        top = self.clear.flatten(1).topk(2, 1).values if self._has_margin else None
        if top is not None:
            close = int(((top[:, 0] - top[:, 1]) < 2 * self.max_error).sum())
            text += f"; {close} have a margin below twice the largest error"
        return text

    @property
    def _has_margin(self) -> bool:
        return self.clear.flatten(1).shape[1] > 1

    @property
    def cure(self) -> str:
        """What to change, or that nothing has to be."""
        masked = self.protocol.startswith(MASKED)
        if self.overflow is not None:
            if masked:
                return (
                    "calibrate with inputs like these, raise headroom, or take "
                    'precision="high"'
                )
            return (
                "lower cfg.encoder.precision_bits, or train with range_penalty so that "
                "values stay inside the polynomial's interval"
            )
        if self.failures > _RARE:
            worst = max(self.layers, key=lambda layer: layer.failures)
            if worst.operation == "PolynomialActivation":
                return 'truncation="exact", or raise cfg.espn.failure_bits'
            return "lower cfg.encoder.precision_bits, or use the masked engine"
        if self.agreement == 1.0:
            return "none needed"
        if masked:
            return 'precision="high" keeps eight more bits'
        noisy = self.noisiest
        if (
            noisy is not None
            and noisy.operation == "PolynomialActivation"
            and "local" in self.protocol
        ):
            return (
                f"{noisy.layer} adds most error for its size: the truncation of its "
                'result. truncation="exact" costs a round and removes it'
            )
        return "raise cfg.encoder.precision_bits by the bits the headroom allows"

    def __str__(self) -> str:
        head = (
            *("layer", "operation", "largest", "max error", "mean", "units"),
            *("added", "two runs", "headroom", "failures"),
        )
        rows = [head]
        for layer in self.layers:
            rows.append(
                (
                    layer.layer,
                    layer.operation,
                    f"{layer.largest:.3g}",
                    f"{layer.max_error:.2g}",
                    f"{layer.mean_error:.2g}",
                    f"{layer.mean_error_units:.2g}",
                    _number(layer.added),
                    _number(layer.rounding),
                    f"{layer.headroom_bits:.1f}",
                    f"{layer.failures:.1g}" if layer.failures else "0",
                )
            )
        lines = [f"{self.protocol}; {len(self.clear)} inputs", *aligned(rows, left=2)]
        logits = f"logits: largest error {self.max_error:.2g}"
        if not math.isnan(self.rounding):
            logits += f", two private runs differ by up to {self.rounding:.2g}"
        lines.append(logits)
        if self.failure is not None and self.overflow is None:
            lines.append(f"seen: {self.failure}")
        lines += [f"verdict: {self.verdict}", f"cure: {self.cure}"]
        return "\n".join(lines)


@dataclass(frozen=True)
class Comparison:
    """`explain` at several precisions; `str()` puts them side by side.

    Args:
        results: pairs of the precision and what was found there.
    """

    results: tuple[tuple[int | str, Explanation], ...]

    def __str__(self) -> str:
        rows = [
            (
                *("precision", "largest logit error", "two runs", "agreement"),
                *("least headroom", "failures per input", "first overflow"),
            )
        ]
        for precision, found in self.results:
            least = found.least_headroom
            rows.append(
                (
                    str(precision),
                    f"{found.max_error:.2g}",
                    _number(found.rounding),
                    f"{found.agreement:.2%}",
                    f"{least.headroom_bits:.1f} bits, {least.layer}",
                    f"{found.failures:.1g}",
                    "none" if found.overflow is None else found.overflow.layer,
                )
            )
        return "\n".join(aligned(rows, left=1))


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2g}"
