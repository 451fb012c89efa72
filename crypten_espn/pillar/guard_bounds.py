"""What an input guard bounds, and bounds that suit a network.

Statistics of an input are taken for each of its channels. Of features, (n, features),
there are too many to bound each by what some hundred inputs show: all together are one
channel, and each has its bounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import DataError, RangeError
from .data import Normalization
from .stress import CLEAN, of_images, reaches, sample

KINDS = ("depth", "height", "energy", "roughness")
MOST_CHANNELS = 1 << 12
_ENDS = ("depth", "height")
# Room for inputs to come, before a bound is rounded up.
_SLACK = 1.125
# Of a channel's range: what undoing a normalisation in floating point leaves.
_ROUNDING = 2.0**-12
# Bounds are 0 or from 2**-40 to 2**40.
_LEAST = -40
LARGEST = 2.0**40
# Where so many of the images, and two, have a channel's largest value, there is none
# larger, such as white, and it needs no room: 1 must not become 2.
_AT_END = 0.01
# An input that reaches further, in radii, is one to refuse: those to come are others.
_SAFE = 0.9

Statistics = Mapping[str, Tensor]


def normalization_of(network: nn.Module) -> Normalization | None:
    """What a network says of its images; None where it says nothing."""
    found = getattr(network, "normalization", None)
    return found if isinstance(found, Normalization) else None


def mean_and_std(
    images: Tensor, normalization: Normalization | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """For each channel of images; 0 and 1 without normalisation.

    Raises:
        DataError: images without channels, or of others than the normalisation's or
            more than 4,096.
    """
    if images.dim() < 2:
        raise DataError(
            f"the images have shape {tuple(images.shape)}; give (n, channels, ...)"
        )
    channels = images.shape[1]
    if channels > MOST_CHANNELS:
        raise DataError(
            f"images of {channels:,} channels; a guard is of at most {MOST_CHANNELS:,}"
        )
    if normalization is None:
        return (0.0,) * channels, (1.0,) * channels
    if len(normalization.mean) != channels:
        raise DataError(
            f"the images have {channels} channels, the normalisation "
            f"{len(normalization.mean)}; give the one of these images"
        )
    return normalization.mean, normalization.std


def statistics(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Statistics:
    """By kind, (n, channels) float64; infinity where an input is not finite."""
    x = x.double().cpu()
    ones = (1,) * (x.dim() - 2)
    x = x * torch.tensor(std, dtype=torch.float64).view(-1, *ones)
    x = x + torch.tensor(mean, dtype=torch.float64).view(-1, *ones)
    channels = x.shape[1]
    if x.dim() == 2:
        x = x.unsqueeze(1)
    rough = torch.zeros(x.shape[:2], dtype=torch.float64)
    for axis in range(2, x.dim()):
        if x.shape[axis] > 1 and x.shape[1] == channels:
            rough = rough + x.diff(dim=axis).square().flatten(2).mean(2)
    flat = x.flatten(2)
    found = {
        "depth": (-flat).amax(2).clamp_min(0),
        "height": flat.amax(2).clamp_min(0),
        "energy": flat.square().mean(2),
        "roughness": rough,
    }
    return {
        kind: torch.where(torch.isfinite(values), values, torch.inf).expand(
            -1, channels
        )
        for kind, values in found.items()
    }


def refusals(seen: Statistics, bounds: Statistics) -> dict[str, Tensor]:
    """By kind, (n, channels) whether an input's statistic is beyond its bound.

    Args:
        seen: (n, channels) by kind.
        bounds: (channels,) by kind.
    """
    room = sum(bounds[kind] for kind in _ENDS) * _ROUNDING
    return {
        kind: seen[kind] > bounds[kind] + (room if kind in _ENDS else 0.0)
        for kind in KINDS
    }


def refused(seen: Statistics, bounds: Statistics) -> Tensor:
    """(n,) whether an input is beyond any bound."""
    return torch.stack(list(refusals(seen, bounds).values())).any(0).any(1)


def bounds_of(seen: Statistics, *, room: bool, bounded: bool) -> Statistics:
    """(channels,) by kind, the smallest powers of two that the inputs keep.

    Args:
        seen: (n, channels) by kind.
        room: whether to leave an eighth for inputs to come.
        bounded: whether the inputs' values are known to have ends, such as pixels'.

    Raises:
        RangeError: a statistic beyond 2**40.
    """
    reach = (seen["depth"] + seen["height"]).amax(0) * _ROUNDING
    found = {}
    for kind in KINDS:
        largest = seen[kind].amax(0)
        if not bool((largest <= LARGEST / _SLACK).all()):
            raise RangeError(
                f"the images' {kind} is {float(largest.max()):.3g}; normalise them as "
                "in training"
            )
        slack = torch.full_like(largest, _SLACK if room else 1.0)
        if kind in _ENDS:
            shared = (seen[kind] >= largest - reach).sum(0)
            slack[(shared >= _at_end(len(seen[kind]))) | bounded] = 1.0
            largest = (largest - reach).clamp_min(0)
        found[kind] = _rounded_up(largest * slack)
    return found


def _black_and_white(images: Tensor) -> Normalization | None:
    """What makes each channel's shared ends 0 and 1; None if any has none."""
    if images.dim() < 3:
        return None
    flat = images.flatten(2)
    low, high = flat.amin(2), flat.amax(2)
    least, most = low.amin(0), high.amax(0)
    shared = torch.minimum((low == least).sum(0), (high == most).sum(0))
    if not bool(((shared >= _at_end(len(images))) & (least < most)).all()):
        return None
    std = 1 / (most - least).double()
    return Normalization(tuple((-least * std).tolist()), tuple(std.tolist()))


