"""Rows as aligned text, and as frames: what CSV files and documents are made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pandas

from .rows import COMPACT, MASKED, PLAIN, Results, Row

STAMP = ("commit", "date", "processor")
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
    """Machine line, one line per row, one per skipped cell; the limit where known."""
    lines = [machine_line(results.machine)]
    lines.append(columns([COLUMNS, *map(cells, results.rows)], left=3))
    for cell in results.skipped:
        name = f"{cell.network}  {cell.model}  {cell.activation}  {cell.engine}"
        lines.append(f"skipped: {name}: {cell.reason}")
    return "\n".join([*lines, *limits(results.rows)])


def limits(rows: Sequence[Row]) -> list[str]:
    """The masked engine online over loopback beside plaintext torch in the same run."""
    lines = []
    for row in rows:
        if row.activation not in (MASKED, COMPACT) or row.network != "loopback":
            continue
        here = (row.model, row.network, row.batch)
        plain = {
            one.engine: one.online_s.median
            for one in rows
            if one.activation == PLAIN and (one.model, one.network, one.batch) == here
        }
        if plain:
            private, fastest = row.online_s.median, min(plain, key=plain.__getitem__)
            ratios = [
                f"{private / plain[engine]:.2f} times {engine}"
                for engine in dict.fromkeys((*list(plain)[:1], fastest))
            ]
            lines.append(
                f"{row.model}: {row.activation} online is {' and '.join(ratios)}"
            )
    return lines


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


def frame(results: Results) -> pandas.DataFrame:
    """A line for each row: its fields, system and both parties' bytes, and the stamp.

    A spread is its median, under the field's name; what else it holds has a suffix:
    online_s_min, online_s_max, online_s_low, online_s_high.
    """
    return stamped([_flat(row) for row in results.rows], results.machine)


def stamped(
    lines: Sequence[Mapping[str, Any]], machine: Mapping[str, Any]
) -> pandas.DataFrame:
    """Lines as a frame, with the commit, date and processor that they come from."""
    return pandas.DataFrame(lines).assign(**{name: machine[name] for name in STAMP})


def _flat(row: Row) -> dict[str, Any]:
    line = dataclasses.asdict(row)
    for name in ("online_s", "offline_s", "total_s"):
        spread = line.pop(name)
        low, high = spread["ci95"]
        line[name] = spread["median"]
        ends = {"min": spread["min"], "max": spread["max"], "low": low, "high": high}
        line.update({f"{name}_{end}": value for end, value in ends.items()})
    line["bytes_sent_0"], line["bytes_sent_1"] = line.pop("bytes_sent")
    sent = sum(row.bytes_sent)
    return {**line, "runs": row.online_s.repeats, "system": row.system, "sent": sent}
