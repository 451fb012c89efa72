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
written beside that file.

Source: Diaa et al., USENIX Security 2024, figures 3, 4, 5 and 11.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from crypten_espn.errors import DataError, DegreeCollapsedWarning, EspnError
from crypten_espn.pillar.data import Dataset, Images, load_dataset
from crypten_espn.pillar.networks import Architecture
from crypten_espn.pillar.penalty import range_penalty, warmup_stage
from crypten_espn.pillar.recipes import Recipe, accuracy, find_recipe, learning_rate
from crypten_espn.pillar.surgery import PolynomialActivation, replace_activations
from crypten_espn.polynomial import GRID_POINTS, Polynomial

from . import harness
from .harness import ResultsError, write_atomically

RESULTS = Path(__file__).resolve().parent / "results"
FIGURES = (3, 4, 5, 11)
DEGREES = range(2, 10)
ESCAPING_DEGREE = 6
ZOOM = 30
BETAS = tuple(10.0**-k for k in range(1, 9))
# (degree, bits) at which figure 11 trains; bits over which it compares fits.
TRAINED_FITS = ((4, 8), (4, 10), (6, 12), (6, 14))
FIT_BITS = range(6, 17)
REAL_BITS = 40  # of coefficients that stand for real numbers
FINE_BITS = 20  # at which no degree up to 9 loses its top coefficient
# Of Fashion-MNIST. At the paper's 0.013, made for CIFAR-10, nothing escapes within so
# few steps. Small batches give more steps for the same time.
# At 0.1 the penalty itself diverges at degrees 2 and 4.
LEARNING_RATE = 0.05
BATCH_SIZE = 32
# An interval that nothing leaves: an activation that clips nothing.
UNBOUNDED = (-1e38, 1e38)


# ------------------------------------------------------------------------ polynomials


def real_fit(degree: int, radius: float) -> list[float]:
    """Real coefficients of least squared error to ReLU on [-radius, radius]."""
    points = np.linspace(-radius, radius, GRID_POINTS)
    fit = np.polynomial.Polynomial.fit(points, np.maximum(points, 0), degree)
    return [float(c) for c in fit.convert().coef]


@functools.lru_cache(maxsize=256)
def polynomial(fit: str, degree: int, bits: int, radius: float) -> Polynomial:
    """A polynomial that stands for ReLU on [-radius, radius].

    Args:
        fit: "aware" (least squared error over integer coefficients), "rounded" or
            "truncated" (the real-valued fit's coefficients, to the nearest or towards
            zero), or "real" (to 40 bits, whatever `bits`).
        degree: what is asked for; top coefficients may become zero.
        bits: fractional bits.
        radius: the interval's.
    """
    interval = (-radius, radius)
    if fit == "aware":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DegreeCollapsedWarning)
            return Polynomial.fit(
                torch.relu, degree=degree, interval=interval, frac_bits=bits
            )
    coeffs = real_fit(degree, radius)
    if fit == "truncated":
        cut = tuple(math.trunc(c * 2**bits) for c in coeffs)
        return Polynomial(cut, bits, interval, degree)
    bits = REAL_BITS if fit == "real" else bits
    return Polynomial.from_coeffs(coeffs, frac_bits=bits, interval=interval)


# ------------------------------------------------------------------------------- runs

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
    generator = torch.Generator().manual_seed(recipe.seed)
    part = first_images(data, run.images)
    inputs: list[float] = []
    for _ in range(recipe.epochs):
        for images, labels in part.batches(recipe.batch_size, generator=generator):
            step = len(inputs)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(
                    recipe, step, steps_per_epoch=run.steps_per_epoch
                )
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


# ------------------------------------------------------------------------ finished runs


@dataclasses.dataclass(frozen=True)
class Row:
    """A finished run, and where and when it was made."""

    settings: dict[str, Any]
    outcome: Outcome
    stamp: dict[str, str]