def _at_end(images: int) -> float:
    return max(2, _AT_END * images)


class Sample:
    """Clean and corrupted images, and how far a guard may open for them.

    Attributes:
        images: (m, channels, ...) all of them, the clean first.
        names: (m,) of what was done to each.
        clean: (m,) bool.
        least: bounds that the clean keep, with room.
        widest: bounds that they keep with whatever a camera makes of them.
        mean, std: of their normalisation.
    """

    def __init__(
        self,
        images: Tensor,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        bounded: bool,
    ) -> None:
        self.mean, self.std = mean, std
        groups = sample(images)
        self.images = torch.cat(list(groups.values()))
        self.names = [name for name, group in groups.items() for _ in group]
        self.clean = torch.tensor([name == CLEAN for name in self.names])
        self._seen = statistics(self.images, mean, std)
        usual = torch.tensor([of_images(name) for name in self.names])
        self.least = self._bounds(self.clean, room=True, bounded=bounded)
        wanted = self._bounds(usual, room=False, bounded=bounded)
        self.widest = {k: self.least[k].maximum(wanted[k]) for k in KINDS}

    @staticmethod
    def of(images: Tensor, normalization: Normalization | None) -> Sample:
        """The sample of images (n, channels, ...), float, as a network takes them.

        Without normalisation, where many images share each channel's smallest and
        largest value, such as black and white, these count as 0 and 1.

        Raises:
            DataError: as `mean_and_std`.
            RangeError: as `bounds_of`.
        """
        normalization = normalization or _black_and_white(images)
        mean, std = mean_and_std(images, normalization)
        return Sample(images, mean, std, bounded=normalization is not None)

    @property
    def admitted(self) -> Tensor:
        """(m,) whether the widest bounds let an image pass."""
        return ~refused(self._seen, self.widest)

    def bounds_for(self, network: nn.Module) -> Statistics:
        """The loosest bounds found, up to the widest, that let none pass that escapes.

        1. Start with the widest.
        2. While images pass that reach beyond 0.9 radii, lower the bound that refuses
           most of them for each other image; never below the least.
        3. Raise again what need not have been lowered.

        Args:
            network: with polynomial activations.

        Raises:
            RangeError: clean images escape themselves, or corrupted ones that no bound
                tells from clean ones; or no polynomial activation.
        """
        reach, _, layers = reaches(network, self.images)
        outside = int((reach[self.clean] > 1.0).sum())
        if outside:
            worst = max(layers, key=lambda layer: layer.largest)
            raise RangeError(
                f"{outside} of {int(self.clean.sum())} images leave the intervals of "
                f"the network's polynomials as they are (most at {worst.name}); "
                "espn.settle_intervals(network, images) widens the intervals"
            )
        escaping = (reach > _SAFE) & ~self.clean
        bounds = {kind: bound.clone() for kind, bound in self.widest.items()}
        lowered: list[tuple[str, int]] = []
        while bool((left := escaping & ~refused(self._seen, bounds)).any()):
            step = self._step(bounds, escaping, left)
            if step is None:
                kinds = sorted({n for n, e in zip(self.names, left, strict=True) if e})
                raise RangeError(
                    f"{int(left.sum())} corrupted images reach up to "
                    f"{float(reach[left].max()):.3g} radii, and no bound tells them "
                    f"from clean ones ({', '.join(kinds)}); "
                    "espn.settle_intervals(network, images) widens the intervals, and "
                    "espn.calibrate makes wide ones"
                )
            kind, channel, bound = step
            bounds[kind][channel] = bound
            lowered.append((kind, channel))
        for kind, channel in dict.fromkeys(lowered):
            self._raise(bounds, kind, channel, escaping)
        return bounds

    def _step(
        self, bounds: Statistics, escaping: Tensor, left: Tensor
    ) -> tuple[str, int, float] | None:
        """Which bound to lower, and to what; None if none can be."""
        passing = ~refused(self._seen, bounds) & ~escaping
        best, found = 0.0, None
        for kind in KINDS:
            highest = self._seen[kind][left].amax(0)
            if kind in _ENDS:
                room = sum(bounds[end] for end in _ENDS) * _ROUNDING
                highest = highest - room
            lower = _below(highest).minimum(bounds[kind])
            trial = {**bounds, kind: lower}
            beyond = refusals(self._seen, trial)[kind]
            gain = (beyond & left[:, None]).sum(0).double()
            score = gain / (1 + (beyond & passing[:, None]).sum(0))
            score[lower < self.least[kind]] = 0.0
            channel = int(score.argmax())
            if float(score[channel]) > best:
                best = float(score[channel])
                found = kind, channel, float(lower[channel])
        return found

    def _raise(
        self, bounds: dict[str, Tensor], kind: str, channel: int, escaping: Tensor
    ) -> None:
        """Raise a bound as long as none passes that escapes."""
        row = bounds[kind]
        while float(row[channel]) < float(self.widest[kind][channel]):
            before = float(row[channel])
            row[channel] = max(2 * before, 2.0**_LEAST)
            if bool((escaping & ~refused(self._seen, bounds)).any()):
                row[channel] = before
                return

    def _bounds(self, which: Tensor, *, room: bool, bounded: bool) -> Statistics:
        seen = {kind: values[which] for kind, values in self._seen.items()}
        return bounds_of(seen, room=room, bounded=bounded)


def _rounded_up(values: Tensor) -> Tensor:
    """The smallest powers of two from each value on, at least 2**-40; 0 for 0."""
    fraction, exponent = torch.frexp(values)
    exponent = (exponent - (fraction == 0.5).int()).clamp_min(_LEAST)
    return torch.ldexp(torch.ones_like(values), exponent) * (values > 0)


def _below(values: Tensor) -> Tensor:
    """The largest powers of two below each value; 0 below 2**-40."""
    fraction, exponent = torch.frexp(values.clamp(0, 2.0 * LARGEST))
    exponent = exponent - 1 - (fraction == 0.5).int()
    return torch.ldexp(torch.ones_like(values), exponent) * (exponent >= _LEAST)
