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
from collections.abc import Iterator
from dataclasses import dataclass, replace

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
from .yardstick import espn_error

__all__ = ["HEADROOM", "PRECISIONS", "layer_title", "make_plan", "masked_model"]

HEADROOM = 4.0
_STEP = 4


@dataclass(frozen=True)
class Precision:
    """A named precision: rings are tried from the narrowest on.

    Args:
        least, usual: bits of the narrowest ring, and of the widest that the name
            promises. At most 32: int32 kernels, fewer bytes.
        espn_bits: powers share a truncation, and a ring is wide enough, where a logit's
            error stays within that of protocol "espn" at so many fractional bits too;
            0 if that does not count.
    """

    least: int
    usual: int
    espn_bits: int = 0

    def ways(self, allowed: float) -> Iterator[tuple[int, float]]:
        """Rings that are tried, and the logits' error that truncated powers may bring.

        A truncation saved is worth more bytes than a narrower ring. Each brings the
        server's noise on the logits as well, so that not all of what is allowed is
        theirs where that proves too much.
        """
        if not self.espn_bits:
            yield from ((bits, 0.0) for bits in _from(self.usual))
            return
        # What logits of zero need is unknown; in a usual ring, no more bytes than this.
        least = self.least if math.isfinite(allowed) else self.usual
        for share in (1.0, _SPARED):
            for bits in range(least, self.usual + 1, 2):
                yield bits, share * allowed
        yield from ((bits, _SPARED * allowed) for bits in _from(self.usual + _STEP))

    def allowed(self, calibration: Calibration) -> float:
        """The standard deviation of a logit's error above which a ring is too narrow.

        Infinite where all logits are zero.
        """
        if not calibration.largest_logit:
            return math.inf
        allowed = _IMPRECISE
        if self.espn_bits:
            espn = espn_error(calibration, frac_bits=self.espn_bits)
            beside = _SURELY * calibration.beside_logits(espn)
            allowed = min(max(beside, _PRECISE), _IMPRECISE)
        return allowed * calibration.largest_logit


# A logit's estimated error beside the largest logit above which a ring is too narrow,
# and below which it is wide enough for any precision.
_IMPRECISE, _PRECISE = 2.0**-8, 2.0**-12
# The error of protocol "espn" that networks showed was 0.8 to 1.2 times its estimate.
_SURELY = 0.8
# The share of a logit's error that is left to powers beside the noise they bring.
_SPARED = 0.3
PRECISIONS = {
    "compact": Precision(26, 32, espn_bits=12),
    "fast": Precision(32, 32),
    "high": Precision(40, 40),
}


def _from(ring: int) -> range:
    return range(ring, RING_LIMITS[1] + 1, _STEP)


def ring_bits(precision: str | int, headroom: float) -> int:
    """The linear ring of a precision, or the first that is tried.

    Raises: PlanError if there is no such precision, or the headroom is below 1.
    """
    if precision not in PRECISIONS and not isinstance(precision, int):
        raise PlanError(
            f"precision={precision!r}; give {', '.join(map(repr, PRECISIONS))} or the "
            f"linear ring's bits, {RING_LIMITS[0]} to {RING_LIMITS[1]}."
        )
    if isinstance(precision, bool):
        raise PlanError(f"precision={precision!r}; give a name or a number of bits.")
    named = PRECISIONS[precision] if isinstance(precision, str) else None
    ring = named.least if named is not None else int(precision)
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
        precision: "compact" (a linear ring of 26 to 32 bits, and the fewest bytes whose
            error stays within that of protocol "espn" at 12 fractional bits), "fast"
            (32) or "high" (40), wider where the network needs it, as the report then
            says; or the bits, 20 to 56.
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
            return _wide_enough(calibration, PRECISIONS[precision], headroom)
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
    calibration: Calibration, precision: Precision, headroom: float
) -> tuple[Plan, PlanReport]:
    """The plan in the narrowest ring of a precision that is precise enough.

    Where none is, that of the last that at least halved the error: a wider ring leaves
    polynomials fewer bits.

    Raises: PlanError if the network has no plan in any.
    """
    allowed = precision.allowed(calibration)
    best, least, why = None, math.inf, ""
    for bits, room in precision.ways(allowed):
        try:
            plan, report = _build(calibration, bits, headroom, room)
        except NarrowError as narrow:
            why = why or (str(narrow) if bits >= precision.usual else "")
            continue
        except PlanError:
            if best is None:
                raise
            break
        error = report.logits_error
        wide = bits > precision.usual
        if wide and error > least / 2:
            break
        if error > least:
            continue
        widened = f"a ring of {bits} bits: {why}" if wide else ""
        best, least = (plan, replace(report, widened=widened)), error
        if error <= allowed:
            break
        if bits >= precision.usual:
            beside = 100 * calibration.beside_logits(error)
            why = why or (
                f"in a ring of {bits} bits a logit's error would have a standard "
                f"deviation of {beside:.2g} % of the largest logit."
            )
    if best is None:
        raise _too_wide(why)
    return best


def _build(
    calibration: Calibration, ring: int, headroom: float, room: float = 0.0
) -> tuple[Plan, PlanReport]:
    scales = Scales(calibration, ring=ring, headroom=headroom, room=room)
    return Builder(scales).build()


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
