"""What inputs unlike any image do to a plan: escapes, wraps, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from crypten import nn as crypten_nn
from torch import Tensor

from ...layers import Reals
from ...pillar.escapes import in_radii
from ...pillar.guarding import HOW
from ...pillar.stress import corruptions
from ...polynomial import RING_BITS
from ..model import MaskedModel
from ..plan import Plan
from ..steps import Output, Step
from .layers import RESCALED, Layer
from .network import Network

# Images of each corruption: enough to see what blows up, and fewer of a network so
# large that all of them would take more multiplications than this.
IMAGES = 16
_WORK = 1 << 35


@dataclass(frozen=True)
class Tail:
    """What one corruption does to a plan.

    Attributes:
        corruption: its name, as in `pillar.stress.corruptions`.
        images: how many.
        escaping: of them, with a value outside its polynomial's interval.
        wrapping: with a value that its ring does not hold: a wrong answer.
        refused: by the guard, or beyond the plan's bound on inputs.
        refused_escaping, refused_wrapping: of them.
        reach: the largest distance from an interval's middle, in its radii.
        layer: where that is.
        wraps_at: the first layer where an input that is not refused wraps.
    """

    corruption: str
    images: int
    escaping: int
    wrapping: int
    refused: int
    refused_escaping: int
    refused_wrapping: int
    reach: float
    layer: str
    wraps_at: str


@dataclass(frozen=True)
class Tails:
    """All corruptions, the images themselves first; `str` is three lines.

    Attributes:
        images: how many were corrupted.
        guarded: whether the network has an input guard.
    """

    rows: tuple[Tail, ...]
    images: int
    guarded: bool

    @property
    def silent(self) -> int:
        """Inputs that are sent, and answered wrong without a sign."""
        return sum(row.wrapping - row.refused_wrapping for row in self.rows)

    @property
    def verdict(self) -> str:
        """One sentence: whether what would wrap is refused, and the cure."""
        if not self.silent:
            return "safe: every input that is sent stays within the rings"
        first = next(row for row in self.rows if row.wraps_at)
        cure = "calibrate with more images or a lower degree"
        if not self.guarded:
            cure = "attach an input guard, which refuses such inputs"
        return (
            f"UNSAFE: {self.silent} would be answered wrong without a sign, first "
            f"{first.corruption} at {first.wraps_at}; {cure}"
        )

    def __str__(self) -> str:
        inputs = self._sum("images")
        escaping, wrapping = self._sum("escaping"), self._sum("wrapping")
        furthest = max(self.rows, key=lambda row: row.reach)
        refused = self._sum("refused")
        guard = (
            f"refuses {self._sum('refused_escaping')} of the {escaping} and "
            f"{self._sum('refused_wrapping')} of the {wrapping}, {refused} in all"
            if self.guarded
            else HOW
        )
        return (
            f"stress: {self.images} images in {len(self.rows)} forms, {inputs} inputs: "
            f"{escaping} leave an interval, at most {furthest.reach:.3g} radii "
            f"({furthest.corruption}, {furthest.layer}); {wrapping} wrap in a ring\n"
            f"input guard: {guard}\n"
            f"tails: {self.verdict}"
        )

    def _sum(self, count: str) -> int:
        return sum(getattr(row, count) for row in self.rows)


def tails(private: crypten_nn.Graph, model: MaskedModel, images: Tensor) -> Tails:
    """Corrupt images in every standard way and see what a plan makes of them.

    In float32 and in the clear: what leaves its interval, what its ring would not hold,
    and what the plan's guard and bound refuse of it.

    Args:
        private: the converted network, not encrypted.
        model: its plan.
        images: (n, *input_shape), real ones; the first 16 are taken, fewer of large
            networks.

    Cost: a pass over the images taken for each corruption.
    """
    network = Network(private)
    network.cut()
    x = images[:IMAGES].detach().cpu().float()
    most = _WORK // (len(corruptions(x[:1])) * max(model.plan.work, 1))
    x = x[: max(1, most)]
    rows = [
        _tail(name, given, network, model) for name, given in corruptions(x).items()
    ]
    return Tails(tuple(rows), len(x), model.plan.guard is not None)


def _tail(name: str, x: Tensor, network: Network, model: MaskedModel) -> Tail:
    seen = _Seen(model, len(x))

    def compute(layer: Layer, inputs: list[Tensor]) -> Tensor:
        result = network.compute(layer, inputs)
        if layer.activates:
            seen.activation(layer, inputs[0], result)
        return result

    with torch.no_grad():
        values = network.walk(x, {network.output}, compute)
    seen.output(values[network.output])
    escaping = seen.reach > 1.0
    refused = _refused(model.plan, x)
    wraps = seen.wraps_at >= 0
    silent = seen.wraps_at[wraps & ~refused]
    names = [known.name for known in model.report.parts]
    return Tail(
        name,
        len(x),
        int(escaping.sum()),
        int(wraps.sum()),
        int(refused.sum()),
        int((refused & escaping).sum()),
        int((refused & wraps).sum()),
        float(seen.reach.max()),
        names[int(seen.furthest[seen.reach.argmax()])],
        names[int(silent.min())] if len(silent) else "",
    )


def _refused(plan: Plan, x: Tensor) -> Tensor:
    """(n,) bool: what `Plan.encode` would refuse."""
    beyond = x.flatten(1).abs().amax(1) > plan.input.bound
    return beyond if plan.guard is None else beyond | plan.guard.refused(x)


class _Seen:
    """Of each input, by linear part: how far it goes, and where it wraps first."""

    def __init__(self, model: MaskedModel, inputs: int) -> None:
        self._parts = enumerate(model.plan.parts)
        self.reach = torch.zeros(inputs)
        self.furthest = torch.zeros(inputs, dtype=torch.int64)
        self.wraps_at = torch.full((inputs,), -1)

    def activation(self, layer: Layer, z: Tensor, y: Tensor) -> None:
        """The next part's values z, and its polynomial's, or their product."""
        number, step = next(self._parts)
        assert isinstance(step, Step)
        self._held(number, step, z)
        pool = step.activation.pool
        if pool is not None:
            y = Reals().window_sums(y, pool, pool)
        limit = 2.0 ** (RING_BITS - step.activation.value_frac_bits)
        self._wrap(number, y, limit)
        if layer.name.endswith(RESCALED) or layer.multiplies:
            return  # the identity and a product have no interval
        away = in_radii(z, layer.rows).flatten(1).amax(1)
        away = torch.where(away.isnan(), torch.inf, away)
        self.furthest[away > self.reach] = number
        self.reach = self.reach.maximum(away)

    def output(self, z: Tensor) -> None:
        """The last part's values."""
        number, output = next(self._parts)
        self._held(number, output, z)

    def _held(self, number: int, part: Step | Output, z: Tensor) -> None:
        self._wrap(number, z, 2.0 ** (part.ring - 2 - part.frac_bits))

    def _wrap(self, number: int, values: Tensor, limit: float) -> None:
        # Not >=: so NaN is beyond.
        beyond = ~(values.flatten(1).abs() < limit).all(1)
        self.wraps_at[beyond & (self.wraps_at < 0)] = number
