"""The CSV files behind the figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from .cells import TRAINED_FITS, Cell
from .finished import Finished, Row
from .polynomials import polynomial
from .training import Outcome

FIT_BITS = range(6, 17)


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
