"""Inputs of any number by inferences of a batch each, of whatever was prepared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Protocol

import torch

from .answer import Answer


class Asks(Protocol):
    """What answers a batch: a `Client`, or a `Supply`."""

    @property
    def next_batch(self) -> int | None:
        """Inputs that the next prepared inference is for; None if none is."""

    def ask(self, x: object, *, force: bool = False, show: bool = False) -> Answer:
        """The answer to a batch."""


def answers(
    client: Asks,
    count: int,
    load: Callable[[int, int], torch.Tensor],
    *,
    size: int,
    force: bool = False,
    show: bool = False,
) -> Iterator[Answer]:
    """Answer `count` inputs, a batch after the other.

    Of the size asked for, but where prepared material is for another: a last batch that
    is shorter than its material is filled up with its last input.

    Args:
        client: who is asked.
        count: inputs.
        load: gives inputs `start` to `end`, (end - start, *input_shape).
        size: of a batch.
        force, show: as `Client.ask`.

    Raises: as `Client.predict`.
    """
    start = 0
    while start < count:
        prepared = client.next_batch
        end = min(count, start + (prepared or size))
        x = load(start, end)
        missing = (prepared or len(x)) - len(x)
        if missing:
            x = torch.cat([x, x[-1:].expand(missing, *x.shape[1:])])
        found = client.ask(x, force=force, show=show)
        masked = None if found.masked is None else found.masked[: end - start]
        yield replace(found, logits=found.logits[: end - start], masked=masked)
        start = end