class Finished:
    """The finished runs of one file, which is rewritten in one step after each.

    Raises: ResultsError for a file that holds something else.
    """

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        self.path = path
        self.rows: dict[str, Row] = {}
        if fresh or not path.exists():
            return
        try:
            for line in json.loads(path.read_text())["runs"]:
                values = line["outcome"]
                outcome = Outcome(**{**values, "inputs": tuple(values["inputs"])})
                key = json.dumps(line["settings"], sort_keys=True)
                self.rows[key] = Row(line["settings"], outcome, line["stamp"])
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ResultsError(
                f"{path}: not a file of finished runs ({error!r}); give another "
                "--json, or --fresh to train everything again and replace it"
            ) from error

    def __contains__(self, run: Run) -> bool:
        return run.key in self.rows

    def __getitem__(self, run: Run) -> Row:
        return self.rows[run.key]

    def add(self, run: Run, outcome: Outcome, stamp: dict[str, str]) -> None:
        """Keep a run and write the file."""
        self.rows[run.key] = Row(run.settings, outcome, stamp)
        lines = [
            json.dumps(dataclasses.asdict(row), sort_keys=True)
            for row in self.rows.values()
        ]
        write_atomically(self.path, '{"runs": [\n' + ",\n".join(lines) + "\n]}\n")


def train_missing(
    runs: Iterable[Run],
    finished: Finished,
    *,
    data: Dataset,
    folder: str,
    jobs: int,
    after: Callable[[], None],
) -> None:
    """Train the runs that are not finished yet, each kept as soon as it ends.

    Args:
        runs: what is wanted; equal runs are trained once.
        finished: where outcomes are kept.
        data: the runs' data set.
        folder: where worker processes read it from.
        jobs: processes, of one thread each.
        after: called after each run.

    Raises:
        ResultsError: a worker process died.
    """
    wanted: dict[str, Run] = {}
    for run in runs:
        if run not in finished:
            wanted.setdefault(run.key, run)
    missing = list(wanted.values())
    machine = harness.machine()
    stamp = {name: str(machine[name]) for name in ("commit", "date", "processor")}
    total = sum(run.steps for run in missing)
    with tqdm(total=total, unit="step", dynamic_ncols=True, disable=None) as bar:

        def keep(run: Run, outcome: Outcome) -> None:
            finished.add(run, outcome, stamp)
            bar.write(f"{_title(run)}: {_told(outcome)}")
            sys.stdout.flush()
            after()

        if jobs == 1:
            for run in missing:
                keep(run, train(run, data, tick=bar.update))
        elif missing:
            _in_processes(missing, folder, min(jobs, len(missing)), bar, keep)


