"""What an input must look like to be sent: checked by its owner, in the clear.

A private network cannot look at its input, and a polynomial of a value outside its
interval may be anything. Inputs unlike those of calibration are refused before they are
shared.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import msgspec
import torch
from torch import Tensor, nn

from ..errors import DataError, RangeError, ShapeError
from ..inputs import real_tensor
from .data import Normalization

# Room for inputs to come, before a bound is rounded up. None for the ends: a pixel that
# is black or white is so in most images, and 1 must not become 2.
_SLACK = {"depth": 1.0, "height": 1.0, "energy": 1.125, "roughness": 1.125}
# Of a channel's range: what undoing a normalisation in floating point leaves.
_ROUNDING = 2.0**-12
_MOST_CHANNELS = 1 << 12
_KINDS = ("depth", "height", "energy", "roughness")
_ENDS = ("depth", "height")
_SAID = {
    "depth": "its smallest value, negated,",
    "height": "its largest value",
    "energy": "its mean square",
    "roughness": "its mean squared difference between neighbours",
}
_LARGEST = 2.0**40
# Of the module that carries a guard.
_ATTRIBUTE = "_input_guard"

_Bounds = Annotated[
    tuple[float, ...], msgspec.Meta(min_length=1, max_length=_MOST_CHANNELS)
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
        counts = {len(getattr(self, kind)) for kind in (*_KINDS, "mean", "std")}
        if len(counts) != 1 or not 1 <= max(counts) <= _MOST_CHANNELS:
            raise DataError(
                f"a guard with bounds for {sorted(counts)} channels; give each kind of "
                f"bound for the same 1 to {_MOST_CHANNELS:,} channels"
            )
        for kind in _KINDS:
            for bound in self._bounds(kind):
                if type(bound) is not float or not _is_allowed(bound):
                    raise DataError(
                        f"a bound of {bound!r} on {kind}; it is 0.0 or a power of two, "
                        "from 2**-40 to 2**40"
                    )
        if not all(
            type(m) is type(s) is float and abs(m) <= _LARGEST and 0 < s <= _LARGEST
            for m, s in zip(self.mean, self.std, strict=True)
        ):
            raise DataError(
                f"a normalisation of mean {self.mean[:4]} and deviation "
                f"{self.std[:4]}; finite floats are needed, and deviations above 0"
            )

    @staticmethod
    def fit(
        images: object, *, normalization: Normalization | None = None
    ) -> InputGuard:
        """Bounds that the images keep, rounded up to powers of two.

        The mean squares have an eighth of room before.

        Args:
            images: (n, channels, ...) as the network takes them; some hundreds.
            normalization: what made them of values in [0, 1], such as the network's.
                With it the ends are exact: without, 2.02 is rounded up to 4.

        Raises:
            DataError: no images, without channels, or of others than the
                normalisation's or more than 4,096.
            RangeError: NaN, infinity, or values of 2**19 and more.
        """
        x = real_tensor(images, "the images", finite=True)
        if x.dim() < 2:
            raise DataError(
                f"the images have shape {tuple(x.shape)}; give (n, channels, ...)"
            )
        channels = x.shape[1]
        mean, std = (0.0,) * channels, (1.0,) * channels
        if normalization is not None:
            mean, std = normalization.mean, normalization.std
            if len(mean) != channels:
                raise DataError(
                    f"the images have {channels} channels, the normalisation "
                    f"{len(mean)}; give the one of these images"
                )
        statistics = _statistics(x, mean, std)
        reach = (statistics["depth"] + statistics["height"]).amax(0) * _ROUNDING
        found = {}
        for kind, values in statistics.items():
            largest = values.amax(0) * _SLACK[kind]
            if kind in _ENDS:
                largest = (largest - reach).clamp_min(0)
            if float(largest.max()) > _LARGEST:
                raise RangeError(
                    f"the images' {kind} is {float(largest.max()):.3g}; normalise them "
                    "as in training"
                )
            found[kind] = tuple(_rounded_up(float(v)) for v in largest)
        return InputGuard(**found, mean=tuple(mean), std=tuple(std))

    def refused(self, x: object) -> Tensor:
        """(n,) bool, for each of a batch's inputs whether `check` refuses it.

        Raises:
            ShapeError: inputs of other channels.
            DataError: no real numbers.
        """
        beyond = [seen > bound for _, seen, bound in self._compared(x)]
        return torch.stack(beyond).any(0).any(1)

    def check(self, x: object) -> None:
        """Refuse a batch (n, channels, ...) that holds an input beyond a bound.

        Raises:
            RangeError: it names the input, the channel, the value and the bound; NaN
                and infinity are beyond every bound.
            ShapeError: inputs of other channels.
            DataError: no real numbers.
        """
        for kind, seen, bound in self._compared(x):
            beyond = seen > bound
            if not bool(beyond.any()):
                continue
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
            stored = msgspec.json.decode(text, type=_Stored)
        except (ValueError, msgspec.MsgspecError, RecursionError) as error:
            raise DataError(
                f"{text[:80]!r} is not a stored guard ({error}); InputGuard.to_json "
                "writes one"
            ) from error
        return InputGuard(**msgspec.structs.asdict(stored))

    def _bounds(self, kind: str) -> tuple[float, ...]:
        bounds: tuple[float, ...] = getattr(self, kind)
        return bounds

    def _compared(self, x: object) -> list[tuple[str, Tensor, Tensor]]:
        """For each kind its name, (n, channels) of an input and (channels,) bounds."""
        numbers = real_tensor(x)
        channels = len(self.depth)
        if numbers.dim() < 2 or numbers.shape[1] != channels:
            raise ShapeError(
                f"the input has shape {tuple(numbers.shape)}, the guard is of (n, "
                f"{channels}, ...)"
            )
        ends = torch.tensor([self.depth, self.height], dtype=torch.float64)
        rounding = ends.sum(0) * _ROUNDING
        compared = []
        for kind, seen in _statistics(numbers, self.mean, self.std).items():
            bound = torch.tensor(self._bounds(kind), dtype=torch.float64)
            compared.append((kind, seen, bound + rounding * (kind in _ENDS)))
        return compared

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


def _statistics(
    x: Tensor, mean: Sequence[float], std: Sequence[float]
) -> dict[str, Tensor]:
    """By kind, (n, channels) float64; infinity where an input is not finite."""
    x = x.double().cpu()
    ones = (1,) * (x.dim() - 2)
    x = x * torch.tensor(std, dtype=torch.float64).view(-1, *ones)
    x = x + torch.tensor(mean, dtype=torch.float64).view(-1, *ones)
    rough = torch.zeros(x.shape[:2], dtype=torch.float64)
    for axis in range(2, x.dim()):
        if x.shape[axis] > 1:
            rough = rough + x.diff(dim=axis).square().flatten(2).mean(2)
    flat = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
    found = {
        "depth": (-flat).amax(2).clamp_min(0),
        "height": flat.amax(2).clamp_min(0),
        "energy": flat.square().mean(2),
        "roughness": rough,
    }
    return {
        kind: torch.where(torch.isfinite(values), values, torch.inf)
        for kind, values in found.items()
    }


def _rounded_up(value: float) -> float:
    """The smallest power of two from a value on, at least 2**-40; 0 for 0."""
    return 2.0 ** max(math.ceil(math.log2(value)), -40) if value else 0.0


def _is_allowed(bound: float) -> bool:
    if bound == 0.0:
        return math.copysign(1.0, bound) > 0
    fraction, exponent = math.frexp(bound)
    return fraction == 0.5 and -39 <= exponent <= 41
