"""What an input must look like to be sent: checked by its owner, in the clear.

A private network cannot look at its input, and a polynomial of a value outside its
interval may be anything. Inputs unlike those of calibration are refused before they are
shared.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Annotated

import msgspec
import torch
from torch import Tensor, nn

from ..errors import DataError, RangeError, ShapeError
from ..inputs import real_tensor
from .data import Normalization
from .guard_bounds import (
    KINDS,
    LARGEST,
    MOST_CHANNELS,
    Sample,
    Statistics,
    bounds_of,
    mean_and_std,
    refusals,
    statistics,
)

_SAID = {
    "depth": "its smallest value, negated,",
    "height": "its largest value",
    "energy": "its mean square",
    "roughness": "its mean squared difference between neighbours",
}
# Of the module that carries a guard.
_ATTRIBUTE = "_input_guard"

_Bounds = Annotated[
    tuple[float, ...], msgspec.Meta(min_length=1, max_length=MOST_CHANNELS)
]


class _Stored(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    depth: _Bounds
    height: _Bounds
    energy: _Bounds
    roughness: _Bounds
    mean: _Bounds
    std: _Bounds


@dataclass(frozen=True)
class InputGuard:
    """Bounds on what is cheap to compute of an input, for each of its channels.

    Every bound is 0 or a power of two: what a public guard tells of the calibration
    images is rounded to that. Mean and deviation are those of the normalisation, which
    every client applies: z = x * std + mean is bounded, such as pixels in [0, 1].

    Args:
        depth, height: of -z and of z, the largest allowed.
        energy: of the mean of z**2.
        roughness: of the mean of (z - its neighbour)**2, summed over the axes after the
            channels; 0 where there is none.
        mean, std: of the normalisation; 0 and 1 where there is none.

    Raises:
        DataError: no channels, other numbers of them, a bound that is neither 0 nor a
            power of two from 2**-40 to 2**40, or a mean or deviation out of range.
    """

    depth: tuple[float, ...]
    height: tuple[float, ...]
    energy: tuple[float, ...]
    roughness: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        counts = {len(getattr(self, kind)) for kind in (*KINDS, "mean", "std")}
        if len(counts) != 1 or not 1 <= max(counts) <= MOST_CHANNELS:
            raise DataError(
                f"a guard with bounds for {sorted(counts)} channels; give each kind of "
                f"bound for the same 1 to {MOST_CHANNELS:,} channels"
            )
        for kind in KINDS:
            for bound in self._bounds(kind):
                if type(bound) is not float or not _is_allowed(bound):
                    raise DataError(
                        f"a bound of {bound!r} on {kind}; it is 0.0 or a power of two, "
                        "from 2**-40 to 2**40"
                    )
        if not all(
            type(m) is type(s) is float and abs(m) <= LARGEST and 0 < s <= LARGEST
            for m, s in zip(self.mean, self.std, strict=True)
        ):
            raise DataError(
                f"a normalisation of mean {self.mean[:4]} and deviation "
                f"{self.std[:4]}; finite floats are needed, and deviations above 0"
            )

    @staticmethod
    def fit(
        images: object,
        *,
        normalization: Normalization | None = None,
        network: nn.Module | None = None,
    ) -> InputGuard:
        """Bounds that the images keep, with an eighth of room, powers of two.

        With a network they open for what a camera may make of the images, and close
        until none of `stress.sample` passes that reaches beyond 0.9 radii of an
        interval of the network's.

        Args:
            images: (n, channels, ...) as the network takes them; some hundreds.
            normalization: what made them of values in [0, 1], such as the network's.
                With it the ends are exact: without, 2.02 is rounded up to 4.
            network: with polynomial activations; run in evaluation mode and put back.

        Raises:
            DataError: no images, without channels, or of others than the
                normalisation's or more than 4,096.
            RangeError: NaN, infinity, or values of 2**19 and more; images that leave
                the network's intervals themselves, or that no bound tells from some
                that do.
        """
        x = real_tensor(images, "the images", finite=True)
        if network is not None:
            return InputGuard.of(Sample.of(x.float(), normalization), network)
        mean, std = mean_and_std(x, normalization)
        seen = statistics(x, mean, std)
        bounds = bounds_of(seen, room=True, bounded=normalization is not None)
        return _guard(bounds, mean, std)

    @staticmethod
    def of(sample: Sample, network: nn.Module | None = None) -> InputGuard:
        """The guard of a sample's clean images, or with a network as `fit`.

        Raises:
            RangeError: as `fit`.
        """
        bounds = sample.least if network is None else sample.bounds_for(network)
        return _guard(bounds, sample.mean, sample.std)

    @property
    def channels(self) -> int:
        """Channels of an input."""
        return len(self.height)

    def refused(self, x: object) -> Tensor:
        """(n,) bool, for each of a batch's inputs whether `check` refuses it.

        Raises:
            ShapeError: inputs of other channels.
            DataError: no real numbers.
        """
        _, beyond = self._compared(x)
        return torch.stack(list(beyond.values())).any(0).any(1)

    def check(self, x: object) -> None:
        """Refuse a batch (n, channels, ...) that holds an input beyond a bound.

        Raises:
            RangeError: it names the input, the channel, the value and the bound; NaN
                and infinity are beyond every bound.
            ShapeError: inputs of other channels.
            DataError: no real numbers.
        """
        statistics, found = self._compared(x)
        for kind, beyond in found.items():
            if not bool(beyond.any()):
                continue
            seen = statistics[kind]
            index, channel = (int(i) for i in beyond.nonzero()[0])
            inputs = int(beyond.any(1).sum())
            raise RangeError(
                f"input {index} is unlike those the network was calibrated on: "
                f"{_SAID[kind]} is {float(seen[index, channel]):.3g} in channel "
                f"{channel}{self._units(channel)}, at most "
                f"{self._bounds(kind)[channel]:.3g} is allowed ({inputs} of "
                f"{len(seen)} inputs); its private result may be wrong without a "
                "sign. Resize and normalise it as in training"
            )

    def to_json(self) -> str:
        """A JSON object with the fields."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> InputGuard:
        """The inverse of `to_json`.

        Raises:
            DataError: not a JSON object of exactly these fields, types and bounds.
        """
        try:
            stored = _DECODER.decode(text)
        except (ValueError, msgspec.MsgspecError, RecursionError) as error:
            raise DataError(
                f"{text[:80]!r} is not a stored guard ({error}); InputGuard.to_json "
                "writes one"
            ) from error
        return InputGuard(**msgspec.structs.asdict(stored))

    def _bounds(self, kind: str) -> tuple[float, ...]:
        bounds: tuple[float, ...] = getattr(self, kind)
        return bounds

    def _compared(self, x: object) -> tuple[Statistics, dict[str, Tensor]]:
        """By kind, (n, channels) of the inputs and whether that is beyond its bound."""
        numbers = real_tensor(x)
        if numbers.dim() < 2 or numbers.shape[1] != self.channels:
            raise ShapeError(
                f"the input has shape {tuple(numbers.shape)}, the guard is of (n, "
                f"{self.channels}, ...)"
            )
        seen = statistics(numbers, self.mean, self.std)
        bounds = {
            kind: torch.tensor(self._bounds(kind), dtype=torch.float64)
            for kind in KINDS
        }
        return seen, refusals(seen, bounds)

    def _units(self, channel: int) -> str:
        plain = (self.mean[channel], self.std[channel]) == (0.0, 1.0)
        return "" if plain else " before the normalisation"