def _in_processes(
    runs: Sequence[Run],
    folder: str,
    jobs: int,
    bar: Any,
    keep: Callable[[Run, Outcome], None],
) -> None:
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    done_steps = context.Value("q", 0)
    pool = ProcessPoolExecutor(
        jobs, mp_context=context, initializer=_begin_worker, initargs=(done_steps,)
    )
    try:
        waiting = {pool.submit(_train_in_worker, run, folder): run for run in runs}
        while waiting:
            ended, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            bar.update(done_steps.value - bar.n)
            for future in ended:
                keep(waiting.pop(future), future.result())
        pool.shutdown()
    except BrokenProcessPool as error:
        raise ResultsError(
            "a worker process died, perhaps for want of memory; finished runs are "
            "kept: run the same command again, with --jobs 1"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()


_done_steps: Any = None


def _begin_worker(done_steps: Any) -> None:
    """One thread; Ctrl-C is the parent's; no worker outlives its parent."""
    global _done_steps
    _done_steps = done_steps
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _train_in_worker(run: Run, folder: str) -> Outcome:
    def tick(steps: int) -> None:
        with _done_steps.get_lock():
            _done_steps.value += steps

    return train(run, _data_of(run.recipe, folder), tick=tick)


def _data_of(recipe: Recipe, folder: str) -> Dataset:
    return _load(recipe.dataset, folder, recipe.held_out, recipe.crop)


@functools.lru_cache(maxsize=1)
def _load(name: str, folder: str, held_out: int | None, crop: int | None) -> Dataset:
    return load_dataset(name, directory=folder, held_out=held_out, crop=crop)


def _title(run: Run) -> str:
    activation = "ReLU" if run.polynomial is None else str(run.polynomial)
    clip = "clip" if run.clip else "no clip"
    return f"{activation}, {clip}, beta {run.recipe.beta:g}, seed {run.recipe.seed}"


def _told(outcome: Outcome) -> str:
    if outcome.accuracy is None:
        return f"diverged at step {outcome.diverged_at} ({outcome.seconds:.0f} s)"
    largest = math.inf if outcome.largest_input is None else outcome.largest_input
    return (
        f"accuracy {outcome.accuracy:.2%}, largest input {largest:.3g}, "
        f"{outcome.outside:.3%} outside ({outcome.seconds:.0f} s)"
    )


# ------------------------------------------------------------------ what is in a figure


@dataclasses.dataclass(frozen=True)
class Cell:
    """A point or line of a figure: its series, the degree asked for, its run."""

    series: str
    degree: int
    run: Run


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much to train: the recipe for all runs, images, seeds."""

    recipe: Recipe
    images: int
    seeds: tuple[int, ...]

    def __str__(self) -> str:
        recipe, seeds = self.recipe, ", ".join(map(str, self.seeds))
        return (
            f"{recipe.dataset}, {self.images:,} training images, {recipe.epochs} "
            f"epochs,\nbatch {recipe.batch_size}, learning rate "
            f"{recipe.learning_rate:g}, seed{'s' * (len(self.seeds) > 1)} {seeds}"
        )

    def cells(
        self,
        series: str,
        fit: str,
        degree: int,
        bits: int,
        *,
        clip: bool = True,
        beta: float | None = None,
    ) -> list[Cell]:
        """One cell a seed; fit "relu" has no polynomial; beta None is the recipe's."""
        made = None
        if fit != "relu":
            made = polynomial(fit, degree, bits, self.recipe.radius)
        beta = self.recipe.beta if beta is None else float(beta)
        return [
            Cell(
                series,
                degree,
                Run(
                    dataclasses.replace(self.recipe, beta=beta, seed=seed),
                    made,
                    clip,
                    self.images,
                ),
            )
            for seed in self.seeds
        ]


TREATED, COARSE, UNTREATED = (
    f"treated, {FINE_BITS} bits",
    "treated, 10 bits",
    "untreated",
)
NEITHER, CLIP, PENALTY, BOTH = (
    "no clip, no penalty",
    "clip alone",
    "penalty alone",
    "clip and penalty",
)


def cells(figure: int, budget: Budget) -> list[Cell]:
    """Every cell of a figure, with equal runs where polynomials are equal."""
    found: list[Cell] = []
    if figure == 3:
        for degree in DEGREES:
            found += budget.cells(TREATED, "aware", degree, FINE_BITS)
            found += budget.cells(COARSE, "aware", degree, 10)
            found += budget.cells(
                UNTREATED, "real", degree, REAL_BITS, clip=False, beta=0
            )
        found += budget.cells("ReLU", "relu", 0, 0, clip=False, beta=0)
    elif figure == 4:
        at = ("aware", ESCAPING_DEGREE, FINE_BITS)
        found += budget.cells(NEITHER, *at, clip=False, beta=0)
        found += budget.cells(CLIP, *at, beta=0)
        found += budget.cells(PENALTY, *at, clip=False)
        found += budget.cells(BOTH, *at)
    elif figure == 5:
        for beta in BETAS:
            found += budget.cells("treated", "aware", 4, 10, beta=beta)
    else:
        for degree, bits in TRAINED_FITS:
            for fit in ("aware", "truncated"):
                found += budget.cells(fit, fit, degree, bits)
    return found


# --------------------------------------------------------------------------------- CSV


def line(cell: Cell, row: Row) -> dict[str, Any]:
    """A cell as one line of a CSV."""
    settings, outcome = row.settings, row.outcome
    numerators = settings["numerators"]
    return {
        "series": cell.series,
        "degree": cell.degree,
        "effective_degree": "" if numerators is None else len(numerators) - 1,
        "frac_bits": "" if numerators is None else settings["frac_bits"],
        "numerators": "" if numerators is None else " ".join(map(str, numerators)),
        "clip": settings["clip"],
        "beta": settings["beta"],
        "seed": settings["seed"],
        "accuracy": "" if outcome.accuracy is None else f"{outcome.accuracy:.4f}",
        "diverged_at_step": outcome.diverged_at or "",
        "largest_input": _number(outcome, outcome.largest_input),
        "outside": _number(outcome, outcome.outside),
        "dataset": settings["dataset"],
        "images": settings["images"],
        "epochs": settings["epochs"],
        "steps": settings["images"] // settings["batch_size"] * settings["epochs"],
        "learning_rate": settings["learning_rate"],
        "seconds": outcome.seconds,
        **row.stamp,
    }


def _number(outcome: Outcome, value: float | None) -> str:
    """Empty after divergence, else the number or inf."""
    if outcome.accuracy is None:
        return ""
    return "inf" if value is None else f"{value:.6g}"


def tables(
    figure: int, drawn: Sequence[Cell], finished: Finished
) -> dict[str, list[dict[str, Any]]]:
    """The CSV files behind a figure: what to append to its name, and the lines."""
    if figure == 4:
        steps: list[dict[str, Any]] = []
        for cell in drawn:
            row = finished[cell.run]
            known = {
                "series": cell.series,
                "seed": row.settings["seed"],
                "degree": cell.degree,
                "beta": row.settings["beta"],
            }
            values: list[float] = [*row.outcome.inputs]
            if (row.outcome.diverged_at or 0) > len(values):
                values.append(math.inf)
            for step, value in enumerate(values, start=1):
                steps.append({**known, "step": step, "largest_input": value})
        return {"": steps, "-runs": [line(c, finished[c.run]) for c in drawn]}
    lines = [line(cell, finished[cell.run]) for cell in drawn]
    if figure != 11:
        return {"": lines}
    for cell, entry in zip(drawn, lines, strict=True):
        assert cell.run.polynomial is not None
        entry["rmse"] = f"{cell.run.polynomial.rmse(torch.relu):.5f}"
    radius = drawn[0].run.recipe.radius
    return {"": lines, "-fit": fit_errors(radius)}


def fit_errors(radius: float) -> list[dict[str, Any]]:
    """RMSE to ReLU of every way to get coefficients of few bits."""
    degrees = sorted({degree for degree, _ in TRAINED_FITS})
    found = []
    for degree in degrees:
        for bits in FIT_BITS:
            for fit in ("aware", "rounded", "truncated"):
                p = polynomial(fit, degree, bits, radius)
                found.append(
                    {
                        "series": fit,
                        "degree": degree,
                        "frac_bits": bits,
                        "effective_degree": p.degree,
                        "numerators": " ".join(map(str, p.numerators)),
                        "rmse": round(p.rmse(torch.relu), 6),
                    }
                )
    return found


# ------------------------------------------------------------------------------ drawing

CAPTIONS = {
    3: (
        "Accuracy against the degree. Hollow: the polynomial is that of a lower "
        "degree, since the best fit of ReLU on a symmetric interval has no odd power "
        "beyond x, and top coefficients may round to zero."
    ),
    4: (
        "The largest activation input of each training step, up to the last one that "
        "was finite."
    ),
    5: (
        "The weight of the penalty: accuracy, share of activation inputs outside the "
        "interval, and the largest of them, on held-out images."
    ),
    11: (
        "Integer coefficients of least squared error against the real-valued fit's, "
        "cut or rounded to as many bits: error of the fit, and accuracy after the same "
        "training."
    ),
}
TITLES = {
    3: "Accuracy against degree",
    4: f"Escaping activations, degree {ESCAPING_DEGREE}",
    5: "Weight of the penalty, degree 4, 10 bits",
    11: "Quantisation-aware fit against truncation",
}


def stem(figure: int, recipe: Recipe, folder: Path) -> Path:
    """Where a figure's files are, without what follows the name."""
    name = f"figure{figure}-{recipe.dataset}"
    if recipe.learning_rate != LEARNING_RATE:
        name += f"-rate{recipe.learning_rate:g}"
    return folder / name


def pictures(folder: Path) -> list[tuple[str, Path]]:
    """Caption and SVG of every figure that is in a folder."""
    found = []
    for figure in FIGURES:
        for path in sorted(folder.glob(f"figure{figure}-*.svg")):
            found.append((f"Figure {figure}. {CAPTIONS[figure]}", path))
    return found


def draw(figure: int, budget: Budget, finished: Finished, folder: Path) -> list[Path]:
    """Write a figure's CSV, PNG and SVG; the files written.

    All runs of the figure are finished.
    """
    drawn = cells(figure, budget)
    name = stem(figure, budget.recipe, folder)
    files = []
    for suffix, lines in tables(figure, drawn, finished).items():
        files.append(folder / f"{name.name}{suffix}.csv")
        write_atomically(files[-1], harness.csv_text(lines))
    plot = {3: _plot_degrees, 4: _plot_escapes, 5: _plot_betas, 11: _plot_fits}
    picture = plot[figure](drawn, finished, budget)
    picture.suptitle(f"{TITLES[figure]}\n{budget}", fontsize=9)
    return files + harness.save_figure(picture, name)


def _grouped(drawn: Sequence[Cell], finished: Finished) -> dict[Any, list[Outcome]]:
    """Outcomes over seeds, by series, degree, bits and beta."""
    groups: dict[Any, list[Outcome]] = {}
    for cell in drawn:
        p = cell.run.polynomial
        bits = 0 if p is None else p.frac_bits
        key = (cell.series, cell.degree, bits, cell.run.recipe.beta)
        groups.setdefault(key, []).append(finished[cell.run].outcome)
    return groups


def _percent(outcomes: Iterable[Outcome]) -> list[float]:
    return [100 * x.accuracy for x in outcomes if x.accuracy is not None]


def _error_bar(
    axes: Any, x: float, values: Sequence[float], style: Any, *, hollow: bool = False
) -> None:
    """Mean and extremes of one point."""
    colour, marker, _ = style
    mean = sum(values) / len(values)
    axes.errorbar(
        [x],
        [mean],
        yerr=[[mean - min(values)], [max(values) - mean]],
        color=colour,
        marker=marker,
        markersize=5.5,
        markerfacecolor="white" if hollow else colour,
        capsize=2 if len(values) > 1 else 0,
        linestyle="none",
        zorder=3,
    )


def _cross(
    axes: Any, x: float, height: float, steps: Sequence[int], style: Any
) -> None:
    """Mark runs that diverged, with their steps, at a share of the panel's height."""
    if not steps:
        return
    across = axes.get_xaxis_transform()
    axes.plot(
        [x],
        [height],
        marker="x",
        color=style[0],
        markersize=5.5,
        markeredgewidth=1.6,
        transform=across,
    )
    axes.annotate(
        f"step {', '.join(map(str, steps))}",
        (x, height),
        xycoords=across,
        xytext=(5, 0),
        textcoords="offset points",
        fontsize=6.5,
        va="center",
        color=style[0],
    )


def _plot_degrees(drawn: Sequence[Cell], finished: Finished, budget: Budget) -> Any:
    figure, (axes,) = harness.new_figure(height=4.2)
    groups = _grouped(drawn, finished)
    for index, series in enumerate((TREATED, COARSE, UNTREATED)):
        style = harness.STYLES[index]
        line_x: list[float] = []
        line_y: list[float] = []
        seen: set[tuple[int, ...]] = set()
        for cell in drawn:
            p = cell.run.polynomial
            if cell.series != series or p is None:
                continue
            if cell.run.recipe.seed != budget.seeds[0]:
                continue
            key = (series, cell.degree, p.frac_bits, cell.run.recipe.beta)
            values = _percent(groups[key])
            line_x.append(cell.degree)
            line_y.append(sum(values) / len(values) if values else math.nan)
            if values:
                hollow = p.numerators in seen
                _error_bar(axes, cell.degree, values, style, hollow=hollow)
            steps = [x.diverged_at for x in groups[key] if x.diverged_at]
            _cross(axes, cell.degree, 0.04 + 0.06 * (2 - index), steps, style)
            seen.add(p.numerators)
        axes.plot(line_x, line_y, color=style[0], linestyle=style[2], linewidth=1.2)
        axes.plot(
            [], [], color=style[0], marker=style[1], linestyle=style[2], label=series
        )
    relu = _percent(groups[("ReLU", 0, 0, 0.0)])
    if relu:
        mean = sum(relu) / len(relu)
        axes.axhline(mean, color="#444444", linewidth=1, label="ReLU")
    if any(finished[cell.run].outcome.diverged_at for cell in drawn):
        axes.plot([], [], "x", color="#444444", markeredgewidth=2, label="diverged")
    axes.set(
        xlabel="degree asked for (hollow: the polynomial is that of a lower degree)",
        ylabel="accuracy on held-out images, %",
    )
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.3 * (high - low), high)
    axes.set_xlim(DEGREES[0] - 0.3, DEGREES[-1] + 0.7)
    axes.set_xticks(list(DEGREES))
    axes.legend(
        frameon=False,
        fontsize=8,
        ncols=3,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.14),
    )
    return figure


