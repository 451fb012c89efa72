"""What a run starts from: network, optimizer, schedule, the blend of its batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from ..errors import CheckpointError
from .networks import Architecture, Network
from .recipe import Recipe
from .storage import describes_itself, load_network, load_weights


def fresh_network(built: Architecture, start: str | Path | None) -> Network:
    """Return a network of that architecture: fresh weights, or those of a file.

    Raises:
        CheckpointError: the file holds another network.
    """
    if start is None:
        return built.build()
    if not describes_itself(start):
        network = built.build()
        load_weights(network, start)
        return network
    network = load_network(start)
    if network.architecture != built:
        raise CheckpointError(
            f"{start} holds {network.architecture}; this run needs {built}"
        )
    return network


def parameter_groups(
    recipe: Recipe, model: nn.Module
) -> list[dict[str, list[nn.Parameter] | float]]:
    """Return the parameters that decay, and apart from them those that do not."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in model.parameters():
        spared = parameter.dim() <= 1 and not recipe.decay_norm
        (kept if spared else decayed).append(parameter)
    groups: list[dict[str, list[nn.Parameter] | float]]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}]
    if kept:
        groups.append({"params": kept, "weight_decay": 0.0})
    return groups


def schedule(
    recipe: Recipe, optimizer: Optimizer, *, steps_per_epoch: int
) -> SequentialLR:
    """Return the schedule of the rate: linear warm-up, then half a cosine to zero.

    Args:
        recipe: its warm-up and epochs.
        optimizer: whose rate is the recipe's peak.
        steps_per_epoch: whole batches an epoch.
    """
    warm = round(recipe.warmup_epochs * steps_per_epoch)
    whole = recipe.epochs * steps_per_epoch
    rising = LinearLR(optimizer, start_factor=1 / (warm + 1), total_iters=max(warm, 1))
    falling = CosineAnnealingLR(optimizer, T_max=max(whole - warm, 1))
    return SequentialLR(optimizer, [rising, falling], milestones=[warm])


def blending(
    recipe: Recipe, classes: int
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return what makes images and labels a batch: as they are, or blended by pairs.

    Targets are float32 (n, classes), rows that sum to 1. Blends follow torch's own
    generator; with mixup and cutmix both, one of them is drawn for each batch.
    """
    # Late: beside a CPU-only torch it loads only once crypten_espn has been imported.
    from torchvision.transforms import v2

    kinds: list[nn.Module] = []
    if recipe.mixup:
        kinds.append(v2.MixUp(alpha=recipe.mixup, num_classes=classes))
    if recipe.cutmix:
        kinds.append(v2.CutMix(alpha=recipe.cutmix, num_classes=classes))
    if kinds:
        blend: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
        blend = v2.RandomChoice(kinds)
        return blend
    return lambda images, labels: (
        images,
        functional.one_hot(labels, classes).float(),
    )
