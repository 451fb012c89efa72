"""From a converted network to its plan.

1. Read the crypten.nn.Graph as layers (`reading`, `network`); run it in float64 on the
   calibration inputs; note how large values get, and how far an error in them or in a
   weight moves the output (`calibration`).
2. Cut it into linear parts at its activations; insert a rescaling between weights with
   none between.
3. Bound every z by headroom times the largest seen, and at least the polynomial's
   interval; the ring leaves the rest to fractional bits, split where the output moves
   least (`scales`), and `builder` writes the plan.
4. Choose for every power of a polynomial the truncation that costs least precision
   (`precision`).
"""

from __future__ import annotations

import math

import torch
from crypten import nn as crypten_nn

from ...errors import DataError, PlanError
from ...inputs import number_tensor
from ..model import MaskedModel, PlanReport
from ..plan import Plan
from ..steps import RING_LIMITS
from ..weights import quantise
from .builder import Builder
from .calibration import Calibration
from .layers import layer_title, naming
from .network import Network, parameters_of
from .scales import NarrowError, Scales

__all__ = ["HEADROOM", "PRECISIONS", "layer_title", "make_plan", "masked_model"]

# The linear ring of each named precision. At most 32 bits: int32 kernels, fewer bytes.
PRECISIONS = {"fast": 32, "high": 40}
HEADROOM = 4.0


def ring_bits(precision: str | int, headroom: float) -> int:
    """The linear ring of a precision.

    Raises: PlanError if there is no such precision, or the headroom is below 1.
    """
    if precision not in PRECISIONS and not isinstance(precision, int):
        raise PlanError(
            f"precision={precision!r}; give {', '.join(map(repr, PRECISIONS))} or the "
            f"linear ring's bits, {RING_LIMITS[0]} to {RING_LIMITS[1]}."
        )
    if isinstance(precision, bool):
        raise PlanError(f"precision={precision!r}; give a name or a number of bits.")
    ring = PRECISIONS[precision] if isinstance(precision, str) else precision
    if not RING_LIMITS[0] <= ring <= RING_LIMITS[1]:
        raise PlanError(
            f"A linear ring of {ring} bits; {RING_LIMITS[0]} to {RING_LIMITS[1]} work."
        )
    if not 1 <= headroom < math.inf:
        raise PlanError(f"headroom={headroom}; at least 1 is needed.")
    return ring


def make_plan(
    graph: crypten_nn.Graph,
    example: object,
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

    Raises: PlanError naming the layer that is unsupported or whose values do not fit,
        with the ring that would do; for calibration inputs of another shape, that are
        not finite or not real. Nothing else.
    """
    ring = ring_bits(precision, headroom)
    with naming("The network"):
        network = Network(graph)
        calibration = Calibration(network, _calibrating(graph, example))
        network.cut()
        return _narrowest(calibration, ring, headroom)


def _calibrating(graph: crypten_nn.Graph, example: object) -> torch.Tensor:
    """Calibration inputs, checked.

    Raises: PlanError with what was given and what is allowed.
    """
    shape = tuple(graph.input_shape)
    wanted = f"(batch, {', '.join(map(str, shape))})"
    try:
        example = number_tensor(example, "The calibration batch")
    except DataError as error:
        raise PlanError(f"{error}, of shape {wanted}.") from None
    given = tuple(example.shape)
    if example.dim() < 2 or 0 in given:
        raise PlanError(
            f"The calibration inputs have shape {given}; give at least one input, as "
            f"{wanted}."
        )
    if given[1:] != shape:
        raise PlanError(
            f"The calibration inputs have shape {given}, the network takes {wanted}. "
            "Resize them as for the network, or convert it for their size."
        )
    if not bool(torch.isfinite(example).all()):
        raise PlanError(
            "The calibration inputs hold NaN or infinity. Clean the data before."
        )
    return example.cpu()


def _narrowest(
    calibration: Calibration, ring: int, headroom: float
) -> tuple[Plan, PlanReport]:
    """The plan in this ring.

    Raises: PlanError that says which ring would do.
    """

    def build(bits: int) -> tuple[Plan, PlanReport]:
        return Builder(Scales(calibration, ring=bits, headroom=headroom)).build()

    try:
        return build(ring)
    except NarrowError as error:
        found = str(error)
    others = range(ring // 4 * 4 + 4, RING_LIMITS[1] + 1, 4)
    for wider in (*PRECISIONS.values(), *others):
        if wider <= ring:
            continue
        try:
            build(wider)
        except NarrowError:
            continue
        names = [name for name, bits in PRECISIONS.items() if bits == wider]
        given = repr(names[0]) if names else wider
        raise PlanError(f"{found} precision={given} (a ring of {wider} bits) plans it.")
    raise PlanError(
        f"{found} No ring of up to {RING_LIMITS[1]} bits would do: train with a range "
        "penalty, so that values stay small."
    )


def masked_model(
    private: crypten_nn.Graph | MaskedModel,
    example: torch.Tensor | None = None,
    *,
    precision: str | int | None = None,
    headroom: float | None = None,
) -> MaskedModel:
    """A converted network's plan, weights and report; made once and kept with it.

    Args:
        private: what `convert` returned, not encrypted; or a MaskedModel, returned as
            it is.
        example: (batch, *input_shape) calibration inputs; those of the conversion if
            None.
        precision, headroom: as `make_plan`; those of the conversion's engine if None.

    Raises: PlanError naming the layer, or if there is nothing to calibrate with.
    """
    if isinstance(private, MaskedModel):
        return private
    engine: object = private.engine
    if precision is None:
        precision = getattr(engine, "precision", "fast")
    if headroom is None:
        headroom = float(getattr(engine, "headroom", HEADROOM))
    key = (precision, headroom)
    if example is None and key in private.models:
        made: MaskedModel = private.models[key]
        return made
    calibration = private.example if example is None else example
    plan, report = make_plan(
        private, calibration, precision=precision, headroom=headroom
    )
    weights = quantise(plan, report.weights, parameters_of(private))
    model = MaskedModel(plan, weights, report)
    if example is None:
        private.models[key] = model
    return model
