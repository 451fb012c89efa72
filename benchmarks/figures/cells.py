"""What is in each figure: its series, and the run behind every point."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from crypten_espn.pillar.recipes import Recipe, find_recipe

from .polynomials import REAL_BITS, polynomial
from .training import FOLLOWED, Run

FIGURES = (3, 4, 5, 11)
DEGREES = range(2, 10)
ESCAPING_DEGREE = 6
BETAS = tuple(10.0**-k for k in range(1, 9))
# (degree, bits) at which figure 11 trains; bits over which it compares fits.
TRAINED_FITS = ((4, 8), (4, 10), (6, 12), (6, 14))
FINE_BITS = 20  # at which no degree up to 9 loses its top coefficient


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


def budgets(finished: Iterable[Mapping[str, Any]]) -> list[Budget]:
    """What was trained, by the settings of finished runs: budgets with all seeds."""
    seeds: dict[tuple[Any, ...], set[int]] = {}
    shared = [name for name in FOLLOWED if name not in ("beta", "seed")]
    for settings in finished:
        key = (settings["images"], *(settings[name] for name in shared))
        seeds.setdefault(key, set()).add(settings["seed"])
    base = find_recipe("fashion-convnet")
    return [
        Budget(
            dataclasses.replace(base, **dict(zip(shared, values, strict=True))),
            images,
            tuple(sorted(some)),
        )
        for (images, *values), some in seeds.items()
    ]
