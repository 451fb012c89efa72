"""The training loop that follows a recipe.

All randomness of an epoch derives from the seed and the epoch's number, so a run that
was stopped, even by kill -9, continues from its last completed epoch and ends in the
same state as one that was not. The epoch to keep is chosen on validation images; the
test set is read once, at the end.

Source: Diaa et al., USENIX Security 2024, and its published training settings.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from ..errors import DataError, EspnError
from .data import load_dataset
from .penalty import PenaltyStage, boundary_penalty, range_penalty, warmup_stage
from .phases import clip_in_training
from .recipe import Recipe
from .replay import TailReplay
from .result import Result
from .run import Run
from .surgery import activations


def train(
    recipe: Recipe,
    *,
    out: str | Path,
    data: str | Path = "data",
    start: str | Path | None = None,
    device: str | None = None,
    progress: bool = True,
) -> Result:
    """Follow a recipe to its end, resuming where an earlier run of it stopped.

    Under torchrun each process takes its share of every batch; process 0 writes.

    1. Build the network, or load the one to start from; replace its activations.
    2. For each epoch: train, evaluate on validation images, keep the best, write the
       state, then log.csv.
    3. Load the best epoch, read the test set once, write network.safetensors and
       result.json.

    Args:
        recipe: what to do.
        out: folder of log.csv, state.pt, network.safetensors and result.json.
        data: folder of the data set.
        start: a trained network to fine-tune: a file of `save_network`, or a
            state_dict of the recipe's network, such as torchvision's.
        device: "cpu" or "cuda"; the accelerator if there is one by default.
        progress: whether to draw progress bars.

    Returns:
        The Result.

    Raises:
        DataError: the data are missing or not usable.
        CheckpointError: `out` belongs to a run of another recipe, or `start` is of
            another network.
        TrainingError: the loss or an activation's input left what can be computed; the
            message names the layer, since when, and the cure.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 and not distributed.is_initialized():
        distributed.init_process_group()
    dataset = load_dataset(
        recipe.checked().dataset,
        directory=data,
        held_out=recipe.held_out,
        crop=recipe.crop,
        train_size=recipe.train_size,
    )
    run = Run(recipe, dataset, folder, start, device, progress)
    run.resume()
    while run.epoch < recipe.epochs:
        train_epoch(run)
        run.end_epoch()
    return run.finish()


# Steps between two looks at the activations' inputs.
_LOOK_EVERY = 25


