"""Which of several dealers a session is dealt by.

The server names its dealers to each client in an order of its own, and the client takes
the first that it trusts and reaches: a dealer that is gone costs a session nothing but
the time to find that out.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence

from ..errors import MaterialError

DEALERS = 8
_LAST_S = 60.0  # how long a dealer that failed is named last


class Dealers:
    """A server's dealers; each session is named another one first.

    Args:
        addresses: "host:port" of each.
        clock: seconds.
    """

    def __init__(
        self, addresses: Sequence[str], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._addresses = tuple(addresses)
        self._clock = clock
        self._turn = itertools.count()
        self._failed: dict[str, float] = {}
        self._lock = threading.Lock()

    def named(self) -> tuple[str, ...]:
        """All of them in the order that the next client is told."""
        if not self._addresses:
            return ()
        with self._lock:
            first = next(self._turn) % len(self._addresses)
            order = self._addresses[first:] + self._addresses[:first]
            late = self._clock() - _LAST_S
            return tuple(sorted(order, key=lambda a: self._failed.get(a, late) > late))

    def failed(self, address: str) -> None:
        """Name this one last for a while."""
        with self._lock:
            self._failed[address] = self._clock()

    def chosen(self, address: str) -> str:
        """The dealer that a client names; the only one if it names none.

        Raises:
            MaterialError: there is none, or it is not among them.
        """
        if not self._addresses:
            raise MaterialError("The server knows no dealer; start it with dealer=.")
        if address in self._addresses:
            return address
        if not address and len(self._addresses) == 1:
            return self._addresses[0]
        raise MaterialError(
            f"The server deals with {', '.join(self._addresses)}, and not with "
            f"{address or 'a dealer that is not named'}."
        )


def trusted(mine: Sequence[str], named: Sequence[str]) -> list[tuple[str, str]]:
    """What a client may use of the dealers that a server has named, in its order.

    Where both know one dealer it is the same, though they may reach it by different
    names.

    Args:
        mine: addresses of the dealers that the client trusts.
        named: as the server calls its own.

    Returns: what the server calls each, and where the client reaches it.

    Raises:
        MaterialError: there is none.
    """
    if not mine:
        raise MaterialError("No material is left and no dealer is known.")
    if not named:
        raise MaterialError("The server knows no dealer; start it with dealer=.")
    if len(mine) == len(named) == 1:
        return [(named[0], mine[0])]
    found = [(address, address) for address in named if address in mine]
    if not found:
        raise MaterialError(
            f"The server deals with {', '.join(named)}, and this side trusts "
            f"{', '.join(mine)}. Give dealers that both know, by the same addresses."
        )
    return found
