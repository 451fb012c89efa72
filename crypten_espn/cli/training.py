"""`crypten-espn train` and `crypten-espn finetune`: options in, a result printed."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from .data import load_dataset
from .ranges import range_report
from .recipe import RECIPES, Recipe, find_recipe, fine_tuning
from .storage import load_network, network_file
from .training import train

# Fields that the command line may override, with their help.
_OVERRIDES = {
    "activation": "polynomial or relu",
    "degree": "degree of the polynomial",
    "frac_bits": "fractional bits of its coefficients",
    "radius": "the polynomial's interval is [-RADIUS, RADIUS]",
    "penalty": "sum (the paper's), mean or boundary",
    "gamma": "where the penalty of one input reaches 1",
    "beta": "weight of the penalty",
    "epochs": "passes over the training images",
    "batch_size": "images a step",
    "learning_rate": "peak learning rate",
    "weight_decay": "weight decay",
    "clip_norm": "largest gradient norm, batch-norm spared",
    "precision": "float32 or bfloat16",
    "held_out": "validation images",
    "crop": "padding from which training crops are taken",
    "seed": "of weights and data order",
}
_KINDS: dict[str, type] = {
    "activation": str,
    "penalty": str,
    "precision": str,
    "degree": int,
    "frac_bits": int,
    "epochs": int,
    "batch_size": int,
    "held_out": int,
    "crop": int,
    "seed": int,
}


def add_arguments(parser: argparse.ArgumentParser, *, finetune: bool = False) -> None:
    """Add the options of `train`, or of `finetune`, to a parser.

    `run` takes what the parser returns.
    """
    parser.set_defaults(finetune=finetune)
    parser.add_argument(
        "--recipe",
        default="fashion-resnet",
        metavar="NAME",
        help=f"one of {', '.join(RECIPES)} (default: %(default)s)",
    )
    parser.add_argument(
        "--data", default="data", metavar="DIR", help="folder of the data set"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder of log, state and network (default: out/RECIPE-KIND); a run found "
        "there is resumed",
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--threads", type=int, help="processor threads of torch")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    if finetune:
        parser.add_argument(
            "--start",
            type=network_file,
            required=True,
            metavar="FILE",
            help="network with ReLU, as `crypten-espn train --activation relu` writes, "
            "or fashion-resnet-relu, which is bundled",
        )
        parser.add_argument(
            "--replace-epochs",
            type=float,
            help="epochs over which ReLUs give way (default: a quarter of --epochs)",
        )
    for name, text in _OVERRIDES.items():
        if finetune and name == "activation":
            continue
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=_KINDS.get(name, float),
            help=f"{text} (default: the recipe's)",
        )


def run(args: argparse.Namespace) -> int:
    """Train as the options say; return the exit status.

    Raises:
        EspnError: whatever `train` raises.
    """
    recipe = _overridden(find_recipe(args.recipe), args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    kind = "finetuned" if args.finetune else recipe.activation
    out = Path(args.out) if args.out else Path("out") / f"{recipe.name}-{kind}"
    print(f"recipe {recipe.name}, {describe(recipe)}")
    try:
        result = train(
            recipe,
            out=out,
            data=args.data,
            start=args.start if args.finetune else None,
            device=args.device,
            progress=not args.quiet,
        )
    except KeyboardInterrupt:
        command = shlex.join(["crypten-espn", *sys.argv[1:]])
        print(f"\nstopped; the same command continues: {command}")
        return 130
    print(result)
    if recipe.activation == "polynomial":
        data = load_dataset(
            recipe.dataset, directory=args.data, held_out=recipe.held_out
        )
        network = load_network(result.path)
        print(range_report(network, data.validation.batches(500)))
    return 0


def describe(recipe: Recipe) -> str:
    """Return one line: the fields of a recipe that are not at their default."""
    shown = [
        f"{field.name}={getattr(recipe, field.name)}"
        for field in fields(recipe)
        if field.name != "name" and getattr(recipe, field.name) != field.default
    ]
    return ", ".join(shown)


def _overridden(recipe: Recipe, args: argparse.Namespace) -> Recipe:
    given: dict[str, Any] = {
        name: getattr(args, name)
        for name in _OVERRIDES
        if getattr(args, name, None) is not None
    }
    if not args.finetune:
        # The share of the run that is spent with ReLUs stays.
        share = given.get("epochs", recipe.epochs) / recipe.epochs
        return replace(recipe, relu_epochs=recipe.relu_epochs * share, **given)
    return replace(
        fine_tuning(recipe, epochs=args.epochs, replace_epochs=args.replace_epochs),
        **given,
    )
