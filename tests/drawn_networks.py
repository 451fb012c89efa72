"""Networks drawn at random, from constructs that conversions get wrong."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import crypten_espn as espn

QUADRATIC = espn.Polynomial((64, 512, 200), 10, (-4.0, 4.0))
QUARTIC = espn.Polynomial((322, 512, 160, 0, -3), 10, (-5.0, 5.0))


class Drawn(nn.Module):
    """Operations one after another; each reads the last value and earlier ones.

    Attributes:
        parts: what the operations hold.
        steps: (construct, function of the values so far).
    """

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList()
        self.steps: list[tuple[str, Callable[[list[Tensor]], Tensor]]] = []

    def hold(self, part: Any) -> Any:
        """Register a module, or a tensor as a buffer, and return it."""
        if isinstance(part, nn.Module):
            self.parts.append(part)
        else:
            self.register_buffer(f"constant{len(self.steps)}_{part.numel()}", part)
        return part

    @property
    def constructs(self) -> list[str]:
        return [name for name, _ in self.steps]

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for _, step in self.steps:
            values.append(step(values))
        return values[-1]


class Draw:
    """Draws one network: `Draw(seed).network()`."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self._torch = torch.Generator().manual_seed(seed)

    def network(self) -> tuple[Drawn, Tensor]:
        """A network in evaluation mode, and an example of 1 to 5 inputs."""
        r = self.random
        torch.manual_seed(r.randrange(2**31))
        net = Drawn()
        rank = r.choices((3, 1, 2), (8, 3, 2))[0]
        shape = {
            3: (r.choice((1, 2, 3, 4)), r.randint(5, 9), r.randint(5, 9)),
            2: (r.randint(2, 5), r.randint(4, 8)),
            1: (r.randint(4, 12),),
        }[rank]
        x = torch.randn(r.randint(1, 5), *shape, generator=self._torch)
        values = [x]
        for _ in range(r.randint(2, 9)):
            self._extend(net, values)
        if values[-1].dim() > 2 and r.random() < 0.8:
            self._extend(net, values, "flatten")
        if values[-1].dim() == 2:
            self._extend(net, values, "linear")
        return net.eval().requires_grad_(False), x

    def _extend(self, net: Drawn, values: list[Tensor], name: str = "") -> None:
        """Add one construct that the network itself can compute."""
        for _ in range(20):
            chosen = (
                name or self.random.choices(*zip(*_WEIGHTS.items(), strict=True))[0]
            )
            step = getattr(self, f"_{chosen}")(net, values)
            if step is None:
                continue
            try:
                with torch.no_grad():
                    value = step(list(values))
            except (RuntimeError, ValueError, IndexError):
                continue
            if not 0 < value.numel() < 20_000 or not bool(value.isfinite().all()):
                continue
            net.steps.append((chosen, step))
            values.append(value)
            return

    # -- one method a construct: a step, or None where it does not apply

    def _conv(self, net, values):
        c, r = values[-1].shape[1], self.random
        if values[-1].dim() != 4:
            return None
        groups = r.choice([g for g in (1, 1, 1, 2, c) if c % g == 0])
        layer = nn.Conv2d(
            c,
            groups * r.choice((1, 2, 3)),
            (r.choice((1, 2, 3)), r.choice((1, 3))),
            stride=r.choice((1, 1, 2, (2, 1))),
            padding=r.choice((0, 1, (1, 0))),
            dilation=r.choice((1, 1, 2)),
            groups=groups,
            bias=r.random() < 0.6,
        )
        layer = net.hold(layer)
        return lambda v: layer(v[-1])

    def _linear(self, net, values):
        layer = net.hold(
            nn.Linear(
                values[-1].shape[-1],
                self.random.randint(2, 6),
                bias=self.random.random() < 0.7,
            )
        )
        return lambda v: layer(v[-1])

    def _conv1d(self, net, values):
        if values[-1].dim() != 3:
            return None
        layer = net.hold(nn.Conv1d(values[-1].shape[1], 3, 3, padding=1))
        return lambda v: layer(v[-1])

    def _activation(self, net, values):
        polynomial = self.random.choice((QUADRATIC, QUARTIC))
        layer = net.hold(espn.PolynomialActivation(polynomial))
        return lambda v: layer(v[-1])

    def _shared(self, net, values):
        """One module used twice."""
        x = values[-1]
        layer: Any = nn.Linear(x.shape[-1], x.shape[-1])
        if x.dim() == 4:
            layer = nn.Conv2d(x.shape[1], x.shape[1], 3, padding=1)
        layer, act = net.hold(layer), net.hold(espn.PolynomialActivation(QUADRATIC))
        return lambda v: layer(act(layer(v[-1])))

    def _norm(self, net, values):
        x = values[-1]
        kinds: Any = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}
        layer = kinds[x.dim()](x.shape[1], affine=self.random.random() < 0.8)
        layer.running_mean.normal_(0, 0.3)
        layer.running_var.uniform_(0.5, 2)
        if layer.affine:
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0, 0.3)
        layer = net.hold(layer.eval())
        return lambda v: layer(v[-1])

    def _average(self, net, values):
        if values[-1].dim() != 4:
            return None
        r = self.random
        layer = nn.AvgPool2d(
            r.choice((2, 3, (2, 3))),
            stride=r.choice((None, 1, 2, (1, 2))),
            padding=r.choice((0, 0, 1)),
            ceil_mode=r.random() < 0.3,
            count_include_pad=r.random() < 0.6,
        )
        layer = net.hold(layer)
        return lambda v: layer(v[-1])

    def _adaptive(self, net, values):
        x = values[-1]
        if x.dim() == 3:
            return lambda v: functional.adaptive_avg_pool1d(v[-1], 1)
        if x.dim() != 4:
            return None
        size = self.random.choice((1, 1, 2, (1, x.shape[3]), 3))
        return lambda v: functional.adaptive_avg_pool2d(v[-1], size)

    def _maximum(self, net, values):
        if values[-1].dim() != 4:
            return None
        r = self.random
        layer = nn.MaxPool2d(2, r.choice((1, 2)), dilation=r.choice((1, 1, 2)))
        layer = net.hold(layer)
        return lambda v: layer(v[-1])

    def _mean(self, net, values):
        x = values[-1]
        if x.dim() != 4:
            return None
        keep = self.random.random() < 0.5
        return lambda v: v[-1].mean((2, 3), keepdim=keep)

    def _residual(self, net, values):
        like = [i for i, v in enumerate(values[:-1]) if v.shape == values[-1].shape]
        if not like:
            return None
        place = self.random.choice(like)
        return lambda v: v[-1] + v[place]

    def _difference(self, net, values):
        like = [i for i, v in enumerate(values[:-1]) if v.shape == values[-1].shape]
        if not like:
            return None
        place = self.random.choice(like)
        return lambda v: v[-1] - v[place]

    def _twice(self, net, values):
        return lambda v: v[-1] + v[-1]

    def _broadcast(self, net, values):
        if values[-1].dim() != 4:
            return None
        return lambda v: v[-1] + functional.adaptive_avg_pool2d(v[-1], 1)

    def _product(self, net, values):
        return lambda v: v[-1] * torch.sigmoid(v[-1])

    def _constant(self, net, values):
        """Arithmetic with a public constant of some shape."""
        x, r = values[-1], self.random
        shapes = [(), (1,), (x.shape[-1],), tuple(x.shape[1:])]
        if x.dim() >= 3:
            shapes.append((1, x.shape[1], *[1] * (x.dim() - 2)))
        constant = torch.rand(r.choice(shapes), generator=self._torch) + 0.5
        constant = net.hold(constant)
        return r.choice(
            [
                lambda v: v[-1] * constant,
                lambda v: v[-1] + constant,
                lambda v: v[-1] - constant,
                lambda v: constant - v[-1],
                lambda v: v[-1] / constant,
                lambda v: -v[-1],
                lambda v: (v[-1] - 0.4) / 0.3,
            ]
        )

    def _pad(self, net, values):
        x, r = values[-1], self.random
        if x.dim() == 4:
            pads = r.choice(
                (
                    (1, 0, 2, 1),
                    (1, 1),
                    (0, 0, 0, 0, 1, 2),
                    (-1, 0, 0, -1),
                    (0, 1, -1, 1),
                )
            )
        else:
            pads = r.choice(((1, 0), (-1, 1)))
        return lambda v: functional.pad(v[-1], pads)

    def _slice(self, net, values):
        x, r = values[-1], self.random
        if x.dim() == 4:
            return r.choice(
                [
                    lambda v: v[-1][:, :, ::2, ::2],
                    lambda v: v[-1][:, :, 1:],
                    lambda v: v[-1][:, : max(1, x.shape[1] // 2)],
                    lambda v: v[-1].chunk(2, 1)[-1],
                ]
            )
        return lambda v: v[-1][..., 1:]

    def _concat(self, net, values):
        x, r = values[-1], self.random
        like = [
            i
            for i, v in enumerate(values)
            if v.dim() == x.dim()
            and v.shape[0] == x.shape[0]
            and v.shape[2:] == x.shape[2:]
        ]
        place = r.choice(like)
        return r.choice(
            [
                lambda v: torch.cat([v[-1], v[place]], 1),
                lambda v: torch.cat([v[-1], torch.ones_like(v[-1][:, :1])], 1),
                lambda v: torch.cat([v[-1], v[-1]], -1),
            ]
        )

    def _flatten(self, net, values):
        if values[-1].dim() < 3:
            return None
        return self.random.choice(
            [
                lambda v: v[-1].flatten(1),
                lambda v: v[-1].view(v[-1].size(0), -1),
                lambda v: v[-1].reshape(len(v[-1]), -1),
            ]
        )

    def _transpose(self, net, values):
        if values[-1].dim() < 3:
            return None
        return lambda v: v[-1].transpose(1, 2)

    def _cast(self, net, values):
        return self.random.choice(
            [
                lambda v: v[-1].double().float(),
                lambda v: v[-1].long().float(),
                lambda v: v[-1].to(torch.float32),
            ]
        )

    def _dropout(self, net, values):
        layer = net.hold(self.random.choice((nn.Dropout(0.5), nn.Identity())))
        return lambda v: layer(v[-1])

    def _in_place(self, net, values):
        """An addition or a scaling of a fresh value in place, as a statement."""
        layer = net.hold(espn.PolynomialActivation(QUADRATIC))

        def step(v):
            h = v[-1] * 1.0
            h.mul_(0.5)
            return layer(h)

        return step

    def _branch(self, net, values):
        layer = net.hold(espn.PolynomialActivation(QUADRATIC))

        def step(v):
            return layer(v[-1]) if v[-1].sum() > 0 else v[-1]

        return step


_WEIGHTS = {
    "conv": 10, "linear": 5, "conv1d": 1, "activation": 10, "shared": 1, "norm": 5,
    "average": 3, "adaptive": 2, "maximum": 0.3, "mean": 1, "residual": 4,
    "difference": 1.5, "twice": 0.7, "broadcast": 0.5, "product": 0.2, "constant": 4,
    "pad": 2, "slice": 1.5, "concat": 2.5, "flatten": 2, "transpose": 0.3, "cast": 0.7,
    "dropout": 1, "in_place": 0.7, "branch": 0.15,
}  # fmt: skip
