"""Why a private result differs: a network's integers in the clear, layer by layer.

`explain` computes a converted network with the integers the parties would hold and
says, layer by layer, how far they are from the real network, how much of that is added
there, how far two private runs differ from each other, and what is left of the ring.
`compare_precisions` does so for several precisions, side by side.

CrypTen's protocols: both shares of every value are simulated (`shares`), with rank 0's
drawn from a keystream where the protocols draw it; `crypten` runs a network so. The
masked engine's own simulation is `masked.reference`; `explain.masked` calls it. `words`
holds what is found and says it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from crypten.encoder import FixedPointEncoder

from ..convert import PrivateNetwork
from ..engines import CrypTen
from ..errors import ConversionError, ProtocolError
from ..inputs import input_batch
from ..masked.planning import masked_model
from ..protocols import settings
from ..randomness import SEED_BYTES, Keystream
from .crypten import explain_shares
from .masked import explain_masked
from .shares import Draws
from .words import Comparison, Explanation, Fault, LayerError

__all__ = [
    "Comparison",
    "Draws",
    "Explanation",
    "Fault",
    "LayerError",
    "compare_precisions",
    "explain",
]


def explain(
    private: PrivateNetwork,
    x: object,
    *,
    precision_bits: int | None = None,
    precision: str | int | None = None,
    example: torch.Tensor | None = None,
    runs: int = 4,
    draws: Draws | None = None,
) -> Explanation:
    """A converted network's integers in the clear, against the real network.

    1. Encode input and weights as the parties do.
    2. Layer by layer: the integers modulo 2**64 with CrypTen's truncation on both
       shares, the same in float64 without a ring, and the real network in float64.
    3. Compare. The engine is the one the network was converted for, as in `simulate`.

    Args:
        private: what `convert` returned, not encrypted.
        x: (batch, *input_shape).
        precision_bits: fractional bits for CrypTen's protocols;
            crypten.cfg.encoder.precision_bits when None.
        precision: for the masked engine, as `masked.planning.make_plan`; that of the
            conversion if None.
        example: calibration inputs for the masked engine; those of the conversion when
            None.
        runs: simulated runs with shares of their own; their differences give the
            declared rounding, so one run declares none.
        draws: rank 0's shares, in the order of use; a keystream of a fixed seed when
            None, so that a call can be repeated. Only values in the clear are at stake.

    Returns:
        An Explanation.

    Error: given the parties' draws, the logits are theirs bit for bit. Otherwise a run
        of theirs differs from a simulated one by at most `rounding` but for failed
        truncations. What one layer adds to that, in its own units: a product or a pool
        at most 1; a polynomial its form's error bound, and 1 for its own truncation.

    Raises:
        DataError, ShapeError, RangeError: the input, named.
        ConversionError: an operation that `convert` does not make.
        ProtocolError: `precision_bits` for the masked engine, or no runs.
        PlanError: the masked engine has no plan; the layer is named.
    """
    if not isinstance(private, PrivateNetwork):
        raise ConversionError(
            f"a {type(private).__name__} was given; explain() takes what convert() "
            "returned"
        )
    if runs < 1:
        raise ProtocolError(f"runs={runs}: at least one run is simulated")
    x = input_batch(x, private.input_shape)
    if draws is None:
        draws = Keystream(bytes(SEED_BYTES))
    with torch.no_grad():
        engine = private.engine
        if not isinstance(engine, CrypTen):
            if precision_bits is not None:
                raise ProtocolError(
                    f"precision_bits={precision_bits} is for CrypTen's protocols; the "
                    "masked engine chooses scales itself: give precision='fast' or "
                    "'high', or convert with protocol='espn'"
                )
            model = masked_model(private, example, precision=precision)
            return explain_masked(private, model, x, runs, draws)
        encoder = FixedPointEncoder(precision_bits=precision_bits)
        with settings(
            protocol=engine.protocol,
            truncation=engine.truncation,
            failure_bits=engine.failure_bits,
        ) as chosen:
            return explain_shares(private, x, encoder, chosen, runs, draws)


def compare_precisions(
    private: PrivateNetwork,
    x: object,
    *,
    precision_bits: Sequence[int] = (8, 12, 16, 20, 24),
    precision: Sequence[str | int] = ("fast", "high"),
    example: torch.Tensor | None = None,
    runs: int = 4,
) -> Comparison:
    """`explain` for several precisions.

    Args:
        private, x, example, runs: as `explain`.
        precision_bits: for CrypTen's protocols.
        precision: for the masked engine.

    Raises: as `explain`.
    """
    results: list[tuple[int | str, Explanation]] = []
    if not isinstance(private.engine, CrypTen):
        for chosen in precision:
            found = explain(private, x, precision=chosen, example=example, runs=runs)
            results.append((chosen, found))
    else:
        for bits in precision_bits:
            found = explain(private, x, precision_bits=bits, runs=runs)
            results.append((bits, found))
    return Comparison(tuple(results))
