"""Small networks of every kind that the planner takes, with their inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

import crypten_espn as espn
from crypten_espn.masked.plan import Plan
from crypten_espn.masked.reference import Rounding, Roundings

from .cases import QUARTIC

QUADRATIC = espn.Polynomial((10, 512, 90), 10, (-5.0, 5.0))
CUBIC = espn.Polynomial((0, 500, 0, -9), 10, (-5.0, 5.0))
QUINTIC = espn.Polynomial((300, 512, 150, 4, -3, -1), 12, (-3.0, 3.0))


class Written(nn.Module):
    """A network whose forward is a function of its input and its modules."""

    def __init__(self, function: Callable[..., Any], *parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(parts)

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x, *self.parts)


def act(polynomial: espn.Polynomial = QUARTIC) -> nn.Module:
    return espn.PolynomialActivation(polynomial)


def conv(i: int, o: int, k: int = 1, **options: Any) -> nn.Module:
    return nn.Conv2d(i, o, k, **options)


def images(batch: int = 8) -> torch.Tensor:
    return torch.randn(batch, 3, 8, 8)


def vectors(batch: int = 8) -> torch.Tensor:
    return torch.randn(batch, 10)


def ready(network: nn.Module) -> Any:
    return network.eval().requires_grad_(False)


def _linears() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 6), nn.Linear(6, 3))


def _convolutions() -> nn.Module:
    return nn.Sequential(
        conv(3, 6, 3, padding=1), conv(6, 6, 3, groups=6), nn.Flatten(),
        nn.Linear(216, 4),
    )  # fmt: skip


def _residual() -> nn.Module:
    def forward(x, a, b, c, head):
        y = a(x)
        return head((y + b(y) + c(b(y))).flatten(1))

    return Written(
        forward, conv(3, 4, 3), conv(4, 4, 3, padding=1), conv(4, 4), nn.Linear(144, 5)
    )


def _dense() -> nn.Module:
    def forward(x, a, b, c, p, q, head):
        x = a(x)
        x = torch.cat([x, b(p(x))], 1)
        x = torch.cat([x, c(q(x))], 1)
        return head(nn.functional.avg_pool2d(x, 8).flatten(1))

    return Written(
        forward, conv(3, 4, 3, padding=1), conv(4, 4, 3, padding=1),
        conv(8, 4, 3, padding=1), act(), act(), nn.Linear(12, 6),
    )  # fmt: skip


RESCALING: dict[str, Any] = {
    "linears": (_linears, vectors),
    "convolutions": (_convolutions, images),
    "residual": (_residual, images),
    "dense": (_dense, images),
}


def _border_pools() -> nn.Module:
    return nn.Sequential(
        conv(3, 4), nn.AvgPool2d(3, 1, 1, count_include_pad=False), act(),
        nn.AvgPool2d(3, 2, ceil_mode=True), nn.Flatten(), nn.Linear(64, 4),
    )  # fmt: skip


def _pool_beside_its_input() -> nn.Module:
    return Written(
        lambda x, a, b, p: b(nn.functional.avg_pool2d(p(a(x)), 3, 1, 1) + x),
        conv(3, 3), conv(3, 3), act(),
    )  # fmt: skip


OTHERS: dict[str, Any] = {
    "quartic": (
        lambda: nn.Sequential(
            nn.Linear(10, 16), act(), nn.Linear(16, 16), act(), nn.Linear(16, 10)
        ),
        vectors,
    ),
    "one logit": (
        lambda: nn.Sequential(nn.Linear(10, 16), act(QUADRATIC), nn.Linear(16, 1)),
        vectors,
    ),
    "quadratic": (
        lambda: nn.Sequential(
            conv(3, 8, 3), act(QUADRATIC), nn.AvgPool2d(2), conv(8, 8, 3),
            act(QUADRATIC), nn.Flatten(), nn.Linear(8, 10),
        ),
        images,
    ),
    "quintic": (
        lambda: nn.Sequential(
            conv(3, 8, 3), act(QUINTIC), nn.AvgPool2d(3), nn.Flatten(),
            nn.Linear(32, 10),
        ),
        images,
    ),
    "cubic": (
        lambda: nn.Sequential(
            conv(3, 8, 3), act(CUBIC), nn.Flatten(), nn.Linear(288, 10)
        ),
        images,
    ),
    "maps as outputs": (
        lambda: nn.Sequential(conv(3, 6, 3), act(), conv(6, 2, 3)),
        images,
    ),
    "border pools": (_border_pools, images),
    "pool beside its input": (_pool_beside_its_input, images),
}  # fmt: skip


def coins(plan: Plan, seed: int) -> Roundings:
    """Coins as the parties have them: masks, and the dealer's less what is dropped."""
    random = np.random.default_rng(seed)

    def rounding(number: int, z: np.ndarray) -> Rounding:
        act, result = plan.steps[number].activation, (len(z), *plan.shapes[number + 1])
        first = [random.integers(0, 1 << 62, z.shape) for _ in range(act.masks)]
        dropped = random.integers(0, 1 << act.unsent, result)
        return Rounding(first, random.integers(0, 1 << act.drop, result) - dropped)

    return rounding
