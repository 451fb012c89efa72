"""The PILLAR paper's training figures 3, 4, 5 and 11, drawn anew from real runs.

     3  accuracy against the polynomial's degree, treated and untreated
     4  escaping activations: the largest activation input at every step
     5  weight of the penalty: accuracy, and inputs that leave the interval
    11  quantisation-aware fit against truncated coefficients

    python -m benchmarks.figures                        # some minutes on two cores
    python -m benchmarks.figures --figure 3 4 --jobs 1
    python -m benchmarks.figures --seeds 1 2 3          # trains what is missing
    python -m benchmarks.figures --figure 3 4 --learning-rate 0.1
    python -m benchmarks.figures --full                 # all images, 3 seeds: hours
    python -m benchmarks.figures --dataset cifar10 --data data

Each run trains a network of two convolutions, without batch-norm. "Treated" is the
paper's training: a quantisation-aware fit of ReLU, activation inputs clipped in
training, a penalty on large ones with its warm-up. "Untreated" is the real-valued least
squares fit of the same degree, without clip and penalty; all else is equal, the order
of the images too. Accuracy is that of the last epoch on images held out of the training
set, with no clip; no epoch is selected and the test set is not read.

Every finished run is kept in the --json file at once. The same command trains only what
is missing there, then draws; --fresh trains everything again. CSV, PNG and SVG are
written to --pictures.

Source: Diaa et al., USENIX Security 2024, figures 3, 4, 5 and 11.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from crypten_espn.errors import EspnError
from crypten_espn.pillar.recipes import find_recipe

from ..rows import ROOT, ResultsError
from .cells import FIGURES, Budget, cells
from .drawing import LEARNING_RATE, draw
from .finished import Finished, data_of, train_missing
from .training import first_images

RESULTS = ROOT / "benchmarks" / "results"
PICTURES = ROOT / "out" / "benchmarks"
BATCH_SIZE = 32


def make_parser() -> argparse.ArgumentParser:
    """The command line of this benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--figure",
        nargs="+",
        type=int,
        choices=FIGURES,
        default=FIGURES,
        metavar="N",
        help="3, 4, 5, 11; all by default",
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="every training image, 10 epochs, seeds 1 2 3; hours",
    )
    parser.add_argument(
        "--dataset",
        choices=("fashion-mnist", "cifar10", "cifar100"),
        default="fashion-mnist",
    )
    parser.add_argument("--data", default="data", metavar="DIR", help="its folder")
    parser.add_argument("--images", type=int, help="training images; 4,800")
    parser.add_argument("--epochs", type=int, help="passes over them; 3")
    parser.add_argument(
        "--learning-rate",
        type=float,
        default=LEARNING_RATE,
        metavar="RATE",
        help=f"its peak, {LEARNING_RATE:g}; the paper's on CIFAR is 0.013",
    )
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="1")
    parser.add_argument(
        "--jobs", type=int, default=2, help="processes, of one thread each; 2"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="train again what is finished"
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=RESULTS / "figures.json",
        metavar="FILE",
        help="finished runs",
    )
    parser.add_argument(
        "--pictures",
        type=Path,
        default=PICTURES,
        metavar="DIR",
        help="where CSV, PNG and SVG go (default: out/benchmarks)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's text for examples."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    for name in ("images", "epochs", "jobs"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: at least 1")
    if not 0 < options.learning_rate < math.inf:
        parser.error(f"--learning-rate {options.learning_rate}: above zero")
    recipe = dataclasses.replace(
        find_recipe("fashion-convnet"),
        dataset=options.dataset,
        learning_rate=options.learning_rate,
        batch_size=BATCH_SIZE,
        epochs=options.epochs or (10 if options.full else 3),
    )
    threads = torch.get_num_threads()
    try:
        data = data_of(recipe, options.data)
        whole = len(first_images(data, sys.maxsize))
        images = min(options.images or (whole if options.full else 4_800), whole)
        if images < recipe.batch_size:
            parser.error(f"--images {images}: at least a batch, {recipe.batch_size}")
        default_seeds = (1, 2, 3) if options.full else (1,)
        seeds = tuple(dict.fromkeys(options.seeds or default_seeds))
        budget = Budget(recipe, images, seeds)
        finished = Finished(options.json, fresh=options.fresh)
        torch.set_num_threads(1)
        waiting = {
            figure: [cell.run for cell in cells(figure, budget)]
            for figure in options.figure
        }

        def draw_complete() -> None:
            for figure, runs in list(waiting.items()):
                if all(run in finished for run in runs):
                    del waiting[figure]
                    files = draw(figure, budget, finished, options.pictures)
                    print(*files, sep="\n", flush=True)

        keys = {run.key: run for runs in waiting.values() for run in runs}
        left = sum(run not in finished for run in keys.values())
        print(
            f"{' '.join(str(budget).split())}: {left} of {len(keys)} runs to train, "
            f"the others are in {options.json}",
            flush=True,
        )
        draw_complete()
        train_missing(
            [run for runs in waiting.values() for run in runs],
            finished,
            data=data,
            folder=options.data,
            jobs=options.jobs,
            after=draw_complete,
        )
    except (EspnError, ResultsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "interrupted; finished runs are kept, the same command goes on",
            file=sys.stderr,
        )
        return 130
    finally:
        torch.set_num_threads(threads)
    return 0
