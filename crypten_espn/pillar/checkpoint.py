"""The state of a run and its log as files, each replaced in one step."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError

COLUMNS = (
    "epoch",
    "steps",
    "learning_rate",
    "loss",
    "penalty",
    "train_accuracy",
    "validation_accuracy",
    "largest_input",
    "seconds",
)

State = dict[str, Any]  # of a run, as its trainer names the parts


def write_state(folder: Path, state: Mapping[str, object]) -> None:
    """Write state.pt; the disk has it when this returns."""
    temporary = folder / "state.pt.part"
    with open(temporary, "wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / "state.pt")


def read_state(folder: Path, *, identity: str, device: torch.device) -> State | None:
    """Return what state.pt holds, None if there is none.

    Args:
        folder: of the run.
        identity: the run's own, as text.
        device: where its tensors go.

    Raises:
        CheckpointError: it is damaged, or of a run of another identity.
    """
    path = folder / "state.pt"
    if not path.exists():
        return None
    try:
        state: State = torch.load(path, map_location=device, weights_only=True)
        found = state["identity"]
    except Exception as error:  # torch.load raises many kinds
        raise CheckpointError(
            f"{path} cannot be read ({error}); remove it to start again"
        ) from error
    if found != identity:
        raise CheckpointError(
            f"{path} is of another run: {found}; use another folder as --out, or "
            "remove the file to start again"
        )
    return state


def write_log(folder: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Write log.csv: a line of COLUMNS for each epoch."""
    temporary = folder / "log.csv.part"
    with open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {k: v if isinstance(v, int) else f"{v:.6g}" for k, v in row.items()}
            )
    os.replace(temporary, folder / "log.csv")
