"""What changes in a network as training goes on, for any training loop."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping

from torch import nn

from ..errors import NothingReplacedError, RangeError
from ..polynomial import AnyPolynomial
from .surgery import Key, activations, replace_activations


def replace_share(
    model: nn.Module, mapping: Mapping[Key, AnyPolynomial], share: float
) -> nn.Module:
    """Return the model with the first of its activations made polynomial, in place.

    With a share that grows over the epochs they give way one after the other, and the
    network has time to adapt to each. The network is searched at every call: call it
    once an epoch, or every so many steps.

    Args:
        model: any network but a lone activation.
        mapping: what to replace, and by which polynomial; see `replace_activations`.
        share: of all activations, those that are polynomials already included, that
            are to be polynomials; rounded up to a whole one.

    Raises:
        RangeError: a share that is not from 0 to 1.
        ConversionError: as of `replace_activations`.
    """
    if not 0 <= share <= 1:
        raise RangeError(f"replace_share was given share={share}; it is from 0 to 1")
    left: list[str] = []

    def note(name: str) -> bool:
        left.append(name)
        return False

    with contextlib.suppress(NothingReplacedError):
        replace_activations(model, mapping, select=note)
    done = len(activations(model))
    # The nudge keeps k of n activations k of them despite the division.
    due = left[: max(math.ceil(share * (done + len(left)) - 1e-9) - done, 0)]
    if not due:
        return model
    return replace_activations(model, mapping, select=set(due).__contains__)


def clip_in_training(model: nn.Module, clip: bool) -> None:
    """Set whether the activations clip their inputs in training; at first they do.

    Without the clip a network learns what evaluation and the parties do to inputs
    beyond the interval: for the last epochs, when few are left there.
    """
    for module in activations(model).values():
        module.clip = clip
