"""Figures from finished runs: their files, and their captions."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pandas

from crypten_espn.pillar.recipes import Recipe

from .. import plots
from .cells import (
    ESCAPING_DEGREE,
    FIGURES,
    Budget,
    budgets,
    cells,
)
from .finished import Finished
from .lines import tables
from .panels import plot_betas, plot_degrees, plot_escapes, plot_fits

# Of Fashion-MNIST. At the paper's 0.013, made for CIFAR-10, nothing escapes within so
# few steps. Small batches give more steps for the same time.
# At 0.1 the penalty itself diverges at degrees 2 and 4.
LEARNING_RATE = 0.05

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
    folder.mkdir(parents=True, exist_ok=True)
    name = stem(figure, budget.recipe, folder)
    files = []
    for suffix, lines in tables(figure, drawn, finished).items():
        files.append(folder / f"{name.name}{suffix}.csv")
        pandas.DataFrame(lines).to_csv(files[-1], index=False)
    plot = {3: plot_degrees, 4: plot_escapes, 5: plot_betas, 11: plot_fits}
    picture = plot[figure](drawn, finished, budget)
    picture.suptitle(f"{TITLES[figure]}\n{budget}", fontsize=9)
    return files + plots.save_figure(picture, name)


def draw_complete(finished: Finished, folder: Path) -> list[Path]:
    """Every figure of which all runs are finished, over the seeds for which they are;
    the files written."""
    files = []
    for budget in budgets(row.settings for row in finished.rows.values()):
        for figure in FIGURES:
            left = {
                cell.run.recipe.seed
                for cell in cells(figure, budget)
                if cell.run not in finished
            }
            if seeds := tuple(seed for seed in budget.seeds if seed not in left):
                complete = dataclasses.replace(budget, seeds=seeds)
                files += draw(figure, complete, finished, folder)
    return files
