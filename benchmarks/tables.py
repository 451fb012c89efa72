"""Rows as aligned text and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from .rows import FIELDS, Results, Row, Spread

COLUMNS = (
    "network",
    "model",
    "system",
    "batch",
    "rounds",
    "sent MB",
    "runs",
    "online s",
    "95 %",
    "offline s",
    "total s",
    "offline MB",
    "error",
    "agree",
)


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, one piece per entry of COLUMNS."""
    low, high = row.online_s.ci95
    agree = row.argmax_agreement
    return (
        row.network,
        row.model,
        row.system,
        str(row.batch),
        str(row.rounds),
        f"{sum(row.bytes_sent) / 1e6:.3f}",
        str(row.online_s.repeats),
        f"{row.online_s.median:.4f}",
        f"{low:.4f} to {high:.4f}",
        f"{row.offline_s.median:.4f}",
        f"{row.total_s.median:.4f}",
        f"{row.offline_bytes / 1e6:.3f}",
        f"{row.max_abs_error:.2g}",
        "" if agree is None else f"{agree:.3f}",
    )


def table(results: Results) -> str:
    """Machine line, one line per row, one per skipped cell."""
    lines = [machine_line(results.machine)]
    lines.append(columns([COLUMNS, *map(cells, results.rows)], left=3))
    for cell in results.skipped:
        name = f"{cell.network}  {cell.model}  {cell.activation}  {cell.engine}"
        lines.append(f"skipped: {name}: {cell.reason}")
    return "\n".join(lines)


def columns(lines: Sequence[Sequence[str]], *, left: int) -> str:
    """Lines of pieces as aligned text; the first `left` columns to the left."""
    # Importing the package takes seconds; a comparison of two files prints no table.
    from crypten_espn.table import aligned

    return "\n".join(aligned(lines, left=left))


def machine_line(header: Mapping[str, Any]) -> str:
    """The machine header in one line."""
    return (
        f"{header['processor']}, {header['cores']} cores, torch {header['torch']}, "
        f"commit {header['commit']}, {header['date']}"
    )


def to_csv(results: Results) -> str:
    """Rows as CSV text: the fields of Row, spreads as five columns, commit and date."""
    stamp = {name: results.machine[name] for name in ("commit", "date", "processor")}
    return csv_text([{**_flat(row), **stamp} for row in results.rows])


def csv_text(lines: Sequence[Mapping[str, object]]) -> str:
    """Lines with the same keys as CSV text; None is empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _flat(row: Row) -> dict[str, object]:
    line: dict[str, object] = {}
    for field in FIELDS:
        value = getattr(row, field.name)
        if isinstance(value, Spread):
            figures = (value.median, value.min, value.max, *value.ci95)
            ends = ("", "_min", "_max", "_low", "_high")
            for end, figure in zip(ends, figures, strict=True):
                line[field.name + end] = f"{figure:.6g}"
        elif isinstance(value, tuple):
            line.update({f"{field.name}_{rank}": v for rank, v in enumerate(value)})
        else:
            line[field.name] = value
    line["runs"] = row.online_s.repeats
    return line
