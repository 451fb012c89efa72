"""Trained networks: polynomials against ReLU under the same budget, over seeds.

Follows recipes of the package once per seed and kind, and compares the test accuracies.
A run takes tens of minutes on a core; each is resumed where it stopped, and one that
has ended is not repeated.

    python -m benchmarks.training --recipes fashion-minionn --seeds 1 2 3
    python -m benchmarks.training --recipes fashion-resnet32 --kinds polynomial relu
    python -m benchmarks.training --recipes fashion-resnet --kinds finetuned
    python -m benchmarks.training --table

Kinds: polynomial and relu differ in nothing but the activation and its penalty;
finetuned starts from the relu run of the same seed and has a fifth of its epochs;
calibrated and quadratic start there too, with a fitted polynomial a channel: degree 4
and 200 steps, degree 2 and a fifth of the epochs.
Results: RECIPE-KIND-SEED.json and its log .csv in --out; the table is of every file
there. Running states are kept in --runs. The test set is read
once, after the epoch was chosen on validation images.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any

import pandas
import torch

from crypten_espn.errors import EspnError
from crypten_espn.pillar.recipes import (
    RECIPES,
    Recipe,
    channel_tuning,
    find_recipe,
    fine_tuning,
    train,
)

from .rows import ResultsError, machine, write_atomically
from .tables import STAMP, columns

KINDS = ("polynomial", "relu", "finetuned", "calibrated", "quadratic")
STARTED = KINDS[2:]  # from the relu run of the same seed
RESULTS = Path("benchmarks/results/training")
_TEST_IMAGES = 10_000  # of Fashion-MNIST and of both CIFARs
RUNS = Path("out/training")


def recipe_of(name: str, kind: str, seed: int) -> Recipe:
    """The recipe that one run follows."""
    recipe = replace(find_recipe(name), seed=seed)
    if kind == "finetuned":
        return fine_tuning(recipe)
    if kind in STARTED:
        return channel_tuning(recipe, degree=2 if kind == "quadratic" else 4)
    return replace(recipe, activation=kind)


def follow(
    name: str, kind: str, seed: int, *, runs: Path, out: Path, data: Path, quiet: bool
) -> str:
    """Finish one run unless it has ended, put its results into `out`; one line."""
    recipe = recipe_of(name, kind, seed)
    title = f"{name}-{kind}-{seed}"
    folder = runs / title
    if not _ended(folder, recipe):
        start = None
        if kind in STARTED:
            start = runs / f"{name}-relu-{seed}" / "network.safetensors"
            if not start.exists():
                raise ResultsError(
                    f"{title} starts from {start}, which does not exist; run with "
                    f"--kinds relu {kind}"
                )
        train(recipe, out=folder, data=data, start=start, progress=not quiet)
    result = json.loads((folder / "result.json").read_text())
    del result["path"]
    record = {"kind": kind, "machine": _where(), **result}
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / f"{title}.json", json.dumps(record, indent=1) + "\n")
    shutil.copyfile(folder / "log.csv", out / f"{title}.csv")
    return f"{title}: test accuracy {result['test_accuracy']:.2%}"


def _where() -> dict[str, Any]:
    """The machine, by the name of the device that trained where there is one."""
    found = machine()
    if torch.cuda.is_available():
        found["processor"] = torch.cuda.get_device_name()
    return found


def _ended(folder: Path, recipe: Recipe) -> bool:
    path = folder / "result.json"
    if not path.exists():
        return False
    # Fields that were not there yet are as if at their default.
    earlier = {
        field.name: field.default
        for field in fields(Recipe)
        if field.default is not MISSING
    }
    found = {**earlier, **json.loads(path.read_text())["recipe"]}
    return found == asdict(recipe)


def summary(folder: Path) -> pandas.DataFrame:
    """A line for each recipe and kind in a folder of results, all text.

    Raises:
        ResultsError: there is none, or a file is not a result.
    """
    runs = pandas.DataFrame([_run(path) for path in sorted(folder.glob("*.json"))])
    if runs.empty:
        raise ResultsError(f"{folder}: no results there; run the benchmark first")
    runs["kind"] = pandas.Categorical(runs.kind, KINDS)
    relu = runs[runs.kind == "relu"][["recipe", "seed", "points"]]
    runs = runs.merge(relu, on=["recipe", "seed"], how="left", suffixes=("", "_relu"))
    runs["gap"] = runs.points - runs.points_relu
    cells = runs.sort_values("seed").groupby(["recipe", "kind"], observed=True)
    first, last, points = cells.first(), cells.last(), cells.points
    gap = cells.apply(_gap, include_groups=False)
    table = pandas.DataFrame(
        {
            "network": first.network,
            "activation": first.activation,
            "epochs": first.epochs.astype(str),
            "seeds": cells.seed.agg(lambda seeds: " ".join(map(str, seeds))),
            "test accuracy": points.mean().map("{:.2f}".format),
            "range": points.agg(lambda some: f"{some.min():.2f} to {some.max():.2f}"),
            "against ReLU": gap.mask(gap.index.get_level_values("kind") == "relu", ""),
            "minutes": (cells.seconds.mean() / 60).map("{:.1f}".format),
            **{name: last[name] for name in STAMP},
        }
    )
    return table.fillna("").reset_index("recipe").reset_index(drop=True)


def _gap(runs: pandas.DataFrame) -> str:
    """The mean over seeds of what a network has above its ReLU twin; standard error.

    Of one seed the error is what the choice of so many test images alone would do to
    two independent networks: more than to twins, and less than other seeds might.
    """
    gaps = runs.gap.dropna()
    if gaps.empty:
        return ""
    if len(gaps) > 1:
        error = float(gaps.std()) / len(gaps) ** 0.5
    else:
        variance = sum(
            float((p * (100 - p)).mean()) for p in (runs.points, runs.points_relu)
        )
        error = (variance / _TEST_IMAGES) ** 0.5
    return f"{gaps.mean():+.2f} ± {error:.2f}"


def _run(path: Path) -> dict[str, Any]:
    """What the summary needs of one result."""
    try:
        record = json.loads(path.read_text())
        recipe, kind, machine = record["recipe"], record["kind"], record["machine"]
        degree = f"degree {recipe['degree']}"
        activations = {
            "relu": "ReLU",
            "polynomial": degree,
            "finetuned": f"{degree}, fine-tuned",
            "calibrated": f"{degree} a channel, tuned",
            "quadratic": f"{degree} a channel, tuned",
        }
        return {
            "recipe": recipe["name"],
            "network": recipe["network"],
            "kind": kind,
            "activation": activations[kind],
            "epochs": _length(recipe),
            "seed": recipe["seed"],
            "points": 100 * record["test_accuracy"],
            "seconds": record["seconds"],
            **{name: str(machine[name]) for name in STAMP},
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ResultsError(f"{path}: not a training result ({error!r})") from error


def _length(recipe: dict[str, Any]) -> str:
    steps = recipe.get("epoch_steps")
    return f"{recipe['epochs']}" if steps is None else f"{steps} steps"


def make_parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--recipes",
        nargs="+",
        metavar="NAME",
        choices=tuple(RECIPES),
        default=["fashion-minionn", "fashion-resnet32"],
        help="default: %(default)s",
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS[:2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--data", type=Path, default=Path("data"), help="data set")
    parser.add_argument("--runs", type=Path, default=RUNS, help="running states")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results")
    parser.add_argument("--threads", type=int, help="processor threads of torch")
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's text for examples."""
    options = make_parser().parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        cells = [
            (name, kind, seed)
            for name in options.recipes
            for seed in options.seeds
            for kind in sorted(options.kinds, key=("relu", *KINDS).index)
        ]
        for name, kind, seed in [] if options.table else cells:
            line = follow(
                name,
                kind,
                seed,
                runs=options.runs,
                out=options.out,
                data=options.data,
                quiet=options.quiet,
            )
            print(line, flush=True)
        rows = summary(options.out)
    except (EspnError, ResultsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130
    shown = rows.drop(columns=list(STAMP))
    print(columns([list(shown.columns), *shown.to_numpy().tolist()], left=3))
    return 0


if __name__ == "__main__":
    sys.exit(main())
