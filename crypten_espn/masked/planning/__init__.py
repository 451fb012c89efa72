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
from dataclasses import replace

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

# The linear ring of each named precision, where the network needs no wider one. At
# most 32 bits: int32 kernels, fewer bytes.
PRECISIONS = {"fast": 32, "high": 40}
HEADROOM = 4.0
_STEP = 4
# A logit's estimated error beside the largest logit, above which a ring is too narrow.
_IMPRECISE = 2.0**-8


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
        precision: "fast" (a linear ring of 32 bits) or "high" (40), wider where the
            network needs it, as the report then says; or the bits, 20 to 56.
        headroom: how far beyond the calibration inputs values may go.

    Raises: PlanError naming the layer that is unsupported or whose values do not fit,
        for a number of bits with the ring that would do; for calibration inputs of
        another shape, that are not finite or not real. Nothing else.
    """
    ring = ring_bits(precision, headroom)
    with naming("The network"):
        network = Network(graph)
        calibration = Calibration(network, _calibrating(graph, example))
        network.cut()
        if isinstance(precision, str):
            return _wide_enough(calibration, ring, headroom)
        return _in_ring(calibration, ring, headroom)


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


def _in_ring(
    calibration: Calibration, ring: int, headroom: float
) -> tuple[Plan, PlanReport]:
    """The plan in this ring.

    Raises: PlanError that says which ring would do.
    """
    try:
        return _build(calibration, ring, headroom)
    except NarrowError as error:
        found = str(error)
    for wider in _from(ring // _STEP * _STEP + _STEP):
        try:
            _build(calibration, wider, headroom)
        except NarrowError:
            continue
        raise PlanError(f"{found} precision={wider} plans it.")
    raise _too_wide(found)


def _wide_enough(
    calibration: Calibration, ring: int, headroom: float
) -> tuple[Plan, PlanReport]:
    """The plan in the narrowest ring from this one on that is precise enough.

    Where none is, that of the last that at least halved the error: a wider ring leaves
    polynomials fewer bits.

    Raises: PlanError if the network has no plan in any.
    """
    best, least, why = None, math.inf, ""
    for bits in _from(ring):
        try:
            plan, report = _build(calibration, bits, headroom)
        except NarrowError as narrow:
            why = why or str(narrow)
            continue
        except PlanError:
            if best is None:
                raise
            break
        error = calibration.beside_logits(report.logits_error)
        if error > least / 2:
            break
        widened = f"a ring of {bits} bits: {why}" if why else ""
        best, least = (plan, replace(report, widened=widened)), error
        if error <= _IMPRECISE:
            break
        why = why or (
            f"in a ring of {bits} bits a logit's error would have a standard deviation "
            f"of {100 * error:.2g} % of the largest logit."
        )
    if best is None:
        raise _too_wide(why)
    return best


def _from(ring: int) -> range:
    return range(ring, RING_LIMITS[1] + 1, _STEP)


def _build(
    calibration: Calibration, ring: int, headroom: float
) -> tuple[Plan, PlanReport]:
    return Builder(Scales(calibration, ring=ring, headroom=headroom)).build()


def _too_wide(found: str) -> PlanError:
    return PlanError(
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
