"""Whether a plan computes its network: run in the clear, and compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from crypten import nn as crypten_nn

from ...compare import own_rounding
from ...errors import EspnError
from ..model import MaskedModel
from ..plan import channels_last
from ..reference import evaluate
from . import masked_model
from .network import Network
from .products import Row

# How many stated standard deviations a logit may be off: on calibration inputs, and on
# others, whose values the plan knows less of.
_ALLOWED = (8, 16)
# What the network's own float32 may be off, of its largest logit.
_FLOAT32 = 2.0**-16
_ROWS = 2


def check_plan(
    private: crypten_nn.Graph,
    example: torch.Tensor,
    model: MaskedModel | None = None,
    *,
    reference: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> str | None:
    """Plan a network, run the plan in the clear and compare it with the network.

    1. Take two rows of the example, and a random input of its range, as another batch
       size.
    2. Compute both with the plan's integers, every rounding to nearest, and with the
       network.
    3. Compare: a logit may be off by 8 of the plan's stated standard deviations, by 16
       on the random input, and by what the network's own arithmetic rounds. Where a
       network multiplies, these are as many times more as a factor exceeds its mean.

    Args:
        private: the converted network, not encrypted.
        example: (batch, *input_shape), calibration inputs.
        model: the plan they made; made here if None.
        reference: the network itself, from (batch, *input_shape) to its outputs; the
            converted network in float64 if None.

    Returns: None if they agree; else why there is no plan, or what differs and where.

    Cost: the plan's; three inputs through its integers, the network and its float64.
    """
    try:
        model = masked_model(private, example) if model is None else model
        network = Network(private)
        network.cut()
        return _difference(network, model, example, reference)
    except EspnError as error:
        return str(error)


def _difference(
    network: Network,
    model: MaskedModel,
    example: torch.Tensor,
    reference: Callable[[torch.Tensor], torch.Tensor] | None,
) -> str | None:
    ends = network.ends
    inputs = _inputs(network, model, example.detach().cpu())
    for (x, values), allowed in zip(inputs, _ALLOWED, strict=True):
        logits, trace = evaluate(model.plan, model.weights, x)
        wanted = values[ends[-1]]
        if reference is not None:
            try:
                wanted = reference(x.to(example.dtype).clone())
            except Exception as error:
                text = (str(error).splitlines() or [""])[0][:200]
                return f"the network itself fails on a batch of {len(x)}: {text}"
        if tuple(wanted.shape) != tuple(logits.shape):
            return (
                f"the plan computes outputs of shape {tuple(logits.shape)}, the "
                f"network {tuple(wanted.shape)}."
            )
        relative = max(_FLOAT32, own_rounding(wanted))
        wanted = wanted.detach().cpu().double()
        off = float((logits.double() - wanted).abs().max())
        largest = float(wanted.abs().max())
        limit = allowed * _crest(network, values) * model.report.logits_error
        limit += relative * largest
        if not off <= limit:
            index = _first_wrong(model, [values[end] for end in ends], trace)
            return (
                f"the plan's result differs by {off:.3g} of {largest:.3g} from the "
                f"network's on a batch of {len(x)}, {limit:.3g} is allowed; first at "
                f"{model.report.parts[index].name}."
            )
    return None


def _crest(network: Network, values: dict[str, torch.Tensor]) -> float:
    """How far a factor lies above its mean: so far it may carry the other's error."""
    rows = [
        values[end]
        for end in network.ends
        if isinstance(network.layers[end].kind, Row) and bool(values[end].any())
    ]
    return max(
        (float(r.abs().max() / r.square().mean().sqrt()) for r in rows), default=1
    )


def _inputs(
    network: Network, model: MaskedModel, example: torch.Tensor
) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Both inputs, with the network's values in float64."""
    first = example[:_ROWS]
    yield first, network.run(first, network.ends)
    rows = 1 if len(first) > 1 else 2
    random = torch.Generator().manual_seed(1)
    drawn = torch.rand((rows, *first.shape[1:]), generator=random, dtype=torch.float64)
    low, high = float(example.double().min()), float(example.double().max())
    drawn = low + (high - low) * drawn
    # Noise may lead further than any image: then it is mixed with one.
    share = 1.0
    while True:
        mixed = (1 - share) * first[:1].double() + share * drawn
        values = network.run(mixed, network.ends)
        if share < 2.0**-6 or _inside(network, model, values):
            break
        share /= 2
    yield mixed, values


def _inside(
    network: Network, model: MaskedModel, values: dict[str, torch.Tensor]
) -> bool:
    """Whether values are of the size that calibration saw."""
    return all(
        float(values[end].abs().max()) <= max(1.5 * known.seen, known.bound / 8)
        for end, known in zip(network.ends, model.report.parts, strict=True)
    )


def _first_wrong(
    model: MaskedModel, values: list[torch.Tensor], trace: list[np.ndarray]
) -> int:
    """The first linear part whose integers are not the network's values."""
    parts = zip(model.plan.parts, values, trace, strict=True)
    for index, (part, value, z) in enumerate(parts):
        real = channels_last(value.numpy())
        off = np.abs(z * 2.0**-part.frac_bits - real).max()
        if off > np.abs(real).max() / 16:
            return index
    return len(trace) - 1
