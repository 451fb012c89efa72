"""What changed between two runs: rounds and bytes, and how far medians moved."""

from __future__ import annotations

from pathlib import Path

from .rows import Results, ResultsError


def compare(old: Results, new: Results) -> tuple[list[str], list[str]]:
    """What changed on the wire between two runs, and which cells are in one only.

    Args:
        old, new: results; rows are matched by model, protocol, engine, network, batch.
    Returns: (changes in rounds or bytes, cells without a counterpart), one line each.
    Raises: ResultsError when no cell is in both.
    """
    before = {row.key: row for row in old.rows}
    after = {row.key: row for row in new.rows}
    common = [key for key in before if key in after]
    if not common:
        raise ResultsError("the two files have no cell in common; nothing to compare")
    changes = []
    for key in common:
        for name in ("rounds", "bytes_sent", "offline_bytes"):
            was, now = getattr(before[key], name), getattr(after[key], name)
            if was != now:
                cell = " ".join(map(str, key))
                changes.append(f"{cell}: {name} was {was}, is {now}")
    lonely = [f"only in the old run: {k}" for k in before if k not in after]
    lonely += [f"only in the new run: {k}" for k in after if k not in before]
    return changes, lonely


# Medians of two runs on a quiet machine are this close, as a share of the older one.
QUIET = 0.15


def drift(old: Results, new: Results) -> list[tuple[str, float]]:
    """How far each cell's online median moved, new / old - 1; far ones first."""
    before = {row.key: row.online_s.median for row in old.rows}
    moved = [
        (" ".join(map(str, row.key)), row.online_s.median / before[row.key] - 1)
        for row in new.rows
        if row.key in before
    ]
    return sorted(moved, key=lambda cell: -abs(cell[1]))


def report_comparison(old: str | Path, new: Results) -> int:
    """Print the comparison with the file `old`; 1 if anything on the wire changed.

    Medians that moved by more than `QUIET` are shown, and are no failure: time is the
    machine's.
    """
    before = Results.read(old)
    changes, lonely = compare(before, new)
    for line in lonely:
        print(line)
    moved = drift(before, new)
    far = [f"{cell}: {share:+.0%}" for cell, share in moved if abs(share) > QUIET]
    for line in far:
        print(f"slower or faster: {line}")
    print(f"online medians: {len(moved) - len(far)} of {len(moved)} within {QUIET:.0%}")
    for line in changes:
        print(f"CHANGED {line}")
    if not changes:
        print(f"rounds and bytes are those of {old}")
    return int(bool(changes))
