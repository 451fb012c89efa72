"""`crypten-espn train` and `crypten-espn finetune`: options in, a result printed."""

import shlex
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..errors import EspnError
from ..pillar.data import load_dataset
from ..pillar.ranges import range_report
from ..pillar.recipe import RECIPES, Recipe, channel_tuning, find_recipe, fine_tuning
from ..pillar.storage import load_network, network_file
from .options import choice, not_negative, option, positive, whole

_OUT = "of log, state and network (default: out/RECIPE-KIND); a run found is resumed"
_START = (
    "network with ReLU, as `crypten-espn train --activation relu` writes, or "
    "fashion-resnet-relu, which is bundled"
)
_PENALTY = "of inputs outside the interval; sum is the paper's"
_REPLACE = "epochs over which ReLUs give way (default: a quarter of --epochs)"
_CALIBRATED = "a fitted polynomial for each channel first, then ReLU's answers learnt"
_STEPS = "of --calibrated, instead of --epochs (default: 200 from degree 4 on)"
_MARGIN = "of --calibrated: interval over what a channel saw, 1 to 16"

RecipeName = Annotated[str, option(f"one of {', '.join(RECIPES)}", "NAME")]
Data = Annotated[Path, option("folder of the data set", "DIR")]
Out = Annotated[Path | None, option(f"folder {_OUT}", "DIR")]
Device = Annotated[str | None, option("cpu or cuda; cuda if there is one", "NAME")]
Threads = Annotated[int | None, whole("processor threads of torch")]
Quiet = Annotated[bool, option("no progress bars", None, "--quiet")]

# Fields of a recipe.
Activation = Annotated[str | None, choice("of all layers", "polynomial", "relu")]
Degree = Annotated[int | None, whole("degree of the polynomial")]
FracBits = Annotated[int | None, whole("fractional bits of its coefficients", 0)]
Radius = Annotated[float | None, positive("the interval is [-RADIUS, RADIUS]")]
Penalty = Annotated[str | None, choice(_PENALTY, "sum", "mean", "boundary")]
Gamma = Annotated[float | None, positive("where the penalty of one input reaches 1")]
Beta = Annotated[float | None, not_negative("weight of the penalty")]
Epochs = Annotated[int | None, whole("passes over the training images")]
BatchSize = Annotated[int | None, whole("images a step", 2)]
LearningRate = Annotated[float | None, positive("peak learning rate")]
WeightDecay = Annotated[float | None, not_negative("weight decay")]
ClipNorm = Annotated[float | None, positive("largest gradient norm, batch-norm spared")]
TrainPrecision = Annotated[str | None, choice("in training", "float32", "bfloat16")]
HeldOut = Annotated[int | None, whole("validation images", 0)]
Crop = Annotated[int | None, whole("padding from which training crops are taken", 0)]
Seed = Annotated[int | None, whole("of weights and data order", -(2**63))]

_FIELDS = {field.name for field in fields(Recipe)}


def train(
    context: typer.Context,
    recipe: RecipeName = "fashion-resnet",
    data: Data = Path("data"),
    out: Out = None,
    device: Device = None,
    threads: Threads = None,
    quiet: Quiet = False,
    activation: Activation = None,
    degree: Degree = None,
    frac_bits: FracBits = None,
    radius: Radius = None,
    penalty: Penalty = None,
    gamma: Gamma = None,
    beta: Beta = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = None,
    weight_decay: WeightDecay = None,
    clip_norm: ClipNorm = None,
    precision: TrainPrecision = None,
    held_out: HeldOut = None,
    crop: Crop = None,
    seed: Seed = None,
) -> int:
    """Train a network with polynomial activations; what is not given is the recipe's.

    examples:
      crypten-espn train --recipe fashion-resnet
      crypten-espn train --recipe cifar10-resnet18 --data ~/datasets --epochs 1
    """
    named = find_recipe(recipe)
    # The share of the run that is spent with ReLUs stays.
    share = (epochs or named.epochs) / named.epochs
    changed = replace(
        named, relu_epochs=named.relu_epochs * share, **_given_fields(context)
    )
    out = out or Path("out") / f"{named.name}-{changed.activation}"
    return _run(changed, None, out, data, device, threads, quiet)


def finetune(
    context: typer.Context,
    start: Annotated[
        Path, typer.Option(parser=network_file, metavar="FILE", help=_START)
    ],
    recipe: RecipeName = "fashion-resnet",
    data: Data = Path("data"),
    out: Out = None,
    device: Device = None,
    threads: Threads = None,
    quiet: Quiet = False,
    replace_epochs: Annotated[float | None, not_negative(_REPLACE)] = None,
    calibrated: Annotated[bool, option(_CALIBRATED, None, "--calibrated")] = False,
    steps: Annotated[int | None, whole(_STEPS)] = None,
    margin: Annotated[float | None, positive(_MARGIN)] = None,
    degree: Degree = None,
    frac_bits: FracBits = None,
    radius: Radius = None,
    penalty: Penalty = None,
    gamma: Gamma = None,
    beta: Beta = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = None,
    weight_decay: WeightDecay = None,
    clip_norm: ClipNorm = None,
    precision: TrainPrecision = None,
    held_out: HeldOut = None,
    crop: Crop = None,
    seed: Seed = None,
) -> int:
    """Turn a trained ReLU network into a polynomial one in a few epochs.

    examples:
      crypten-espn finetune --recipe fashion-resnet --start relu.safetensors
      crypten-espn finetune --recipe fashion-resnet --start relu.safetensors \\
        --calibrated --degree 4 --steps 200
    """
    named = find_recipe(recipe)
    if calibrated and replace_epochs is not None:
        raise EspnError(
            "--calibrated replaces all ReLUs at once; give it or --replace-epochs"
        )
    if not calibrated and (steps, margin) != (None, None):
        raise EspnError("--steps and --margin are for --calibrated; give that too")
    if calibrated:
        tuning = channel_tuning(named, degree=degree or 4, steps=steps, epochs=epochs)
    else:
        tuning = fine_tuning(named, epochs=epochs, replace_epochs=replace_epochs)
    changed = replace(tuning, **_given_fields(context))
    kind = "calibrated" if calibrated else "finetuned"
    out = out or Path("out") / f"{tuning.name}-{kind}"
    return _run(changed, start, out, data, device, threads, quiet)


def _given_fields(context: typer.Context) -> dict[str, Any]:
    """The options that are fields of a recipe, and were given."""
    return {
        name: value
        for name, value in context.params.items()
        if name in _FIELDS and value is not None
    }


def _run(
    recipe: Recipe,
    start: Path | None,
    out: Path,
    data: Path,
    device: str | None,
    threads: int | None,
    quiet: bool,
) -> int:
    from ..pillar import training

    if threads is not None:
        torch.set_num_threads(threads)
    print(f"recipe {recipe.name}, {_description(recipe)}")
    try:
        result = training.train(
            recipe, out=out, data=data, start=start, device=device, progress=not quiet
        )
    except KeyboardInterrupt:
        command = shlex.join(["crypten-espn", *sys.argv[1:]])
        print(f"\nstopped; the same command continues: {command}")
        return 130
    print(result)
    if recipe.activation == "polynomial":
        images = load_dataset(recipe.dataset, directory=data, held_out=recipe.held_out)
        print(range_report(load_network(result.path), images.validation.batches(500)))
    return 0


def _description(recipe: Recipe) -> str:
    """The fields of a recipe that are not at their default, on one line."""
    return ", ".join(
        f"{field.name}={getattr(recipe, field.name)}"
        for field in fields(recipe)
        if field.name != "name" and getattr(recipe, field.name) != field.default
    )