def attach_guard(module: nn.Module, guard: InputGuard | None) -> None:
    """Let a network carry its guard: copies and files of it carry it too.

    Args:
        module: any network; what it computes stays the same.
        guard: None takes the one it carries away.

    Raises:
        DataError: neither a guard nor None.
    """
    if not isinstance(guard, InputGuard | None):
        raise DataError(
            f"a {type(guard).__name__} is no guard; give what InputGuard.fit returns"
        )
    vars(module)[_ATTRIBUTE] = guard


def guard_of(module: nn.Module) -> InputGuard | None:
    """The guard that a network carries; None where it carries none."""
    guard: InputGuard | None = vars(module).get(_ATTRIBUTE)
    return guard


def _guard(
    bounds: Statistics, mean: tuple[float, ...], std: tuple[float, ...]
) -> InputGuard:
    found = {kind: tuple(bounds[kind].tolist()) for kind in KINDS}
    return InputGuard(**found, mean=mean, std=std)


def _is_allowed(bound: float) -> bool:
    if bound == 0.0:
        return math.copysign(1.0, bound) > 0
    fraction, exponent = math.frexp(bound)
    return fraction == 0.5 and -39 <= exponent <= 41


# Made here once: two threads that decode a type for the first time crash msgspec.
_DECODER = msgspec.json.Decoder(_Stored)
