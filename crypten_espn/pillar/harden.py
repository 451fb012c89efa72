"""A polynomial network taught to keep corrupted images inside its intervals."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import RangeError, TrainingError
from ..inputs import real_tensor
from .data import Normalization
from .guard_bounds import normalization_of
from .keeping import as_taken
from .penalty import boundary_penalty
from .settle import SAMPLE, settle_intervals
from .stress import Levels, drawn
from .surgery import activations

_MOMENTUM = 0.9
_WARM = 10  # steps over which the rate rises


def harden(  # noqa: PLR0913 - how it is trained, each with a default
    network: nn.Module,
    images: object,
    *,
    normalization: Normalization | None = None,
    steps: int = 140,
    batch_size: int = 96,
    learning_rate: float = 0.005,
    beta: float = 0.005,
    seed: int = 0,
) -> nn.Module:
    """Return the network trained so that corrupted images stay inside its intervals.

    A network of many layers answers clean images well and may still have inputs on
    which one layer leaves its interval, the next further, until nothing is finite. Such
    inputs are rare among clean images and are found among corrupted ones:

    1. Each step sees a batch of the images and half as many corrupted in ways and at
       strengths drawn anew (`stress.drawn`). Batch-norm keeps its statistics.
    2. The loss is the divergence of the answers to the clean ones from what the network
       answered before, and beta times the penalty at the intervals' ends, of all.
    3. Intervals are settled and the guard is fitted (`settle_intervals`).

    Labels are not needed. Cost: half as much again as training on so many batches.

    Args:
        network: with `PolynomialActivation`s; it is not changed.
        images: (n, channels, ...) of the training set, as the network takes them.
        normalization: of the images; the network's attribute of that name if None. Its
            [0, 1] are the levels within which images are corrupted; without it those
            of the images.
        steps, batch_size, learning_rate, beta: of the training. A step whose gradient
            is not finite is left out.
        seed: of the batches and corruptions.

    Returns:
        A copy in evaluation mode, carrying its guard.

    Raises:
        RangeError: no polynomial activation, numbers out of range, images that hold NaN
            or infinity; or as `settle_intervals`.
        DataError: as `settle_intervals`.
        TrainingError: no step had a finite gradient.
    """
    x = real_tensor(images, "the images", finite=True).float().cpu()
    if not activations(network):
        raise RangeError(
            "the network has no polynomial activation to harden; espn.calibrate or "
            "replace_activations makes them"
        )
    if steps < 1 or not 2 <= batch_size <= len(x) or not 0 < learning_rate < 1:
        raise RangeError(
            f"steps={steps}, batch_size={batch_size}, learning_rate={learning_rate:g} "
            f"with {len(x)} images; at least one step, batches of 2 images to all of "
            "them and a rate between 0 and 1 are needed"
        )
    normalization = normalization or normalization_of(network)
    levels = _levels(x, normalization)
    hardened = copy.deepcopy(network).train()
    for module in hardened.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    teacher = copy.deepcopy(network).eval().requires_grad_(False)
    parameters = list(hardened.parameters())
    optimizer = torch.optim.SGD(parameters, lr=learning_rate, momentum=_MOMENTUM)
    generator = torch.Generator().manual_seed(seed)
    taken = 0
    for step in range(steps):
        chosen = x[torch.randint(len(x), (batch_size,), generator=generator)]
        beside = drawn(chosen[: -(-batch_size // 2)], levels, generator)
        clean = as_taken(network, chosen)
        answers = hardened(torch.cat([clean, as_taken(network, beside)]))
        with torch.no_grad():
            wanted = teacher(clean)
        loss = functional.kl_div(
            answers[:batch_size].log_softmax(1),
            wanted.log_softmax(1),
            reduction="batchmean",
            log_target=True,
        )
        loss = loss + beta * boundary_penalty(hardened)
        optimizer.zero_grad()
        loss.backward()
        length = nn.utils.clip_grad_norm_(parameters, 1.0)
        if not bool(torch.isfinite(length)):
            continue
        for group in optimizer.param_groups:
            rising, falling = min(1.0, (step + 1) / _WARM), 1 - step / steps
            group["lr"] = learning_rate * rising * falling
        optimizer.step()
        taken += 1
    if not taken:
        raise TrainingError(
            f"none of {steps} steps had a finite gradient; train the network again "
            "with a larger beta, or calibrate the one that it was made from"
        )
    return settle_intervals(hardened, x[:SAMPLE], normalization=normalization)


def _levels(images: Tensor, normalization: Normalization | None) -> Levels:
    if normalization is None:
        return Levels.of(images)
    ends = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    ends = ends.expand(2, images.shape[1], 1, 1)
    return Levels(*normalization(ends).split(1))
