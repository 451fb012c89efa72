"""Activation inputs watched in training, and the diagnosis when a run cannot go on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import TrainingError
from .activation import PolynomialActivation
from .recipe import Recipe
from .surgery import activations


def largest_inputs(model: nn.Module) -> dict[str, float]:
    """Return how far each activation's inputs reach, for a training loop to watch.

    Args:
        model: a network in training mode, between its forward and backward pass and
            before a penalty was computed, which forgets the inputs.

    Returns:
        By dotted name, in the order of the network, the largest |x| / R of the inputs
        recorded, R the larger end of the interval in magnitude, the channel's own where
        it has one: above 1 some input is outside. Infinite where an input is NaN, 0
        where nothing was recorded.
    """
    return {
        name: max((float(r.max()) for r in reaches), default=0.0)
        for name, reaches in _reaches(model).items()
    }


def image_reach(model: nn.Module) -> Tensor:
    """Return how far the inputs of each image of the last batch reach.

    Args:
        model: as in `largest_inputs`.

    Returns:
        (n,) float32, the largest |x| / R over all activations; as in `largest_inputs`.

    Raises:
        TrainingError: nothing was recorded, or batches of several sizes.
    """
    reaches = [reach for some in _reaches(model).values() for reach in some]
    if len({len(reach) for reach in reaches}) != 1:
        raise TrainingError(
            "the reach of a batch's images is read between its forward and backward "
            "pass, in training mode, before a penalty; the activations hold inputs of "
            f"{len(reaches)} calls and no single number of images"
        )
    return torch.stack(reaches).amax(0)


def _reaches(model: nn.Module) -> dict[str, list[Tensor]]:
    """By activation and call, (n,): the largest |x| / R of each image."""
    return {
        name: [_reach(x.detach(), module) for x in module.recorded()]
        for name, module in activations(model).items()
    }


def _reach(x: Tensor, module: PolynomialActivation) -> Tensor:
    if x.dim() < 2:
        x = x.reshape(len(x), 1)
    # (n, channels) before anything is divided or widened.
    rest = tuple(range(2, x.dim()))
    top = torch.maximum(x.amax(rest), x.amin(rest).neg()) if rest else x.abs()
    radii = torch.from_numpy(module.polynomial.radii).float()
    scaled = top.float() / radii.to(x.device)
    return scaled.amax(1).nan_to_num_(math.inf, math.inf, math.inf)


@dataclass
class Watch:
    """Largest |input| of each activation, as training goes on.

    Attributes:
        recipe: what is followed.
        since: of layers beyond the limit, the first step they were seen there.
        largest: by layer, at the last look.
    """

    recipe: Recipe
    since: dict[str, int] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)

    def look(self, model: nn.Module, step: int) -> str | None:
        """Note the recorded inputs; return the first layer beyond the limit."""
        first = None
        for name, module in activations(model).items():
            limit = self.recipe.escape * max(map(abs, module.polynomial.interval))
            peak = max((_peak(x) for x in module.recorded()), default=0.0)
            self.largest[name] = peak
            if peak <= limit:
                self.since.pop(name, None)
            else:
                self.since.setdefault(name, step)
                first = first or name
        return first

    def escaped(self, layer: str, what: str, *, epoch: int, step: int) -> TrainingError:
        """The error of an activation's input: what it does, since when, the cure."""
        recipe = self.recipe
        return TrainingError(
            f"training of {recipe.name} stopped at epoch {epoch + 1}, step {step}: the "
            f"input of activation {layer} {what} (largest |input| "
            f"{self.largest.get(layer, math.inf):.3g}, first seen at step "
            f"{self.since.get(layer, step)}). Raise beta (now {recipe.beta:g}), lower "
            f"gamma (now {recipe.gamma:g}) or the learning rate (now "
            f"{recipe.learning_rate:g})"
        )

    def diagnosis(
        self, model: nn.Module, images: Tensor, *, epoch: int, step: int
    ) -> TrainingError:
        """The error of a loss that is not finite: the layer where that began."""
        damaged = [
            n for n, p in model.named_parameters() if not torch.isfinite(p).all()
        ]
        model(images)
        names = list(activations(model))
        self.look(model, step)
        infinite = [name for name in names if math.isinf(self.largest[name])]
        if infinite:
            what = "is no longer finite"
            return self.escaped(infinite[0], what, epoch=epoch, step=step)
        if names:
            worst = max(names, key=self.largest.__getitem__)
            what = "is the largest while the loss is not finite"
            return self.escaped(worst, what, epoch=epoch, step=step)
        recipe = self.recipe
        too = f", nor is parameter {damaged[0]}" if damaged else ""
        return TrainingError(
            f"training of {recipe.name} stopped at epoch {epoch + 1}, step {step}: the "
            f"loss is not finite{too}. Lower the learning rate (now "
            f"{recipe.learning_rate:g})"
        )


def _peak(x: Tensor) -> float:
    """Return the largest |x|, infinity if any is not a number."""
    low, high = (float(v) for v in torch.aminmax(x.detach()))
    largest = max(abs(low), abs(high))
    return largest if math.isfinite(largest) else math.inf
