"""Named recipes, and the training loop that follows them.

`RECIPES` holds one frozen `Recipe` for each network and data set; `train` follows one.
All randomness of an epoch derives from the seed and the epoch's number, so a run that
was stopped, even by kill -9, continues from its last completed epoch and ends in the
same state as one that was not. The epoch to keep is chosen on validation images; the
test set is read once, at the end.

Source: Diaa et al., USENIX Security 2024, and its published training settings.
"""

from __future__ import annotations

import csv
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..errors import CheckpointError, DataError, TrainingError
from ..polynomial import Polynomial
from .data import Dataset, Split, load_dataset
from .networks import Architecture, Network
from .penalty import PenaltyStage, boundary_penalty, range_penalty, warmup_stage
from .storage import describes_itself, load_network, load_weights, save_network
from .surgery import (
    activations,
    replace_activations,
)

SELECTION_RULE = (
    "the epoch of highest accuracy on validation images held out of the training set; "
    "the test set was read once, after that choice"
)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides how a network is trained.

    Attributes:
        name: how `crypten-espn train --recipe` calls it.
        network: a name of `networks.NETWORKS`.
        dataset: a name of `data.DATASETS`.
        activation: "polynomial" or "relu".
        degree: of the polynomial fitted to ReLU.
        frac_bits: fractional bits of its coefficients.
        radius: the interval is [-radius, radius].
        spread: of the inputs that the fit expects; 0 weighs the interval evenly.
        penalty: "sum" (the paper's), "mean" (per element) or "boundary".
        gamma: where the power penalty of one input reaches 1.
        beta: weight of the penalty.
        stage_epochs: length of each stage of the penalty's warm-up.
        epochs: passes over the training images.
        batch_size: images a step, over all processes.
        learning_rate: its peak.
        warmup_epochs: linear warm-up; a cosine to zero follows.
        momentum: of stochastic gradient descent.
        weight_decay: of every parameter, or of all but batch-norm's and biases.
        decay_norm: whether batch-norm's parameters and biases decay.
        clip_norm: largest gradient norm of the parameters that are not batch-norm's;
            None does not clip.
        label_smoothing: of the cross-entropy.
        mixup: the Beta distribution's parameter; 0 is off.
        cutmix: likewise; with both, one of them is drawn for each batch.
        average: decay of the exponential moving average of the weights; 0 is off.
        precision: "float32" or "bfloat16" for the forward pass in training.
        escape: largest |input| of an activation, in units of the radius, at which
            training stops; checked after the penalty's warm-up.
        relu_epochs: epochs with ReLU in place, before the first gives way.
        replace_epochs: ReLUs give way one by one over so many epochs; all of them at
            once, before the first step, if both are 0.
        held_out: validation images; None is the data set's own number.
        crop: padding from which training crops are taken; None is the data set's own.
        train_size: height and width of ImageNet's training crops.
        seed: of weights and data order.
    """

    name: str
    network: str
    dataset: str
    activation: str = "polynomial"
    degree: int = 4
    frac_bits: int = 10
    radius: float = 5.0
    spread: float = 0.0
    penalty: str = "sum"
    gamma: float = 4.8
    beta: float = 5e-5
    stage_epochs: float = 1.0
    epochs: int = 185
    batch_size: int = 128
    learning_rate: float = 0.013
    warmup_epochs: float = 5.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    decay_norm: bool = True
    clip_norm: float | None = None
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    average: float = 0.0
    precision: str = "float32"
    escape: float = 1e4
    relu_epochs: float = 0.0
    replace_epochs: float = 0.0
    held_out: int | None = None
    crop: int | None = None
    train_size: int | None = None
    seed: int = 1

    def polynomial(self) -> Polynomial:
        """Return the quantised fit of ReLU that this recipe trains with."""
        return Polynomial.fit(
            torch.relu,
            degree=self.degree,
            interval=(-self.radius, self.radius),
            frac_bits=self.frac_bits,
            spread=self.spread or None,
        )

    @property
    def gradual(self) -> bool:
        """Whether training starts with ReLUs."""
        return self.relu_epochs > 0 or self.replace_epochs > 0

    def checked(self) -> Recipe:
        """Return the recipe itself.

        Raises:
            TrainingError: a field is out of its range; all such fields are named.
        """
        allowed = {
            "activation": self.activation in ("polynomial", "relu"),
            "penalty": self.penalty in ("sum", "mean", "boundary"),
            "precision": self.precision in ("float32", "bfloat16"),
            "epochs": self.epochs >= 1,
            "batch_size": self.batch_size >= 2,
            "learning_rate": 0 < self.learning_rate < math.inf,
            "beta": 0 <= self.beta < math.inf,
            "gamma": 0 < self.gamma < math.inf,
            "radius": 0 < self.radius < math.inf,
            "spread": 0 <= self.spread < math.inf,
            "average": 0 <= self.average < 1,
            "relu_epochs": self.relu_epochs >= 0,
            "replace_epochs": self.replace_epochs >= 0
            and self.relu_epochs + self.replace_epochs <= self.epochs
            and not (self.gradual and self.average),
        }
        bad = [
            f"{name}={getattr(self, name)!r}" for name in allowed if not allowed[name]
        ]
        if bad:
            raise TrainingError(
                f"recipe {self.name} cannot be followed with {', '.join(bad)}; see the "
                "attributes of Recipe for what each may be"
            )
        return self


def _named(*recipes: Recipe) -> dict[str, Recipe]:
    return {recipe.name: recipe for recipe in recipes}


# The paper's settings, one recipe for each network and data set.
RECIPES: dict[str, Recipe] = _named(
    Recipe("cifar10-resnet18", "resnet18", "cifar10"),
    Recipe("cifar10-resnet110", "resnet110", "cifar10"),
    Recipe("cifar100-resnet18", "resnet18", "cifar100", degree=6),
    Recipe(
        "cifar10-minionn",
        "mini_onn",
        "cifar10",
        degree=6,
        gamma=4.4,
        epochs=180,
        learning_rate=0.06,
    ),
    Recipe(
        "cifar10-vgg16",
        "vgg16",
        "cifar10",
        beta=1e-6,
        epochs=300,
        learning_rate=0.0025,
    ),
    Recipe(
        "cifar100-vgg16",
        "vgg16",
        "cifar100",
        beta=1e-6,
        epochs=300,
        learning_rate=0.0025,
    ),
    Recipe(
        "cifar100-resnet32",
        "resnet32",
        "cifar100",
        degree=5,
        gamma=4.0,
        beta=1e-2,
        epochs=150,
        learning_rate=0.1,
        weight_decay=1e-4,
    ),
    Recipe(
        "imagenet-resnet50",
        "resnet50",
        "imagenet",
        beta=1e-4,
        epochs=600,
        batch_size=1024,
        learning_rate=0.03,
        weight_decay=2e-5,
        decay_norm=False,
        label_smoothing=0.1,
        mixup=0.2,
        cutmix=1.0,
        average=0.9999,
        train_size=176,
    ),
    # Ours, sized for one processor core.
    Recipe(
        "fashion-resnet",
        "fashion_resnet",
        "fashion-mnist",
        beta=5e-4,
        stage_epochs=0.1,
        crop=0,
        epochs=20,
        learning_rate=0.15,
        warmup_epochs=0.5,
        precision="bfloat16",
    ),
    # On a narrow interval degree 6 survives 12 bits; batch-norm learns the scale. It
    # grows fast outside: one input at twice the radius ruins an image thirty layers on,
    # so the boundary is held firmly.
    Recipe(
        "fashion-minionn",
        "mini_onn",
        "fashion-mnist",
        degree=6,
        frac_bits=12,
        radius=3.0,
        spread=0.6,
        penalty="boundary",
        beta=1e-3,
        stage_epochs=0.05,
        crop=0,
        epochs=6,
        learning_rate=0.1,
        warmup_epochs=0.5,
        clip_norm=1.0,
        precision="bfloat16",
        relu_epochs=2.0,
    ),
    Recipe(
        "fashion-resnet32",
        "resnet32",
        "fashion-mnist",
        degree=6,
        frac_bits=12,
        radius=3.0,
        penalty="boundary",
        beta=2e-3,
        stage_epochs=0.05,
        crop=0,
        epochs=9,
        learning_rate=0.1,
        warmup_epochs=0.5,
        clip_norm=1.0,
        precision="bfloat16",
    ),
    Recipe(
        "fashion-convnet",
        "convnet",
        "fashion-mnist",
        stage_epochs=0.25,
        epochs=5,
        learning_rate=0.013,
        warmup_epochs=0.5,
    ),
)


def find_recipe(name: str) -> Recipe:
    """Return the recipe of this name.

    Raises:
        TrainingError: there is none; the message lists them all.
    """
    if name not in RECIPES:
        raise TrainingError(f"unknown recipe {name!r}; known are {', '.join(RECIPES)}")
    return RECIPES[name]


def learning_rate(recipe: Recipe, step: int, *, steps_per_epoch: int) -> float:
    """Return the rate of a step: linear over the warm-up, then half a cosine to zero.

    Args:
        recipe: its peak, warm-up and epochs.
        step: from 0.
        steps_per_epoch: whole batches an epoch.
    """
    warm = recipe.warmup_epochs * steps_per_epoch
    whole = recipe.epochs * steps_per_epoch
    if step < warm:
        return recipe.learning_rate * (step + 1) / (warm + 1)
    share = (step - warm) / max(whole - warm, 1)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def fine_tuning(
    recipe: Recipe, *, epochs: int | None = None, replace_epochs: float | None = None
) -> Recipe:
    """Return the recipe that makes a trained network of ReLUs polynomial.

    It keeps what was learnt: fewer epochs, a lower rate, ReLUs giving way one by one.
    Inputs of a trained ReLU may be far outside the interval, where the gradient of a
    tenth power is overwhelming; the boundary penalty's grows linearly.

    Args:
        recipe: that of training from scratch.
        epochs: a fifth of the recipe's by default.
        replace_epochs: a quarter of the epochs by default.
    """
    epochs = max(recipe.epochs // 5, 1) if epochs is None else epochs
    return replace(
        recipe,
        activation="polynomial",
        epochs=epochs,
        learning_rate=recipe.learning_rate * 0.4,
        warmup_epochs=min(recipe.warmup_epochs, epochs / 10),
        penalty="boundary",
        beta=1e-4,
        clip_norm=1.0,
        stage_epochs=min(recipe.stage_epochs, epochs / 16),
        relu_epochs=0.0,
        replace_epochs=epochs / 4 if replace_epochs is None else replace_epochs,
    )


@dataclass(frozen=True)
class Result:
    """What a run gave; written as result.json."""

    recipe: Recipe
    epoch: int
    validation_accuracy: float
    test_accuracy: float
    selection_rule: str
    steps: int
    seconds: float
    path: str

    def __str__(self) -> str:
        return (
            f"{self.recipe.name} ({self.recipe.activation}): test accuracy "
            f"{self.test_accuracy:.2%}, validation accuracy "
            f"{self.validation_accuracy:.2%} at epoch {self.epoch} of "
            f"{self.recipe.epochs}\nselection: {self.selection_rule}\n"
            f"network: {self.path}"
        )


def accuracy(model: nn.Module, split: Split, *, batch_size: int = 500) -> float:
    """Return the share of images whose largest logit is the label's, in float32.

    Raises:
        DataError: the split is empty.
    """
    if not len(split):
        raise DataError("accuracy was asked of an empty split")
    device = _device_of(model)
    mode = model.training
    model.eval()
    right = 0
    with torch.no_grad():
        for images, labels in split.batches(batch_size):
            logits = model(images.to(device))
            right += int((logits.argmax(1).cpu() == labels).sum())
    model.train(mode)
    return right / len(split)


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
    run = _Run(recipe, dataset, folder, start, device, progress)
    run.resume()
    while run.epoch < recipe.epochs:
        run.train_epoch()
        run.end_epoch()
    return run.finish()


@dataclass
class _Watch:
    """Largest |input| of each activation, as training goes on."""

    limit: float
    since: dict[str, int] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)

    def look(self, model: nn.Module, step: int) -> str | None:
        """Note the recorded inputs; return the first layer beyond the limit."""
        first = None
        for name, module in activations(model).items():
            peak = max((_peak(x) for x in module._recorded.values()), default=0.0)
            self.largest[name] = peak
            if peak <= self.limit:
                self.since.pop(name, None)
            else:
                self.since.setdefault(name, step)
                first = first or name
        return first


def _peak(x: Tensor) -> float:
    """Return the largest |x|, infinity if any is not a number."""
    low, high = (float(v) for v in torch.aminmax(x.detach()))
    largest = max(abs(low), abs(high))
    return largest if math.isfinite(largest) else math.inf


# Steps between two looks at the activations' inputs.
_LOOK_EVERY = 25

_COLUMNS = (
    "epoch",
    "steps",
    "learning_rate",
    "loss",
    "penalty",
    "train_accuracy",
    "validation_accuracy",
    "largest_input",
    "seconds",
)


class _Run:
    """The state of one training run."""

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        folder: Path,
        start: str | Path | None,
        device: str | None,
        progress: bool,
    ) -> None:
        self.recipe, self.dataset, self.folder = recipe, dataset, folder
        self.rank, self.processes = 0, 1
        if distributed.is_initialized():
            self.rank = distributed.get_rank()
            self.processes = distributed.get_world_size()
        self.progress = progress and self.rank == 0
        self.device = torch.device(
            device or ("cuda" if torch.cuda.is_available() else "cpu")
        )
        if self.device.type == "cuda" and self.processes > 1:
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        self.started_from = None if start is None else str(start)
        self.polynomial = (
            recipe.polynomial() if recipe.activation == "polynomial" else None
        )
        torch.manual_seed(recipe.seed)
        self.model = self._fresh_model(start)
        self.relus = [
            name for name, m in self.model.named_modules() if type(m) is nn.ReLU
        ]
        if self.polynomial is not None and not recipe.gradual:
            replace_activations(self.model, {nn.ReLU: self.polynomial})
        self.model.to(self.device)
        # mypy's view of Module.to lacks the memory format alone.
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.parallel: nn.Module = self.model
        if self.processes > 1:
            self.parallel = DistributedDataParallel(self.model)
        self.optimizer = torch.optim.SGD(
            self._parameter_groups(),
            lr=recipe.learning_rate,
            momentum=recipe.momentum,
        )
        self.average: AveragedModel | None = None
        if recipe.average:
            self.average = AveragedModel(
                self.model,
                multi_avg_fn=get_ema_multi_avg_fn(recipe.average),
                use_buffers=True,
            )
        self.watch = _Watch(recipe.escape * recipe.radius)
        self.epoch = 0
        self.step = 0
        self.seconds = 0.0
        self.rows: list[dict[str, float]] = []
        self.best: dict[str, Tensor] = {}
        self.best_epoch = 0
        self.best_accuracy = -1.0

    @property
    def steps_per_epoch(self) -> int:
        return max(len(self.dataset.train) // self.recipe.batch_size, 1)

    def _fresh_model(self, start: str | Path | None) -> Network:
        built = Architecture(
            self.recipe.network,
            self.dataset.classes,
            self.dataset.in_channels,
            self.dataset.size,
        )
        if start is None:
            return built.build()
        if not describes_itself(start):
            network = built.build()
            load_weights(network, start)
            return network
        network = load_network(start)
        if network.architecture != built:
            raise CheckpointError(
                f"{start} holds {network.architecture}; recipe {self.recipe.name} on "
                f"{self.dataset.name} needs {built}"
            )
        return network

    def _parameter_groups(self) -> list[dict[str, Any]]:
        decayed: list[nn.Parameter] = []
        kept: list[nn.Parameter] = []
        for parameter in self.model.parameters():
            spared = parameter.dim() <= 1 and not self.recipe.decay_norm
            (kept if spared else decayed).append(parameter)
        groups = [{"params": decayed, "weight_decay": self.recipe.weight_decay}]
        if kept:
            groups.append({"params": kept, "weight_decay": 0.0})
        return groups

    def _replace_gradually(self) -> None:
        """Make polynomial the ReLUs whose turn has come, first to last."""
        recipe = self.recipe
        if self.polynomial is None or not recipe.gradual:
            return
        since = self.step + 1 - recipe.relu_epochs * self.steps_per_epoch
        share = since / max(recipe.replace_epochs * self.steps_per_epoch, 1)
        due = self.relus[: math.ceil(min(max(share, 0.0), 1.0) * len(self.relus))]
        left = {n for n, m in self.model.named_modules() if type(m) is nn.ReLU}
        now = left.intersection(due)
        if now:
            replace_activations(
                self.model, {nn.ReLU: self.polynomial}, select=now.__contains__
            )

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(
            random.Random(f"{self.recipe.seed} {self.epoch}").getrandbits(62)
        )
        torch.manual_seed(self.recipe.seed + self.epoch)
        for images, labels in self.dataset.train.batches(
            self.recipe.batch_size,
            generator=generator,
            part=(self.rank, self.processes),
        ):
            targets = functional.one_hot(labels, self.dataset.classes).float()
            images, targets = _mixed(images, targets, self.recipe, generator)
            yield (
                images.to(self.device, memory_format=torch.channels_last),
                targets.to(self.device),
            )

    def train_epoch(self) -> None:
        """Train one epoch; leaves its averages in self.rows."""
        recipe, began = self.recipe, time.perf_counter()
        self.model.train()
        totals = torch.zeros(3, dtype=torch.float64)
        largest, seen, rate = 0.0, 0, 0.0
        bar = _bar(
            self._batches(),
            self.steps_per_epoch,
            f"epoch {self.epoch + 1}/{recipe.epochs}",
            self.progress,
        )
        for images, targets in bar:
            self._replace_gradually()
            rate = learning_rate(
                recipe, self.step, steps_per_epoch=self.steps_per_epoch
            )
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            # The inputs of trained ReLUs are wide: their penalty warms up anew.
            stage = warmup_stage(
                max(self.step / self.steps_per_epoch - recipe.relu_epochs, 0.0),
                stage_epochs=recipe.stage_epochs,
            )
            with torch.autocast(
                self.device.type,
                torch.bfloat16,
                enabled=recipe.precision == "bfloat16",
            ):
                logits = self.parallel(images).float()
            loss = functional.cross_entropy(
                logits, targets, label_smoothing=recipe.label_smoothing
            )
            if self.step % _LOOK_EVERY == 0:
                escaped = self.watch.look(self.model, self.step)
                largest = max([largest, *self.watch.largest.values()])
                if escaped and stage.power == 10 and stage.factor == 1:
                    self._stop(escaped, "left the range of the polynomial")
            if recipe.penalty == "boundary":
                penalty = boundary_penalty(self.model)
            else:
                penalty = range_penalty(
                    self.model,
                    gamma=recipe.gamma,
                    power=stage.power,
                    reduction=recipe.penalty,
                )
            weighted = recipe.beta * stage.factor * penalty
            if recipe.penalty != "mean":
                # Gradients are averaged over processes; a sum is over all of them.
                weighted = weighted * self.processes
            whole = self._loss_weight(stage) * loss + weighted
            if not bool(torch.isfinite(whole)):
                self._diagnose(images)
            self.optimizer.zero_grad()
            whole.backward()
            if recipe.clip_norm is not None:
                nn.utils.clip_grad_norm_(
                    [p for p in self.model.parameters() if p.dim() > 1],
                    recipe.clip_norm,
                )
            self.optimizer.step()
            if self.average is not None:
                self.average.update_parameters(self.model)
            right = (logits.argmax(1) == targets.argmax(1)).float().mean()
            totals += (
                torch.stack([loss.detach(), weighted.detach(), right]).double().cpu()
            )
            seen += 1
            self.step += 1
            if seen % 20 == 0 and hasattr(bar, "set_postfix"):
                mean = (totals / seen).tolist()
                bar.set_postfix(loss=f"{mean[0]:.3f}", accuracy=f"{mean[2]:.3f}")
        means = (totals / max(seen, 1)).tolist()
        self.epoch += 1
        took = time.perf_counter() - began
        self.rows.append(
            {
                "epoch": self.epoch,
                "steps": self.step,
                "learning_rate": rate,
                "loss": means[0],
                "penalty": means[1],
                "train_accuracy": means[2],
                "validation_accuracy": math.nan,
                "largest_input": largest,
                "seconds": took,
            }
        )
        self.seconds += took

    def _loss_weight(self, stage: PenaltyStage) -> float:
        # A network that is trained already must not forget; one of ReLUs has no ranges.
        if self.polynomial is None or self.started_from or self.recipe.gradual:
            return 1.0
        return stage.loss_weight

    def _stop(self, layer: str, what: str) -> None:
        since = self.watch.since.get(layer, self.step)
        raise TrainingError(
            f"training of {self.recipe.name} stopped at epoch {self.epoch + 1}, step "
            f"{self.step}: the input of activation {layer} {what} (largest |input| "
            f"{self.watch.largest.get(layer, math.inf):.3g}, first seen at step "
            f"{since}). Raise beta (now {self.recipe.beta:g}), lower gamma (now "
            f"{self.recipe.gamma:g}) or the learning rate (now "
            f"{self.recipe.learning_rate:g})"
        )

    def _diagnose(self, images: Tensor) -> None:
        """Raise TrainingError naming the layer at which values stopped being finite."""
        if not bool(torch.isfinite(images).all()):
            raise DataError(
                f"the training images of {self.dataset.name} hold values that are not "
                "finite; check the files and their normalisation"
            )
        bad = next(
            (
                n
                for n, p in self.model.named_parameters()
                if not torch.isfinite(p).all()
            ),
            None,
        )
        self.model(images)
        names = list(activations(self.model))
        self.watch.look(self.model, self.step)
        escaped = [n for n in names if math.isinf(self.watch.largest[n])]
        if escaped:
            self._stop(escaped[0], "is no longer finite")
        if names:
            worst = max(names, key=self.watch.largest.__getitem__)
            self._stop(worst, "is the largest while the loss is not finite")
        raise TrainingError(
            f"training of {self.recipe.name} stopped at epoch {self.epoch + 1}, step "
            f"{self.step}: the loss is not finite"
            f"{f', nor is parameter {bad}' if bad else ''}. Lower the learning rate "
            f"(now {self.recipe.learning_rate:g})"
        )

    def end_epoch(self) -> None:
        """Evaluate on validation images, keep the best, write state and log."""
        model = self.model if self.average is None else self.average.module
        measured = self._on_first(lambda: accuracy(model, self.dataset.validation))
        self.rows[-1]["validation_accuracy"] = measured
        complete = self.recipe.activation == "relu" or not any(
            type(m) is nn.ReLU for m in model.modules()
        )
        if complete and measured >= self.best_accuracy:
            self.best_accuracy, self.best_epoch = measured, self.epoch
            self.best = {k: v.detach().clone() for k, v in model.state_dict().items()}
        if self.rank == 0:
            self._write_state()
            self._write_log()
        if self.progress:
            row = self.rows[-1]
            print(
                f"epoch {self.epoch}/{self.recipe.epochs}: loss {row['loss']:.4f}, "
                f"penalty {row['penalty']:.4f}, validation accuracy {measured:.2%}, "
                f"largest input {row['largest_input']:.1f}, {row['seconds']:.0f} s",
                flush=True,
            )

    def _on_first(self, measure: Callable[[], float]) -> float:
        """Return what process 0 measures, to all of them."""
        value = torch.zeros(1, dtype=torch.float64, device=self.device)
        if self.rank == 0:
            value += measure()
        if self.processes > 1:
            distributed.broadcast(value, 0)
        return float(value)

    def _identity(self) -> str:
        return json.dumps(
            {"recipe": asdict(self.recipe), "start": self.started_from}, sort_keys=True
        )

    def _write_state(self) -> None:
        state = {
            "identity": self._identity(),
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "best_accuracy": self.best_accuracy,
            "rows": self.rows,
            "since": self.watch.since,
        }
        temporary = self.folder / "state.pt.part"
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.folder / "state.pt")

    def _write_log(self) -> None:
        temporary = self.folder / "log.csv.part"
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, _COLUMNS)
            writer.writeheader()
            for row in self.rows:
                writer.writerow(
                    {k: v if isinstance(v, int) else f"{v:.6g}" for k, v in row.items()}
                )
        os.replace(temporary, self.folder / "log.csv")

    def resume(self) -> None:
        """Continue from state.pt, if there is one.

        Raises:
            CheckpointError: it is damaged, or of another recipe.
        """
        path = self.folder / "state.pt"
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            identity = state["identity"]
        except Exception as error:  # torch.load raises many kinds
            raise CheckpointError(
                f"{path} cannot be read ({error}); remove it to start again"
            ) from error
        if identity != self._identity():
            raise CheckpointError(
                f"{path} is of another run: {identity}; use another folder as --out, "
                "or remove the file to start again"
            )
        self.epoch, self.step = state["epoch"], state["step"]
        self.seconds, self.rows = state["seconds"], state["rows"]
        if self.step:
            # The state was written after a step: as many ReLUs are gone as then.
            self.step -= 1
            self._replace_gradually()
            self.step += 1
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.best, self.best_epoch = state["best"], state["best_epoch"]
        self.best_accuracy = state["best_accuracy"]
        self.watch.since = state["since"]
        if self.progress:
            print(f"resumed after epoch {self.epoch} of {self.recipe.epochs}")

    def finish(self) -> Result:
        """Load the best epoch, read the test set once, write network and result."""
        if not self.best:
            raise TrainingError(
                f"{self.recipe.name} ended before its last ReLU was replaced; "
                "train for more epochs than relu_epochs and replace_epochs together"
            )
        self.model.load_state_dict(self.best)
        self.model.eval()
        path = self.folder / "network.safetensors"
        result = Result(
            recipe=self.recipe,
            epoch=self.best_epoch,
            validation_accuracy=self.best_accuracy,
            test_accuracy=self._on_first(
                lambda: accuracy(self.model, self.dataset.test())
            ),
            selection_rule=SELECTION_RULE,
            steps=self.step,
            seconds=round(self.seconds, 1),
            path=str(path),
        )
        if self.rank > 0:
            return result
        notes = {k: v for k, v in asdict(result).items() if k != "path"}
        save_network(
            self.model, path, normalization=self.dataset.normalization, notes=notes
        )
        (self.folder / "result.json").write_text(
            json.dumps(asdict(result), indent=2) + "\n"
        )
        return result


def _mixed(
    images: Tensor, targets: Tensor, recipe: Recipe, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return the batch blended with itself reversed, by mixup or cutmix."""
    kinds = [k for k in ("mixup", "cutmix") if getattr(recipe, k) > 0]
    if not kinds:
        return images, targets
    draw = random.Random(int(torch.randint(2**62, (), generator=generator)))
    kind = draw.choice(kinds)
    alpha = getattr(recipe, kind)
    share = draw.betavariate(alpha, alpha)
    other, other_targets = images.flip(0), targets.flip(0)
    if kind == "mixup":
        images = share * images + (1 - share) * other
    else:
        height, width = images.shape[2:]
        side = math.sqrt(1 - share) / 2
        row, column = draw.randrange(height), draw.randrange(width)
        top, bottom = (
            min(max(int(row + sign * side * height / 2), 0), height) for sign in (-1, 1)
        )
        left, right = (
            min(max(int(column + sign * side * width / 2), 0), width)
            for sign in (-1, 1)
        )
        images = images.clone()
        images[:, :, top:bottom, left:right] = other[:, :, top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)
    return images, share * targets + (1 - share) * other_targets


def _bar(batches: Any, total: int, title: str, shown: bool) -> Any:
    if not shown:
        return batches
    from tqdm import tqdm

    return tqdm(batches, total=total, desc=title, leave=False, dynamic_ncols=True)


def _device_of(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
