"""Named recipes: one frozen `Recipe` for each network and data set.

Source: Diaa et al., USENIX Security 2024, and its published training settings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from ..errors import TrainingError
from ..polynomial import Polynomial


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
        calibration_images: training images on which `calibrate` gives each channel of
            the network started from its polynomial; 0 is one polynomial for all.
        margin: of `calibrate`; None is its own for the degree.
        distillation: weight of the divergence from what the network started from
            answers; the cross-entropy has the rest. 1 needs no labels.
        unclipped: share of the steps, the last, without the clip of training.
        replayed: images of a batch whose place is taken by those kept by `TailReplay`.
        epoch_steps: steps that an epoch ends after; None is every training image once.
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
    calibration_images: int = 0
    margin: float | None = None
    distillation: float = 0.0
    unclipped: float = 0.0
    replayed: int = 0
    epoch_steps: int | None = None
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
            "calibration_images": self.calibration_images == 0
            or (
                self.calibration_images >= 2
                and self.activation == "polynomial"
                and not self.gradual
            ),
            "margin": self.margin is None or 1 <= self.margin <= 16,
            "distillation": 0 <= self.distillation <= 1,
            "unclipped": 0 <= self.unclipped <= 1,
            "replayed": 0 <= self.replayed < self.batch_size,
            "epoch_steps": self.epoch_steps is None or self.epoch_steps >= 1,
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


# Training images to calibrate on; and the steps, of so many images, after which degree
# 4 has what it loses back: less than two epochs of Fashion-MNIST.
_CALIBRATED = 1000
_STEPS = 200
_BATCH = 512


def _tuning_batch(recipe: Recipe) -> int:
    """Four of the recipe's, up to a batch from which on more images help no further."""
    return max(recipe.batch_size, min(4 * recipe.batch_size, _BATCH))


def channel_tuning(
    recipe: Recipe,
    *,
    degree: int = 4,
    steps: int | None = None,
    epochs: int | None = None,
) -> Recipe:
    """Return the recipe that calibrates a trained network and trains it on a little.

    Every channel gets its polynomial (`calibrate`), then the network learns to answer
    as it did with its ReLUs: no label is used.

    Args:
        recipe: that of training from scratch.
        degree: of the polynomials.
        steps: 200 by default from degree 4 on.
        epochs: instead of steps; below degree 4 a fifth of the recipe's by default.

    Raises:
        TrainingError: steps and epochs are both given.
    """
    if steps is not None and epochs is not None:
        raise TrainingError(
            f"steps={steps} and epochs={epochs} both say how long; give one of them"
        )
    if steps is None and epochs is None:
        if degree >= 4:
            steps = _STEPS
        else:
            epochs = max(recipe.epochs // 5, 1)
    return replace(
        recipe,
        activation="polynomial",
        degree=degree,
        epochs=epochs or 1,
        epoch_steps=steps,
        # Few steps learn more from many images each, at a higher rate.
        batch_size=recipe.batch_size if degree < 4 else _tuning_batch(recipe),
        learning_rate=0.1 if degree < 4 else 0.2,
        warmup_epochs=(epochs or 1) / 20,
        penalty="boundary",
        beta=1e-4,
        clip_norm=1.0,
        stage_epochs=0.0,
        relu_epochs=0.0,
        replace_epochs=0.0,
        calibration_images=_CALIBRATED,
        # Training brings back what a narrow interval cuts off.
        margin=1.25 if degree < 4 else None,
        distillation=1.0,
    )
