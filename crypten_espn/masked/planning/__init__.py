"""From a converted network to its plan.

1. Read the crypten.nn.Graph as layers (`network`); run it in float64 on the calibration
   inputs; note how large values get, and how far an error in them or in a weight moves
   the output (`calibration`).
2. Cut it into linear parts at its activations; insert a rescaling between weights with
   none between.
3. Bound every z by headroom times the largest seen, and at least the polynomial's
   interval; the ring leaves the rest to fractional bits, split where the output moves
   least (`builder`).
4. Choose for every power of a polynomial the truncation that costs least precision
   (`precision`).
"""

from __future__ import annotations

from typing import Any

import torch

from ...errors import PlanError
from ..model import MaskedModel, PlanReport
from ..plan import RING_LIMITS, Plan
from ..weights import quantise
from .builder import Builder
from .calibration import Calibration
from .network import Network, layer_title, parameters_of

__all__ = ["HEADROOM", "PRECISIONS", "layer_title", "make_plan", "masked_model"]

# The linear ring of each named precision. At most 32 bits: int32 kernels, fewer bytes.
PRECISIONS = {"fast": 32, "high": 40}
HEADROOM = 4.0


def make_plan(
    graph: Any,
    example: torch.Tensor,
    *,
    precision: str | int = "fast",
    headroom: float = HEADROOM,
) -> tuple[Plan, PlanReport]:
    """The plan of a converted network, and what its owner may know beside.

    Args:
        graph: a crypten.nn.Graph, converted, batch-norm folded, not encrypted.
        example: (batch, *input_shape) calibration inputs; more give better bounds.
        precision: "fast" (32-bit linear ring), "high" (40-bit), or the bits, 20 to 56.
        headroom: how far beyond the calibration inputs values may go.

    Raises: PlanError naming the layer that is unsupported or whose values do not fit.
    """
    if precision not in PRECISIONS and not isinstance(precision, int):
        raise PlanError(
            f"precision={precision!r}; give {', '.join(map(repr, PRECISIONS))} or the "
            f"linear ring's bits, {RING_LIMITS[0]} to {RING_LIMITS[1]}."
        )
    ring = PRECISIONS[precision] if isinstance(precision, str) else precision
    if not RING_LIMITS[0] <= ring <= RING_LIMITS[1]:
        raise PlanError(
            f"A linear ring of {ring} bits; {RING_LIMITS[0]} to {RING_LIMITS[1]} work."
        )
    if headroom < 1:
        raise PlanError(f"headroom={headroom}; at least 1 is needed.")
    network = Network(graph)
    calibration = Calibration(network, example)
    network.cut()
    return Builder(calibration, ring=ring, headroom=headroom).build()


def masked_model(
    private: Any,
    example: torch.Tensor | None = None,
    *,
    precision: str | int = "fast",
    headroom: float = HEADROOM,
) -> MaskedModel:
    """Plan a converted network for the masked engine.

    Args:
        private: what `convert` returned, not encrypted; or a MaskedModel, returned as
            it is.
        example: (batch, *input_shape) calibration inputs; those of the conversion if
            None.
        precision, headroom: as `make_plan`.

    Raises: PlanError naming the layer, or if there is nothing to calibrate with.
    """
    if isinstance(private, MaskedModel):
        return private
    if example is None:
        example = getattr(private, "example", None)
    if example is None:
        raise PlanError(
            "The masked engine bounds every layer by calibration inputs; give example=."
        )
    plan, report = make_plan(private, example, precision=precision, headroom=headroom)
    weights = quantise(plan, report.weights, parameters_of(private))
    return MaskedModel(plan, weights, report)