def _plot_escapes(drawn: Sequence[Cell], finished: Finished, budget: Budget) -> Any:
    top = max(max(finished[cell.run].outcome.inputs, default=0.0) for cell in drawn)
    # Where one line dwarfs the others, the others once more by themselves.
    count = 2 if top > ZOOM else 1
    figure, panels = harness.new_figure(height=1.4 + 2.2 * count, panels=count)
    for index, series in enumerate((NEITHER, CLIP, PENALTY, BOTH)):
        colour, _, style = harness.STYLES[(5, 1, 2, 0)[index]]
        for number, cell in enumerate(c for c in drawn if c.series == series):
            outcome = finished[cell.run].outcome
            steps = range(1, len(outcome.inputs) + 1)
            label = series if number == 0 else None
            if outcome.diverged_at:
                label = f"{series}: not finite at step {outcome.diverged_at}"
            for axes in panels:
                axes.plot(
                    steps,
                    outcome.inputs,
                    color=colour,
                    linestyle=style,
                    linewidth=1.1,
                    label=label,
                )
                if outcome.diverged_at and outcome.inputs:
                    axes.plot(
                        [len(outcome.inputs)],
                        [outcome.inputs[-1]],
                        marker="x",
                        color=colour,
                        markersize=7,
                        markeredgewidth=2,
                    )
    radius = budget.recipe.radius
    for axes in panels:
        end = f"end of the interval, {radius:g}"
        axes.axhline(radius, color="#444444", linewidth=0.8, label=end)
        axes.set(yscale="log", ylabel="largest |activation input|")
    if top > ZOOM:
        panels[1].set_ylim(1, ZOOM)
        panels[1].set_title(f"the same below {ZOOM}", fontsize=8, loc="left")
    _label_log(panels[-1])
    panels[-1].set_xlabel("training step")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def _label_log(axes: Any) -> None:
    """Plain numbers at 1, 2, 3 and 5 times the powers of ten."""

    def text(value: float, _: Any) -> str:
        return f"{value:g}" if f"{value:.0e}"[0] in "1235" else ""

    axes.yaxis.set_major_formatter(text)
    axes.yaxis.set_minor_formatter(text)
    axes.tick_params(axis="y", which="minor", labelsize=7)


