"""Activation inputs watched in training, and the diagnosis when a run cannot go on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import TrainingError
from .recipe import Recipe
from .surgery import activations


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
        limit = self.recipe.escape * self.recipe.radius
        first = None
        for name, module in activations(model).items():
            peak = max((_peak(x) for x in module._recorded.values()), default=0.0)
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
