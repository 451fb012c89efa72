"""Corruptions of images that no interval and no guard was fitted to."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

_Corruption = Callable[[Tensor, torch.Generator], Tensor]


def _blurred(sigma: float) -> _Corruption:
    reach = math.ceil(3 * sigma)
    taps = torch.exp(-(torch.arange(-reach, reach + 1.0) ** 2) / (2 * sigma**2))
    taps = taps / taps.sum()

    def corrupt(x: Tensor, generator: torch.Generator) -> Tensor:
        channels = x.shape[1]
        x = functional.pad(x, (reach,) * 4, mode="replicate")
        for shape in ((1, -1), (-1, 1)):
            kernel = taps.view(1, 1, *shape).repeat(channels, 1, 1, 1)
            x = functional.conv2d(x, kernel, groups=channels)
        return x

    return corrupt


def _speckled(x: Tensor, generator: torch.Generator) -> Tensor:
    return x * (1 + 0.5 * torch.randn(x.shape, generator=generator))


def _uniform_noise(x: Tensor, generator: torch.Generator) -> Tensor:
    return x + torch.rand(x.shape, generator=generator) - 0.5


def _salted(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.where(torch.rand(x.shape, generator=generator) < 0.1, 1.0, x)


def _moved_down(x: Tensor, generator: torch.Generator) -> Tensor:
    by = x.shape[2] // 3
    return functional.pad(x, (0, 0, by, 0))[:, :, : x.shape[2]]


def _turned(degrees: float) -> _Corruption:
    angle = math.radians(degrees)
    cosine, sine = math.cos(angle), math.sin(angle)

    def corrupt(x: Tensor, generator: torch.Generator) -> Tensor:
        turn = torch.tensor([[cosine, -sine, 0.0], [sine, cosine, 0.0]])
        shape = list(x.shape)
        grid = functional.affine_grid(turn.expand(len(x), 2, 3), shape, False)
        return functional.grid_sample(x, grid, align_corners=False)

    return corrupt


def _erased(value: float) -> _Corruption:
    """A square of a third of the height at a random place."""

    def corrupt(x: Tensor, generator: torch.Generator) -> Tensor:
        side, x = x.shape[2] // 3, x.clone()
        for image in x:
            top, left = (
                int(torch.randint(length - side, (1,), generator=generator))
                for length in image.shape[1:]
            )
            image[:, top : top + side, left : left + side] = value
        return x

    return corrupt


def _striped(axis: int, period: int) -> _Corruption:
    """White over every other stripe of the image."""

    def corrupt(x: Tensor, generator: torch.Generator) -> Tensor:
        white = torch.arange(x.shape[axis]) // period % 2 == 1
        return torch.where(white.view(-1, *(1,) * (-1 - axis)), 1.0, x)

    return corrupt


def _coarse(x: Tensor, generator: torch.Generator) -> Tensor:
    small = functional.avg_pool2d(x, 4, ceil_mode=True)
    return functional.interpolate(small, x.shape[2:], mode="nearest")


def _enlarged(x: Tensor, generator: torch.Generator) -> Tensor:
    height, width = x.shape[2:]
    middle = x[
        :, :, height // 4 : height - height // 4, width // 4 : width - width // 4
    ]
    return functional.interpolate(middle, (height, width), mode="bilinear")


def _half_inverted(x: Tensor, generator: torch.Generator) -> Tensor:
    half = x.shape[3] // 2
    return torch.cat([x[..., :half], 1 - x[..., half:]], 3)


# (n, channels, height, width) in [0, 1], to which the results are clipped.
UNSEEN: dict[str, _Corruption] = {
    "gaussian blur 1": _blurred(1.0),
    "gaussian blur 3": _blurred(3.0),
    "speckle": _speckled,
    "uniform noise": _uniform_noise,
    "salt 10 %": _salted,
    "vertical shift": _moved_down,
    "rotation 20": _turned(20.0),
    "rotation 90": _turned(90.0),
    "upside down": lambda x, generator: x.flip(2),
    "erased, black": _erased(0.0),
    "erased, white": _erased(1.0),
    "striped across 2": _striped(-2, 2),
    "striped down 2": _striped(-1, 2),
    "striped down 5": _striped(-1, 5),
    "coarse pixels": _coarse,
    "enlarged": _enlarged,
    "gamma 0.3": lambda x, generator: x**0.3,
    "gamma 3": lambda x, generator: x**3,
    "threshold": lambda x, generator: (x > 0.3).float(),
    "two at once": lambda x, generator: x.maximum(x.roll(1, 0)),
    "half inverted": _half_inverted,
    "contrast x1.7 about 0": lambda x, generator: 1.7 * x,
}


def unseen(images: Tensor, name: str, *, seed: int) -> Tensor:
    """Images in [0, 1] corrupted in one way of `UNSEEN`, in [0, 1].

    Args:
        images: (n, channels, height, width).
        name: which.
        seed: of the noises and places.
    """
    generator = torch.Generator().manual_seed(seed)
    return UNSEEN[name](images, generator).clamp(0, 1)
