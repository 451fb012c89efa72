"""A network's inputs held to its guard before they are shared, and a guard in words."""

from __future__ import annotations

from torch import Tensor

from ..errors import DataError, RangeError
from ..inputs import input_batch
from .guard import InputGuard

HOW = (
    "none, so that any input is sent; `crypten-espn calibrate` fits one, and for any "
    "network espn.convert(..., guard=espn.InputGuard.fit(images))"
)
# Channels whose bounds are shown one by one.
_SHOWN = 4


def guarded_batch(
    x: object, shape: tuple[int, ...], guard: InputGuard | None, *, force: bool = False
) -> Tensor:
    """The real numbers of a batch that may be shared, checked in the clear.

    Args:
        x: (batch, *shape), of any kind that `inputs` takes.
        shape: of one input.
        guard: the network's; None lets every finite input through.
        force: take what the guard refuses. A polynomial grows without bound outside
            its interval and a ring wraps around: the private result may be any number
            then, and nothing tells.

    Raises:
        DataError, ShapeError: it is no batch of inputs.
        RangeError: NaN or infinity, with `force` too; or the guard refuses an input.
    """
    numbers = input_batch(x, shape)
    if guard is not None and not force:
        try:
            guard.check(numbers)
        except RangeError as error:
            raise RangeError(
                f"{error}, or send it all the same with force=True (--force)"
            ) from None
    return numbers


def check_channels(guard: InputGuard, shape: tuple[int, ...]) -> InputGuard:
    """The guard, if it is of inputs of this shape.

    Args:
        guard: what was given.
        shape: of one input.

    Raises:
        DataError: it is no guard, or of another number of channels.
    """
    if not isinstance(guard, InputGuard):
        raise DataError(
            f"the guard is a {type(guard).__name__}; espn.InputGuard.fit(images) makes "
            "one, and InputGuard.from_json reads it"
        )
    if guard.channels != shape[0]:
        raise DataError(
            f"the guard is of {guard.channels} channels, the network takes (batch, "
            f"{', '.join(map(str, shape))}); fit it on inputs of the network"
        )
    return guard


def in_words(guard: InputGuard | None) -> str:
    """One line: the bounds, all of them public; or that there is none."""
    if guard is None:
        return f"input guard: {HOW}"
    plain = set(guard.mean) == {0.0} and set(guard.std) == {1.0}
    of = "x" if plain else f"z = x * {_row(guard.std)} + {_row(guard.mean)}"
    return (
        f"input guard, public: of {of} at most {_row(guard.height)}, of its negative "
        f"{_row(guard.depth)}, of the mean of its square {_row(guard.energy)} and of "
        f"its neighbours' difference squared {_row(guard.roughness)}"
    )


def _row(values: tuple[float, ...]) -> str:
    """A number for all channels, or one for each of the first."""
    if len(set(values)) == 1:
        return f"{values[0]:.4g}"
    shown = [f"{value:.4g}" for value in values[:_SHOWN]]
    return f"({', '.join(shown)}{', ...' if len(values) > _SHOWN else ''})"
