"""Rows of the accuracy benchmark: their file, their table, their plot."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import plots
from ..rows import read_rows, write_rows

# What a private network must keep: agreement, and accuracy within 0.2 points.
LEAST_AGREEMENT, MOST_LOST = 0.995, 0.002


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """One network under one system; accuracies are shares of `images`.

    Args:
        model: the file's name; `activation`: polynomial and its degree, or relu.
        system: masked, espn, opened_mask or crypten-relu.
        images, batch: how many, and how many at once.
        clear, private: accuracies; quantised: None but for the masked engine.
        agreement: share of images with the same answer as in the clear.
        max_abs_error: of the logits.
        total_s: both phases, measured per image over loopback.
        wan_s: total_s and the online messages' delay and bytes at 100 ms round trip
            and 100 Mbit/s, predicted.
        precision_bits: of the encoding, see above.
        truncation: local or exact, of CrypTen's protocols.
    """

    model: str
    activation: str
    system: str
    images: int
    batch: int
    clear: float
    quantised: float | None
    private: float
    agreement: float
    max_abs_error: float
    total_s: float
    wan_s: float
    precision_bits: int | None = None
    truncation: str | None = None

    @property
    def holds(self) -> bool:
        """Whether the private network is as good as the one in the clear."""
        lost = abs(self.private - self.clear)
        return self.agreement >= LEAST_AGREEMENT and lost <= MOST_LOST + 1e-9


def write(path: Path, machine: dict[str, Any], rows: Sequence[Accuracy]) -> None:
    """Write the rows to a JSON file, in one step."""
    write_rows(path, machine, rows)


def read(path: Path) -> tuple[dict[str, Any], list[Accuracy]]:
    """The machine and the rows of a JSON file; see `read_rows`."""
    return read_rows(path, Accuracy)


COLUMNS = (
    *("model", "activation", "system", "bits", "images"),
    *("clear", "quantised", "private"),
    *("agree", "error", "s/image", "at 100 ms, 100 Mbit/s"),
)


def cells(row: Accuracy) -> tuple[str, ...]:
    """A row as text, one piece per entry of COLUMNS."""
    return (
        row.model,
        row.activation,
        _system(row),
        "" if row.precision_bits is None else str(row.precision_bits),
        str(row.images),
        f"{row.clear:.2%}",
        "" if row.quantised is None else f"{row.quantised:.2%}",
        f"{row.private:.2%}",
        f"{row.agreement:.2%}",
        f"{row.max_abs_error:.2g}",
        f"{row.total_s:.4f}",
        f"{row.wan_s:.4f}",
    )


def _system(row: Accuracy) -> str:
    return row.system + (" (exact)" if row.truncation == "exact" else "")


def plot(rows: Sequence[Accuracy], stem: Path) -> list[Path]:
    """Private accuracy against seconds per image; the files written.

    A colour for each network, a marker for each system; hollow: 12 bits or fewer.
    """
    figure, (axes,) = plots.new_figure()
    systems = list(dict.fromkeys(_system(row) for row in rows))
    models = list(dict.fromkeys(row.model for row in rows))
    for row in rows:
        colour = plots.STYLES[models.index(row.model)][0]
        coarse = row.precision_bits is not None and row.precision_bits <= 12
        axes.plot(
            [row.total_s],
            [100 * row.private],
            color=colour,
            marker=plots.STYLES[systems.index(_system(row))][1],
            markerfacecolor="white" if coarse else colour,
            linestyle="none",
            markersize=6,
        )
    entries = [("s", plots.STYLES[i][0], name) for i, name in enumerate(models)]
    entries += [(plots.STYLES[i][1], "#444444", name) for i, name in enumerate(systems)]
    for marker, colour, name in entries:
        axes.plot([], [], marker, color=colour, label=name, markersize=5)
    axes.set(
        xscale="log",
        xlabel="seconds per image, both phases, loopback (log); hollow: 12 bits",
        ylabel="private accuracy, %",
        title=f"{rows[0].images} images",
    )
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.margins(x=0.1, y=0.1)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return plots.save_figure(figure, stem)