def _plot_betas(drawn: Sequence[Cell], finished: Finished, budget: Budget) -> Any:
    figure, panels = harness.new_figure(height=6.0, panels=3)
    groups = _grouped(drawn, finished)
    style = harness.STYLES[0]
    lines: list[list[tuple[float, float]]] = [[], [], []]
    for (_, _, _, beta), outcomes in groups.items():
        kept = [x for x in outcomes if x.accuracy is not None]
        measured = [
            [100 * x.accuracy for x in kept if x.accuracy is not None],
            [100 * x.outside for x in kept if x.outside is not None],
            [x.largest_input for x in kept if x.largest_input is not None],
        ]
        for axes, values, points in zip(panels, measured, lines, strict=True):
            if values:
                _error_bar(axes, beta, values, style)
                points.append((beta, sum(values) / len(values)))
        steps = [x.diverged_at for x in outcomes if x.diverged_at]
        _cross(panels[0], beta, 0.06, steps, harness.STYLES[5])
    for axes, points in zip(panels, lines, strict=True):
        if points:
            axes.plot(*zip(*points, strict=True), color=style[0], linewidth=1.2)
        axes.set_xscale("log")
        axes.set_xlim(min(BETAS) / 2, max(BETAS) * 4)
        axes.set_xticks(BETAS)
        axes.xaxis.set_minor_formatter(lambda value, _: "")
        axes.margins(y=0.15)
    panels[0].set_ylabel("accuracy, %")
    if any(finished[cell.run].outcome.diverged_at for cell in drawn):
        panels[0].set_title("cross: diverged", fontsize=8, loc="left")
    panels[1].set_ylabel("inputs outside, %")
    panels[1].set_yscale("symlog", linthresh=1e-3)
    panels[1].set_ylim(bottom=-2e-4)
    panels[2].set(
        ylabel="largest |input|", yscale="log", xlabel="beta, weight of the penalty"
    )
    panels[2].axhline(budget.recipe.radius, color="#444444", linewidth=0.8)
    _label_log(panels[2])
    return figure


