"""What each figure shows: points, lines and crosses from outcomes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from .. import plots
from .cells import (
    BETAS,
    BOTH,
    CLIP,
    COARSE,
    DEGREES,
    NEITHER,
    PENALTY,
    TRAINED_FITS,
    TREATED,
    UNTREATED,
    Budget,
    Cell,
)
from .finished import Finished
from .lines import FIT_BITS, fit_errors
from .training import Outcome

ZOOM = 30


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


def plot_degrees(drawn: Sequence[Cell], finished: Finished, budget: Budget) -> Any:
    figure, (axes,) = plots.new_figure(height=4.2)
    groups = _grouped(drawn, finished)
    for index, series in enumerate((TREATED, COARSE, UNTREATED)):
        style = plots.STYLES[index]
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


def plot_escapes(drawn: Sequence[Cell], finished: Finished, budget: Budget) -> Any:
    top = max(max(finished[cell.run].outcome.inputs, default=0.0) for cell in drawn)
    # Where one line dwarfs the others, the others once more by themselves.
    count = 2 if top > ZOOM else 1
    figure, panels = plots.new_figure(height=1.4 + 2.2 * count, panels=count)
    for index, series in enumerate((NEITHER, CLIP, PENALTY, BOTH)):
        colour, _, style = plots.STYLES[(5, 1, 2, 0)[index]]
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


def plot_betas(drawn: Sequence[Cell], finished: Finished, budget: Budget) -> Any:
    figure, panels = plots.new_figure(height=6.0, panels=3)
    groups = _grouped(drawn, finished)
    style = plots.STYLES[0]
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
        _cross(panels[0], beta, 0.06, steps, plots.STYLES[5])
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


def plot_fits(drawn: Sequence[Cell], finished: Finished, budget: Budget) -> Any:
    errors = fit_errors(budget.recipe.radius)
    degrees = list(dict.fromkeys(entry["degree"] for entry in errors))
    figure, panels = plots.new_figure(height=6.2, panels=len(degrees) + 1)
    for axes, degree in zip(panels, degrees, strict=False):
        for index, fit in enumerate(("aware", "rounded", "truncated")):
            colour, marker, style = plots.STYLES[(0, 2, 1)[index]]
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
        style = plots.STYLES[0 if series == "aware" else 1]
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
