"""Plots that every benchmark shares, styled for print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .rows import Row, Spread

# Told apart in black and white by marker and line as well as by colour.
STYLES: Sequence[tuple[str, str, Any]] = (
    ("#0b559f", "o", "-"),
    ("#c8500b", "s", "--"),
    ("#1b7837", "^", "-."),
    ("#6a3d9a", "D", ":"),
    ("#444444", "v", (0, (5, 1))),
    ("#b2182b", "P", (0, (3, 1, 1, 1))),
    ("#0d8a8a", "X", (0, (1, 1))),
    ("#8c510a", "*", (0, (6, 2, 1, 2))),
)


def new_figure(
    *, width: float = 6.0, height: float = 3.8, panels: int = 1
) -> tuple[Any, list[Any]]:
    """A matplotlib figure and its panels, styled for print; needs no display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.hashsalt": "crypten-espn", "font.size": 9})
    figure, grid = pyplot.subplots(
        panels, figsize=(width, height), layout="constrained", squeeze=False
    )
    for axes in grid[:, 0]:
        axes.grid(True, color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure, list(grid[:, 0])


def plot_lines(
    stem: Path,
    series: Mapping[str, Sequence[tuple[float, Spread]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_y: bool = False,
) -> list[Path]:
    """Medians with their 95 % intervals against x, one line per entry of `series`.

    Returns: the PNG and SVG files written beside `stem`.
    """
    figure, (axes,) = new_figure()
    for index, (name, points) in enumerate(series.items()):
        colour, marker, line = STYLES[index % len(STYLES)]
        xs = [x for x, _ in points]
        axes.plot(
            xs,
            [spread.median for _, spread in points],
            label=name,
            color=colour,
            marker=marker,
            linestyle=line,
            markersize=4,
        )
        low, high = zip(*(spread.ci95 for _, spread in points), strict=True)
        axes.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    if log_y:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return save_figure(figure, stem)


def plot_dots(rows: Sequence[Row], stem: str | Path) -> list[Path]:
    """Online seconds of every protocol, a panel per model, a figure per network.

    Filled: over the direct channel. Hollow: over gloo.

    Returns: the PNG and SVG files written beside `stem`.
    """
    files = []
    stem = Path(stem)
    for network in dict.fromkeys(row.network for row in rows):
        chosen = [row for row in rows if row.network == network]
        models = list(dict.fromkeys(row.model for row in chosen))
        names = list(dict.fromkeys(row.activation for row in chosen))[::-1]
        height = 0.9 + len(models) * (0.3 + 0.26 * len(names))
        figure, panels = new_figure(height=height, panels=len(models))
        for axes, model in zip(panels, models, strict=True):
            for row in chosen:
                if row.model == model:
                    _dot(axes, row, names.index(row.activation))
            axes.set(xscale="log", title=model, ylim=(-0.6, len(names) - 0.4))
            axes.set_yticks(range(len(names)), names)
            axes.tick_params(left=False)
            axes.margins(x=0.12)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.xaxis.set_minor_formatter(lambda value, _: "")
        panels[-1].set_xlabel("seconds online (log); filled: direct, hollow: gloo")
        figure.suptitle(network, fontsize=10)
        slug = "".join(c if c.isalnum() else "-" for c in network).strip("-")
        files += save_figure(figure, stem.with_name(f"{stem.name}-{slug}"))
    return files


def _dot(axes: Any, row: Row, at: int) -> None:
    colour = STYLES[0][0] if row.engine == "masked" else "#333333"
    hollow = row.engine.endswith("+gloo")
    spread = row.online_s
    axes.plot(spread.ci95, (at, at), color=colour, linewidth=1)
    axes.plot(
        [spread.median],
        [at],
        marker="o",
        color=colour,
        markersize=5.5,
        markerfacecolor="white" if hollow else colour,
    )
    axes.annotate(
        f"{spread.median:.3g}",
        (spread.median, at),
        xytext=(0, 5),
        textcoords="offset points",
        fontsize=6.5,
        ha="center",
    )


def save_figure(figure: Any, stem: Path) -> list[Path]:
    """Write `stem`.png and `stem`.svg and close the figure; the files written."""
    from matplotlib import pyplot

    stem.parent.mkdir(parents=True, exist_ok=True)
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    figure.savefig(files[0], dpi=200)
    figure.savefig(files[1], metadata={"Date": None})
    pyplot.close(figure)
    return files
