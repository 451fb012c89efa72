"""One training run: what decides it, what it gives, and the loop."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from crypten_espn.errors import DataError
from crypten_espn.pillar.data import Dataset, Images
from crypten_espn.pillar.networks import Architecture
from crypten_espn.pillar.penalty import range_penalty, warmup_stage
from crypten_espn.pillar.preparation import schedule
from crypten_espn.pillar.recipes import Recipe, accuracy
from crypten_espn.pillar.surgery import PolynomialActivation, replace_activations
from crypten_espn.polynomial import Polynomial

# An interval that nothing leaves: an activation that clips nothing.
UNBOUNDED = (-1e38, 1e38)

# The fields of a Recipe that the training loop below follows.
FOLLOWED = (
    *("network", "dataset", "radius", "gamma", "beta", "stage_epochs", "epochs"),
    *("batch_size", "learning_rate", "warmup_epochs", "momentum", "weight_decay"),
    *("held_out", "crop", "seed"),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        recipe: what to follow; beta zero means no penalty and no warm-up of it.
        polynomial: the activation; None trains with ReLU.
        clip: whether activation inputs are clipped in training.
        images: training images, the first of the data set's.
    """

    recipe: Recipe
    polynomial: Polynomial | None
    clip: bool
    images: int

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the outcome, as plain values."""
        p = self.polynomial
        return {
            **{name: getattr(self.recipe, name) for name in FOLLOWED},
            "numerators": None if p is None else list(p.numerators),
            "frac_bits": None if p is None else p.frac_bits,
            "clip": self.clip,
            "images": self.images,
        }

    @property
    def key(self) -> str:
        """The settings as text: equal keys give equal outcomes."""
        return json.dumps(self.settings, sort_keys=True)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches an epoch."""
        return self.images // self.recipe.batch_size

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.recipe.epochs * self.steps_per_epoch


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run gave.

    Attributes:
        accuracy: on held-out images after the last epoch; None after divergence.
        diverged_at: the first step, from 1, at which the loss or an activation's input
            was not finite; the run ended there.
        largest_input: largest |activation input| on held-out images; None if that is
            not finite, or after divergence.
        outside: share of activation inputs outside the interval on held-out images.
        inputs: largest |activation input| of every step, as long as it was finite.
        seconds: it took.
    """

    accuracy: float | None
    diverged_at: int | None
    largest_input: float | None
    outside: float | None
    inputs: tuple[float, ...]
    seconds: float


class _Inputs:
    """What a network's activations are given, since the last `reset`."""

    def __init__(self, network: nn.Module, radius: float) -> None:
        self.radius = radius
        self.reset()
        for module in network.modules():
            if isinstance(module, (PolynomialActivation, nn.ReLU)):
                module.register_forward_pre_hook(self._see)

    def reset(self) -> None:
        self.largest, self.inside, self.total = 0.0, 0, 0

    def _see(self, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        x = given[0].detach()
        peak = max(abs(float(v)) for v in torch.aminmax(x))
        self.largest = max(self.largest, peak if math.isfinite(peak) else math.inf)
        if not module.training:
            self.inside += int((x.abs() <= self.radius).sum())
            self.total += x.numel()


def train(run: Run, data: Dataset, *, tick: Callable[[int], None]) -> Outcome:
    """Train one network and evaluate it.

    1. Fresh weights from the seed, ReLU replaced by the polynomial.
    2. Momentum, linear warm-up of the learning rate, then half a cosine to zero, as
       the recipes have it; the penalty's warm-up if there is a penalty.
    3. Stop at the first step at which the loss or an activation's input is not finite.
    4. Accuracy and ranges on the held-out images, without clip.

    Args:
        run: what to do.
        data: its data set, held-out images included.
        tick: called with the number of steps done since the last call; the steps that
            a diverged run does not do are counted at its end.
    """
    recipe, began = run.recipe, time.perf_counter()
    torch.manual_seed(recipe.seed)
    network: nn.Module = Architecture(
        recipe.network, data.classes, data.in_channels, data.size
    ).build()
    if run.polynomial is not None:
        applied = run.polynomial
        if not run.clip:
            applied = dataclasses.replace(applied, interval=UNBOUNDED)
        network = replace_activations(network, {nn.ReLU: applied})
    # mypy's view of Module.to lacks the memory format alone.
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    seen = _Inputs(network, recipe.radius)
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )
    rate = schedule(recipe, optimizer, steps_per_epoch=run.steps_per_epoch)
    generator = torch.Generator().manual_seed(recipe.seed)
    part = first_images(data, run.images)
    inputs: list[float] = []
    for _ in range(recipe.epochs):
        for images, labels in part.batches(recipe.batch_size, generator=generator):
            step = len(inputs)
            seen.reset()
            logits = network(images.to(memory_format=torch.channels_last))
            loss = _loss(network, functional.cross_entropy(logits, labels), run, step)
            if math.isfinite(seen.largest):
                inputs.append(float(f"{seen.largest:.4g}"))
            if len(inputs) == step or not bool(torch.isfinite(loss)):
                tick(run.steps - step)
                took = round(time.perf_counter() - began, 1)
                return Outcome(None, step + 1, None, None, tuple(inputs), took)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
            tick(1)
    seen.reset()
    right = accuracy(network, data.validation, batch_size=100)
    return Outcome(
        right,
        None,
        seen.largest if math.isfinite(seen.largest) else None,
        1 - seen.inside / seen.total,
        tuple(inputs),
        round(time.perf_counter() - began, 1),
    )


def _loss(network: nn.Module, entropy: Tensor, run: Run, step: int) -> Tensor:
    recipe = run.recipe
    if not recipe.beta:
        return entropy
    stage = warmup_stage(step / run.steps_per_epoch, stage_epochs=recipe.stage_epochs)
    penalty = range_penalty(network, gamma=recipe.gamma, power=stage.power)
    return stage.loss_weight * entropy + recipe.beta * stage.factor * penalty


def first_images(data: Dataset, count: int) -> Images:
    """The first training images of a data set that is held in memory."""
    whole = data.train
    if not isinstance(whole, Images):
        raise DataError(
            f"{data.name} is read from files; the figures need a data set of small "
            "images: fashion-mnist, cifar10 or cifar100"
        )
    return dataclasses.replace(
        whole, images=whole.images[:count], labels=whole.labels[:count]
    )