def train_epoch(run: Run) -> None:
    """Train one epoch; leaves its averages in run.rows."""
    recipe, began = run.recipe, time.perf_counter()
    run.model.train()
    totals = torch.zeros(3, dtype=torch.float64)
    largest, seen, rate = 0.0, 0, 0.0
    # Anew each epoch, so that a run that was stopped goes on as it would have.
    replay = TailReplay(4 * recipe.replayed) if recipe.replayed else None
    bar = _bar(run)
    for images, targets in bar:
        # 1. ReLUs whose turn has come give way.
        run.replace_gradually()
        if run.step >= run.clipped_steps:
            clip_in_training(run.model, False)
        rate = float(run.schedule.get_last_lr()[0])
        # The inputs of trained ReLUs are wide: their penalty warms up anew.
        stage = warmup_stage(
            max(run.step / run.steps_per_epoch - recipe.relu_epochs, 0.0),
            stage_epochs=recipe.stage_epochs,
        )
        if replay is not None:
            images, targets = replay.mix(images, targets, recipe.replayed)
        # 2. Forward: logits [n, classes]; the activations record their inputs.
        half = recipe.precision == "bfloat16" and _is_fast(run.device)
        with torch.autocast(run.device.type, torch.bfloat16, enabled=half):
            logits = run.parallel(images).float()
            taught = None if run.teacher is None else run.teacher(images).float()
        entropy = functional.cross_entropy(
            logits, targets, label_smoothing=recipe.label_smoothing
        )
        aim = _aim(recipe, entropy, logits, taught)
        if replay is not None and activations(run.model):
            replay.keep(run.model, images, targets)
        if run.step % _LOOK_EVERY == 0:
            escaped = run.watch.look(run.model, run.step)
            largest = max([largest, *run.watch.largest.values()])
            if escaped and stage.power == 10 and stage.factor == 1:
                what = "left the range of the polynomial"
                raise run.watch.escaped(escaped, what, epoch=run.epoch, step=run.step)
        # 3. Loss: the aim, and the penalty on large inputs.
        penalty = _penalty(run, stage)
        loss = _aim_weight(run, stage) * aim + penalty
        if not bool(torch.isfinite(loss)):
            raise _not_finite(run, images)
        # 4. Backward and step.
        run.optimizer.zero_grad()
        loss.backward()
        if recipe.clip_norm is not None:
            clipped = [p for p in run.model.parameters() if p.dim() > 1]
            nn.utils.clip_grad_norm_(clipped, recipe.clip_norm)
        run.optimizer.step()
        run.schedule.step()
        if run.average is not None:
            run.average.update_parameters(run.model)
        # 5. What the log says.
        right = (logits.argmax(1) == targets.argmax(1)).float().mean()
        figures = torch.stack([aim.detach(), penalty.detach(), right])
        totals += figures.double().cpu()
        seen += 1
        run.step += 1
        if seen % 20 == 0 and hasattr(bar, "set_postfix"):
            mean = (totals / seen).tolist()
            bar.set_postfix(loss=f"{mean[0]:.3f}", accuracy=f"{mean[2]:.3f}")
    means = (totals / max(seen, 1)).tolist()
    run.epoch += 1
    took = time.perf_counter() - began
    run.rows.append(
        {
            "epoch": run.epoch,
            "steps": run.step,
            "learning_rate": rate,
            "loss": means[0],
            "penalty": means[1],
            "train_accuracy": means[2],
            "validation_accuracy": math.nan,
            "largest_input": largest,
            "seconds": took,
        }
    )
    run.seconds += took


def _aim(
    recipe: Recipe, entropy: Tensor, logits: Tensor, taught: Tensor | None
) -> Tensor:
    """What is to be small but for the penalty: cross-entropy, divergence or both."""
    if taught is None:
        return entropy
    divergence = functional.kl_div(
        logits.log_softmax(1),
        taught.log_softmax(1),
        reduction="batchmean",
        log_target=True,
    )
    return entropy.lerp(divergence, recipe.distillation)


def _is_fast(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 faster than in float32.

    Processors without instructions for it go through torch's plain loops: measured on
    one with AVX2 alone, an epoch takes ten times as long.
    """
    return device.type != "cpu" or bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()  # torch has no public name
    )


def _penalty(run: Run, stage: PenaltyStage) -> Tensor:
    recipe = run.recipe
    if recipe.penalty == "boundary":
        penalty = boundary_penalty(run.model)
    else:
        penalty = range_penalty(
            run.model,
            gamma=recipe.gamma,
            power=stage.power,
            reduction=recipe.penalty,
        )
    weighted = recipe.beta * stage.factor * penalty
    # Gradients are averaged over processes; a sum is over all of them.
    return weighted if recipe.penalty == "mean" else weighted * run.processes


def _aim_weight(run: Run, stage: PenaltyStage) -> float:
    # A network that is trained already must not forget; one of ReLUs has no ranges.
    if run.polynomial is None or run.started_from or run.recipe.gradual:
        return 1.0
    return stage.loss_weight


def _not_finite(run: Run, images: Tensor) -> EspnError:
    if not bool(torch.isfinite(images).all()):
        return DataError(
            f"the training images of {run.dataset.name} hold values that are not "
            "finite; check the files and their normalisation"
        )
    return run.watch.diagnosis(run.model, images, epoch=run.epoch, step=run.step)


def _bar(run: Run) -> Iterable[tuple[Tensor, Tensor]]:
    if not run.progress:
        return run.batches()
    from tqdm import tqdm

    shown: Iterable[tuple[Tensor, Tensor]] = tqdm(
        run.batches(),
        total=run.steps_per_epoch,
        desc=f"epoch {run.epoch + 1}/{run.recipe.epochs}",
        leave=False,
        dynamic_ncols=True,
    )
    return shown
