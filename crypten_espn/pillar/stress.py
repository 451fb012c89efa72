"""A network on inputs unlike those it was trained on: what leaves the intervals.

Accuracy on such inputs is not the question. A polynomial grows without bound outside
its interval; in fixed point a large value wraps silently into a wrong answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..inputs import real_tensor
from ..table import aligned
from .escapes import Escapes, LayerEscapes
from .keeping import as_taken, evaluating


@dataclass(frozen=True)
class Levels:
    """The smallest and the largest value of each channel, (1, channels, ...)."""

    low: Tensor
    high: Tensor

    @property
    def span(self) -> Tensor:
        """The largest minus the smallest."""
        return self.high - self.low

    @staticmethod
    def of(x: Tensor) -> Levels:
        """Those of images, (n, channels, ...)."""
        shape = (1, -1, *(1,) * (x.dim() - 2))
        flat = x.transpose(0, 1).flatten(1)
        return Levels(flat.amin(1).view(shape), flat.amax(1).view(shape))


_Corruption = Callable[[Tensor, Levels, torch.Generator], Tensor]


def _contrast(factor: float) -> _Corruption:
    def corrupt(x: Tensor, levels: Levels, generator: torch.Generator) -> Tensor:
        mean = x.flatten(1).mean(1).view(-1, *(1,) * (x.dim() - 1))
        return mean + factor * (x - mean)

    return corrupt


def _brightness(share: float) -> _Corruption:
    return lambda x, levels, generator: x + share * levels.span


def _noise(share: float) -> _Corruption:
    def corrupt(x: Tensor, levels: Levels, generator: torch.Generator) -> Tensor:
        return x + share * levels.span * torch.randn(x.shape, generator=generator)

    return corrupt


def _salt_and_pepper(share: float) -> _Corruption:
    def corrupt(x: Tensor, levels: Levels, generator: torch.Generator) -> Tensor:
        drawn = torch.rand(x.shape, generator=generator)
        x = torch.where(drawn < share / 2, levels.low, x)
        return torch.where(drawn > 1 - share / 2, levels.high, x)

    return corrupt


def _blur(x: Tensor, levels: Levels, generator: torch.Generator) -> Tensor:
    """The mean over 5 x 5, of one axis over 5."""
    pool = functional.avg_pool1d if x.dim() == 3 else functional.avg_pool2d
    return pool(x, 5, stride=1, padding=2, count_include_pad=False)


def _shift(x: Tensor, levels: Levels, generator: torch.Generator) -> Tensor:
    """A quarter to the right, the lowest value in its place."""
    by = max(x.shape[-1] // 4, 1)
    return torch.cat([levels.low.expand_as(x)[..., :by], x[..., :-by]], -1)


def _inversion(x: Tensor, levels: Levels, generator: torch.Generator) -> Tensor:
    return levels.low + levels.high - x


def _flat(share: float) -> _Corruption:
    return lambda x, levels, generator: (levels.low + share * levels.span).expand_as(x)


def _binary_noise(size: int) -> _Corruption:
    """Each field of that size the lowest or the highest; nothing of the image."""

    def corrupt(x: Tensor, levels: Levels, generator: torch.Generator) -> Tensor:
        fields = [-(-length // size) for length in x.shape[2:]]
        drawn = torch.rand(*x.shape[:2], *fields, generator=generator) < 0.5
        for axis, length in enumerate(x.shape[2:], start=2):
            drawn = drawn.repeat_interleave(size, axis).narrow(axis, 0, length)
        return torch.where(drawn, levels.low, levels.high)

    return corrupt


def _board(size: int, axes: tuple[int, ...] = (-2, -1)) -> _Corruption:
    """Fields of `size` along each of the axes that there are, the first the lowest."""

    def corrupt(x: Tensor, levels: Levels, generator: torch.Generator) -> Tensor:
        place = torch.zeros(x.shape[2:], dtype=torch.int64)
        for axis in axes:
            if place.dim() + axis >= 0:
                fields = torch.arange(place.shape[axis]) // size
                place = place + fields.view(-1, *(1,) * (-1 - axis))
        return torch.where(place % 2 == 0, levels.low, levels.high).expand_as(x)

    return corrupt


# What each does to (n, channels, ...), and whether it needs axes after the channels.
_CORRUPTIONS: dict[str, tuple[_Corruption, bool]] = {
    "contrast x3": (_contrast(3.0), False),
    "contrast x0.3": (_contrast(0.3), False),
    "brightness +50 %": (_brightness(0.5), False),
    "brightness -50 %": (_brightness(-0.5), False),
    "gaussian noise 10 %": (_noise(0.1), False),
    "gaussian noise 30 %": (_noise(0.3), False),
    "salt and pepper 5 %": (_salt_and_pepper(0.05), False),
    "salt and pepper 20 %": (_salt_and_pepper(0.2), False),
    "blur": (_blur, True),
    "shift": (_shift, True),
    "inversion": (_inversion, False),
    "flat, lowest": (_flat(0.0), False),
    "flat, middle": (_flat(0.5), False),
    "flat, highest": (_flat(1.0), False),
    "checkerboard 1": (_board(1), True),
    "checkerboard 4": (_board(4), True),
    "stripes across 1": (_board(1, (-2,)), True),
    "stripes across 2": (_board(2, (-2,)), True),
    "stripes across 4": (_board(4, (-2,)), True),
    "stripes down 1": (_board(1, (-1,)), True),
    "stripes down 2": (_board(2, (-1,)), True),
    "stripes down 4": (_board(4, (-1,)), True),
    "binary noise 1": (_binary_noise(1), False),
    "binary noise 4": (_binary_noise(4), True),
}
# Beyond every image's levels, as wrongly normalised inputs are.
_BEYOND = ("contrast x3", "brightness +50 %", "brightness -50 %", "gaussian noise 30 %")
BEYOND = "beyond, "
CLEAN = "clean"
# Nothing of the image is left in these.
_PATTERNS = ("flat", "checkerboard", "stripes", "binary noise")
# The same for every image, so that one is enough.
_ONE = ("flat", "checkerboard", "stripes")
# Images of a sample that are corrupted, each in every way: of four one, 64 at most.
_EVERY = 4
_CORRUPTED = 64


def corruptions(
    images: Tensor, *, seed: int = 0, levels: Levels | None = None
) -> dict[str, Tensor]:
    """The images themselves, and each way they are corrupted.

    Shares are of the span between a channel's smallest and largest value, to which all
    but those called "beyond" are clipped, as a camera clips.

    Args:
        images: (n, channels, ...), float, as the network takes them.
        seed: of the noises.
        levels: the smallest and largest values; those of the images if None.

    Returns:
        By name, tensors of the shape of the images; one image of those that do not
        depend on them. Blur, shift, checkerboard and stripes need one or two axes after
        the channels, and are left out elsewhere.
    """
    levels = Levels.of(images) if levels is None else levels
    found = {CLEAN: images}
    for name, (corrupt, spatial) in _CORRUPTIONS.items():
        if spatial and images.dim() not in (3, 4):
            continue
        given = images[:1] if name.startswith(_ONE) else images
        generator = torch.Generator().manual_seed(seed)
        made = corrupt(given, levels, generator)
        found[name] = made.maximum(levels.low).minimum(levels.high)
        if name in _BEYOND:
            found[BEYOND + name] = made
    return found


def drawn(images: Tensor, levels: Levels, generator: torch.Generator) -> Tensor:
    """Each image corrupted in a way drawn for it, or two, at a strength drawn for it.

    Args:
        images: (n, channels, ...), float, on the processor.
        levels: the smallest and largest values, within which all stays.
        generator: of the ways, their strengths and their noises.
    """
    ways = [
        corrupt
        for corrupt, spatial in _CORRUPTIONS.values()
        if not spatial or images.dim() in (3, 4)
    ]
    made = []
    for image in images.split(1):
        first, second = torch.randint(len(ways), (2,), generator=generator).tolist()
        twice, strength = torch.rand(2, generator=generator).tolist()
        result = image
        for way in (first, second) if twice < 0.5 else (first,):
            result = ways[way](result, levels, generator)
            result = result.maximum(levels.low).minimum(levels.high)
        made.append(image.lerp(result, min(1.0, 1.6 * strength)))
    return torch.cat(made)


def of_images(name: str) -> bool:
    """Whether a corruption leaves the image, and its levels, to be recognised."""
    return not name.startswith((BEYOND, *_PATTERNS))


def sample(images: Tensor, *, seed: int = 0) -> dict[str, Tensor]:
    """The images, and corruptions of some of them: what a network is prepared for.

    Args:
        images: (n, channels, ...), float, as the network takes them.
        seed: of the noises.

    Returns:
        As `corruptions`, at the levels of all images; corrupted are every fourth, at
        most 64.
    """
    some = images[:: max(_EVERY, -(-len(images) // _CORRUPTED))]
    found = corruptions(some, seed=seed, levels=Levels.of(images))
    return {**found, CLEAN: images}


@dataclass(frozen=True)
class StressRow:
    """What one corruption does.

    Attributes:
        corruption: its name; "clean" for the images as they were given.
        images: how many.
        escaping: how many of them have a value outside an interval.
        not_finite: how many have an output, or a value before it, that is not finite.
        reach: the largest distance from an interval's middle, in its radii.
        layer: where that is.
    """

    corruption: str
    images: int
    escaping: int
    not_finite: int
    reach: float
    layer: str


@dataclass(frozen=True)
class StressReport:
    """Every corruption and every layer; `str` is both tables and a sentence."""

    rows: tuple[StressRow, ...]
    layers: tuple[LayerEscapes, ...]

    @property
    def safe(self) -> bool:
        """Whether no value left its interval."""
        return not any(row.escaping for row in self.rows)

    @property
    def verdict(self) -> str:
        """One sentence: what escaped, and the cure."""
        total = sum(row.images for row in self.rows)
        if self.safe:
            return f"no value outside its interval on {total:,} inputs"
        escaping = sum(row.escaping for row in self.rows)
        bad = sum(row.not_finite for row in self.rows)
        furthest = max(self.rows, key=lambda row: row.reach)
        return (
            f"{escaping:,} of {total:,} inputs leave an interval, {bad:,} are not "
            f"finite; furthest is {furthest.corruption}, {furthest.reach:.3g} radii at "
            f"{furthest.layer}. An InputGuard refuses such inputs; calibrate with a "
            "larger margin or a lower degree to take them"
        )

    def __str__(self) -> str:
        head = ("input", "images", "escaping", "not finite", "largest", "at")
        rows = [
            (
                row.corruption,
                f"{row.images}",
                f"{row.escaping}",
                f"{row.not_finite}",
                f"{row.reach:.3g}",
                row.layer,
            )
            for row in self.rows
        ]
        lines = aligned([head, *rows], left=1)
        layers = [
            (x.name, f"{x.largest:.3g}", f"{x.outside:,} of {x.values:,}")
            for x in self.layers
        ]
        lines += ["", *aligned([("layer", "largest", "outside"), *layers], left=1)]
        return "\n".join([*lines, "", self.verdict])


def stress(model: nn.Module, images: object, *, seed: int = 0) -> StressReport:
    """Run a network on the images and on `corruptions` of them.

    Args:
        model: a network with `PolynomialActivation`s; run in evaluation mode and put
            back.
        images: (n, channels, ...) as the network takes them; a hundred will do.
        seed: of the noises.

    Raises:
        RangeError: no polynomial activation; images that hold NaN or infinity.
        DataError: no images.
    """
    x = real_tensor(images, "the images", finite=True)
    rows, totals = [], Escapes.of(model).layers
    for name, corrupted in corruptions(x.float(), seed=seed).items():
        reach, bad, layers = reaches(model, corrupted)
        furthest = max(layers, key=lambda layer: layer.largest)
        rows.append(
            StressRow(
                name,
                len(corrupted),
                int((reach > 1.0).sum()),
                int(bad.sum()),
                furthest.largest,
                furthest.name,
            )
        )
        for layer in layers:
            total = totals[layer.name]
            total.values += layer.values
            total.outside += layer.outside
            total.largest = max(total.largest, layer.largest)
            total.finite &= layer.finite
            total.rows = total.rows.maximum(layer.rows)
    return StressReport(tuple(rows), tuple(totals.values()))


def reaches(
    model: nn.Module, images: Tensor
) -> tuple[Tensor, Tensor, list[LayerEscapes]]:
    """How far each image goes.

    Args:
        model: a network with `PolynomialActivation`s; run in evaluation mode and put
            back.
        images: (n, channels, ...), float.

    Returns:
        (n,) the largest distance from an interval's middle, in its radii; (n,) whether
        an output or a value before it was not finite; every layer's counts.
    """
    found, bad = [], []
    with evaluating(model), Escapes.of(model) as seen:
        for batch in images.split(128):
            y = model(as_taken(model, batch).clone())
            reach = seen.take().cpu()
            found.append(reach)
            finite = torch.isfinite(y.flatten(1)).all(1).cpu()
            bad.append(~(finite & torch.isfinite(reach)))
    return torch.cat(found), torch.cat(bad), list(seen.layers.values())
