"""What a client learns of one inference."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass(frozen=True)
class Answer:
    """The logits of a batch, and what they took.

    Args:
        logits: float32 (batch, *output_shape).
        seconds: of the online phase.
        sent, received: bytes of the online phase, frame headers included.
        masked: what the server received of the batch, as `inference.masked_input` has
            it; None unless it was asked for.
    """

    logits: torch.Tensor = field(repr=False)
    seconds: float
    sent: int
    received: int
    masked: np.ndarray | None = field(default=None, repr=False)
