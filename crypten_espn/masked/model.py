"""What the owner of a network holds: the plan, the weights as integers, and a report.

Only the plan leaves the owner. Weights never do, and neither does the report: the
values seen in calibration are a fingerprint of weights and calibration images.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ..errors import PlanError
from ..table import aligned
from ..wire.packing import packed_bytes
from . import kernels
from .inference import online_bytes
from .plan import Plan, Step


@dataclass(frozen=True)
class Weights:
    """A model's weights as integers in kernel layout. The server's secret.

    Args:
        integers: per weight, `WeightShape.kernel_layout`, in the type of its ring.
        biases: per weight, (filters,) in the same type, or None.
    """

    integers: tuple[np.ndarray, ...] = field(repr=False)
    biases: tuple[np.ndarray | None, ...] = field(repr=False)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of all integers: which model offline material was made for."""
        digest = hashlib.sha256()
        for array in (*self.integers, *self.biases):
            digest.update(b"-" if array is None else array.tobytes())
        return digest.digest()


@dataclass(frozen=True)
class Quantisation:
    """How one layer's real weights become integers.

    Args:
        name: the layer.
        parameter, bias: names of the parameters in the converted network; bias may be
            empty.
        factor, bias_factor: integers are round(real * factor).
    """

    name: str
    parameter: str
    bias: str
    factor: float
    bias_factor: float


@dataclass(frozen=True)
class PartReport:
    """What calibration says of one linear part.

    Args:
        name: the layer that ends it.
        bound: the largest |z| that is allowed for.
        seen: the largest |z| of the calibration inputs.
        noise: estimated standard deviation of z's error from this part's roundings.
    """

    name: str
    bound: float
    seen: float
    noise: float


@dataclass(frozen=True)
class PlanReport:
    """What the owner alone may see of a plan.

    Args:
        parts: by linear part, the output last.
        weights: by weight.
        logits_error: estimated standard deviation of a logit's error from all roundings.
        coins_error: of that, what differs between two inferences of one input.
    """

    parts: tuple[PartReport, ...]
    weights: tuple[Quantisation, ...]
    logits_error: float
    coins_error: float


@dataclass(frozen=True)
class MaskedModel:
    """A network ready for the masked engine."""

    plan: Plan
    weights: Weights
    report: PlanReport

    def __str__(self) -> str:
        """The plan as a table, with what the report knows of each layer."""
        return table(self.plan, self.report)


def quantise(
    plan: Plan, report: PlanReport, parameters: Mapping[str, np.ndarray]
) -> Weights:
    """Round a network's real weights to the plan's integers.

    Args:
        plan, report: made for this network.
        parameters: real arrays by name, as `parameters_of` gives them.

    Raises: PlanError if a parameter is missing, not finite, or has another shape.
    """
    integers, biases = [], []
    for shape, how in zip(plan.weights, report.weights, strict=True):
        array = parameters.get(how.parameter)
        if array is None or array.size != shape.elements:
            raise PlanError(
                f"{how.name}: the plan expects weights of shape {shape.shape}; make "
                "the plan from this network."
            )
        dtype = kernels.ring_dtype(shape.ring)
        real = np.asarray(array, dtype=np.float64).reshape(shape.shape)
        if not np.isfinite(real).all():
            raise PlanError(f"{how.name}: a weight is NaN or infinite.")
        whole = shape.arrange(np.rint(real * how.factor).astype(np.int64))
        integers.append(whole.astype(dtype))
        bias = None
        if how.bias:
            shift = np.asarray(parameters[how.bias], dtype=np.float64).reshape(-1)
            bias = np.rint(shift * how.bias_factor).astype(np.int64).astype(dtype)
        biases.append(bias)
    return Weights(tuple(integers), tuple(biases))


_HEAD = (
    "layer", "shape", "ring", "scale", "powers", "opens", "sends", "seen", "allowed",
    "noise",
)  # fmt: skip


def table(plan: Plan, report: PlanReport) -> str:
    """A plan as a table: each layer's rings, scales, bytes and bounds, and the sums."""
    rows = [_HEAD]
    for number, (part, known) in enumerate(zip(plan.parts, report.parts, strict=True)):
        elements = plan.elements(number)
        scale, powers, opens = str(part.frac_bits), "-", "-"
        sent = packed_bytes(elements, part.ring)
        if isinstance(part, Step):
            act = part.activation
            scale += f" -> {act.value_frac_bits} -> {act.frac_bits}"
            shifts = [group.shift for group in act.groups]
            if act.linear is not None:
                shifts.insert(0, act.linear.shift)
            powers = " ".join(str(part.frac_bits - shift) for shift in shifts)
            opens = "+".join(map(str, (*part.opened_bits, act.sent_bits)))
            sent = sum(
                packed_bytes(elements, bits)
                for bits in (*part.opened_bits, act.sent_bits)
            )
        shape = (
            plan.shapes[number + 1] if isinstance(part, Step) else plan.logits_shape
        )
        rows.append(
            (
                known.name,
                "x".join(map(str, shape)),
                str(part.ring),
                scale,
                powers,
                opens,
                f"{sent:,}",
                f"{known.seen:.3g}",
                f"{known.bound:.3g}",
                f"{known.noise:.1e}",
            )
        )
    lines = aligned(rows, left=len(_HEAD))
    down, up = online_bytes(plan)
    unit = 2.0**-plan.output.frac_bits
    width = math.ldexp(unit, plan.output.noise_bits)
    lines += [
        f"{plan.messages} messages, {down + up:,} bytes online (rank 0 {down:,}, rank "
        f"1 {up:,}), {plan.dealer_bytes():,} from the dealer, "
        f"{plan.activation_elements:,} activations, plan {plan.digest.hex()[:16]}",
        f"logits: standard deviation of the error {report.logits_error:.2g}, of which "
        f"{report.coins_error:.2g} by rounding coins; the server adds noise in "
        f"[{-width / 2:.2g}, {width / 2:.2g})",
    ]
    return "\n".join(line.rstrip() for line in lines)
