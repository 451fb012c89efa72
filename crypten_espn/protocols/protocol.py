"""What a protocol for polynomial activations is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..cost import Cost
from ..polynomial import Form


@dataclass(frozen=True)
class Protocol:
    """One way to evaluate a polynomial on shares, with its declared cost.

    Args:
        name: what users call it.
        evaluate: (share of X, share of P, form) to a share of the polynomial modulo
            2**64; truncation is not its business.
        cost: declared cost of `evaluate` for one party, from form and elements.
        stored_words: ring elements a party keeps prepared for one activation of a
            degree.
        most_parties: how many it runs with; None for any number. Two always work.
    """

    name: str
    evaluate: Callable[[torch.Tensor, torch.Tensor, Form], torch.Tensor]
    cost: Callable[[Form, int], Cost]
    stored_words: Callable[[int], int]
    most_parties: int | None = None

    def accepts(self, world_size: int) -> bool:
        """Whether the protocol runs with this many parties."""
        if self.most_parties is None:
            return world_size >= 1
        return world_size == self.most_parties

    @property
    def world_sizes(self) -> str:
        """The numbers of parties, in words."""
        if self.most_parties is None:
            return "any number of parties"
        return f"exactly {self.most_parties}"