def _plot_fits(drawn: Sequence[Cell], finished: Finished, budget: Budget) -> Any:
    errors = fit_errors(budget.recipe.radius)
    degrees = list(dict.fromkeys(entry["degree"] for entry in errors))
    figure, panels = harness.new_figure(height=6.2, panels=len(degrees) + 1)
    for axes, degree in zip(panels, degrees, strict=False):
        for index, fit in enumerate(("aware", "rounded", "truncated")):
            colour, marker, style = harness.STYLES[(0, 2, 1)[index]]
            points = [
                (entry["frac_bits"], entry["rmse"])
                for entry in errors
                if entry["series"] == fit and entry["degree"] == degree
            ]
            axes.plot(
                *zip(*points, strict=True),
                color=colour,
                marker=marker,
                linestyle=style,
                markersize=4,
                label=fit if fit != "aware" else "quantisation-aware",
            )
        axes.set(yscale="log", ylabel="RMSE to ReLU")
        axes.set_xticks(list(FIT_BITS))
        axes.set_title(f"fit, degree {degree}", fontsize=8, loc="left")
    panels[0].legend(frameon=False, fontsize=8)
    panels[len(degrees) - 1].set_xlabel("fractional bits of the coefficients")
    axes = panels[-1]
    groups = _grouped(drawn, finished)
    for (series, degree, bits, _), outcomes in groups.items():
        at = TRAINED_FITS.index((degree, bits)) + (-0.1 if series == "aware" else 0.1)
        style = harness.STYLES[0 if series == "aware" else 1]
        values = _percent(outcomes)
        if values:
            _error_bar(axes, at, values, style)
            axes.annotate(
                f"{sum(values) / len(values):.1f}",
                (at, sum(values) / len(values)),
                xytext=(-5 if series == "aware" else 5, 0),
                textcoords="offset points",
                fontsize=7,
                va="center",
                ha="right" if series == "aware" else "left",
            )
        steps = [x.diverged_at for x in outcomes if x.diverged_at]
        _cross(axes, at, 0.06 if series == "aware" else 0.16, steps, style)
    axes.set_xticks(
        range(len(TRAINED_FITS)),
        [f"degree {degree}, {bits} bits" for degree, bits in TRAINED_FITS],
    )
    axes.set_xlim(-0.5, len(TRAINED_FITS) - 0.5)
    axes.margins(y=0.15)
    axes.set_ylabel("accuracy, %")
    crosses = any(finished[cell.run].outcome.diverged_at for cell in drawn)
    title = "after training" + " (cross: diverged)" * crosses
    axes.set_title(title, fontsize=8, loc="left")
    return figure


# ----------------------------------------------------------------------- command line


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
        help="finished runs; CSV and pictures go beside it",
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
        data = _data_of(recipe, options.data)
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
                    files = draw(figure, budget, finished, options.json.parent)
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


if __name__ == "__main__":
    sys.exit(main())
