"""What the owner of a network holds: the plan, the weights as integers, and a report.

Only the plan leaves the owner. Weights never do, and neither does the report: the
values seen in calibration are a fingerprint of weights and calibration images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..pillar.guarding import in_words
from ..table import aligned
from ..wire.packing import packed_bytes
from .inference import online_bytes
from .plan import Plan
from .steps import Product, Step
from .weights import Quantisation, Weights


@dataclass(frozen=True)
class PartReport:
    """What calibration says of one linear part.

    Args:
        name: the layer that ends it.
        bound: the largest |z| that is allowed for.
        seen: the largest |z| of the calibration inputs.
        noise: estimated standard deviation of z's error from this part's roundings
            alone; the errors of what it reads come on top.
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
        logits_error: estimated standard deviation of a logit's error, from all
            roundings and the server's noise.
        coins_error: of that, what rounding coins do: they differ from run to run.
        inputs: how many inputs it was calibrated on.
        widened: the ring, if it is wider than the precision that was asked for, and
            why; else empty.
    """

    parts: tuple[PartReport, ...]
    weights: tuple[Quantisation, ...]
    logits_error: float
    coins_error: float
    inputs: int
    widened: str = ""


@dataclass(frozen=True)
class MaskedModel:
    """A network ready for the masked engine."""

    plan: Plan
    weights: Weights
    report: PlanReport

    def __str__(self) -> str:
        """The plan as a table, with what the report knows of each layer."""
        return table(self.plan, self.report)


_HEAD = (
    "layer", "shape", "ring", "scale", "powers", "opens", "sends", "seen", "allowed",
    "own rounding",
)  # fmt: skip


def table(plan: Plan, report: PlanReport) -> str:
    """A plan as a table: each layer's rings, scales, bytes and bounds, and the sums."""
    rows = [_HEAD]
    for number, (part, known) in enumerate(zip(plan.parts, report.parts, strict=True)):
        elements = plan.elements(number)
        # What every part has; an activation has powers and two openings besides.
        scale, powers, opens = str(part.frac_bits), "-", "-"
        sent, shape = packed_bytes(elements, part.ring), plan.part_shapes[number]
        if isinstance(part, Step):
            act = part.activation
            scale += f" -> {act.value_frac_bits} -> {act.frac_bits}"
            shifts = [group.shift for group in act.groups]
            if act.linear is not None:
                shifts.insert(0, act.linear.shift)
            if isinstance(act, Product):
                shifts.extend(act.dropped)
            powers = " ".join(str(part.frac_bits - shift) for shift in shifts)
            opens = "+".join(map(str, (*part.opened_bits, act.sent_bits)))
            between = plan.evaluations[number]
            sent = packed_bytes(between.elements, act.sent_bits)
            sent += sum(packed_bytes(*opened) for opened in between.payload(1))
            shape = between.result
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
        "own rounding: standard deviation that this layer's roundings add; no bound",
        f"logits: standard deviation of the error {report.logits_error:.2g}, of which "
        f"{report.coins_error:.2g} by rounding coins; the server adds noise in "
        f"[{-width / 2:.2g}, {width / 2:.2g})",
        f"calibrated on {report.inputs} input{'s' * (report.inputs > 1)}"
        + ("" if report.inputs > 1 else ": one bounds every layer; give more"),
        in_words(plan.guard),
        *([report.widened] if report.widened else ()),
    ]
    return "\n".join(line.rstrip() for line in lines)
