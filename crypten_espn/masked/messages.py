"""What a party's part of a protocol asks its driver to do.

A protocol is written as one generator for each party, without sockets: it yields what
it sends and what it waits for, and `drivers` decides where messages travel.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar

import numpy as np

from ..wire.packing import packed_bytes

SERVER: Final = "server"
CLIENT: Final = "client"
DEALER: Final = "dealer"

# Of the two that compute. One of them receives the dealer's corrections, the other
# draws its shares from its seed: a choice of each session.
Party = Literal["server", "client"]


# Messages that a driver may still have to write while the next one is made: a layer's
# two, of which one is short.
AHEAD: Final = 2


@dataclass(frozen=True)
class Send:
    """One message of ring elements; each part is an array and the bits of its ring.

    The arrays may be read while the sender makes the next `AHEAD` messages: it leaves
    them as they are until the last of these is on its way.
    """

    to: str
    parts: tuple[tuple[np.ndarray, int], ...]

    @property
    def payload(self) -> int:
        return sum(packed_bytes(array.size, bits) for array, bits in self.parts)


@dataclass(frozen=True)
class Receive:
    """Wait for one message; each part is a number of elements and their bits.

    The driver answers with the parts' elements, flat: in `out` if it is given, as
    `wire.packing.unpack` takes them, in new arrays otherwise.
    """

    of: str
    parts: tuple[tuple[int, int], ...]
    out: tuple[np.ndarray, ...] | None = None


@dataclass(frozen=True)
class Tell:
    """Tell the other party 32 bytes that it compares with its own."""

    to: str
    digest: bytes


@dataclass(frozen=True)
class Compare:
    """Wait for what the other party tells; other bytes end in a MaterialError."""

    of: str
    digest: bytes


Event = Send | Receive | Tell | Compare


T = TypeVar("T")
Protocol = Generator[Event, Any, T]


def send(to: str, array: np.ndarray, bits: int) -> Send:
    """A message of one part."""
    return Send(to, ((array, bits),))


def receive(of: str, count: int, bits: int) -> Receive:
    """Wait for a message of one part."""
    return Receive(of, ((count, bits),))
