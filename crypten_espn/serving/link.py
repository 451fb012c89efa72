"""What is told once to a party: how it reaches the others, and what it puts up with."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from ..errors import LimitError
from ..masked.checks import PLAN_BYTES
from ..masked.messages import Party
from ..wire.tls import TLS
from .dealers import DEALERS

TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Link:
    """How a party reaches the others and where it keeps what they prepare.

    Args:
        dealer: "host:port" of the dealer, or of several, of which each session has
            one: a server names those it works with, a client those it trusts, by the
            same addresses. None where none is needed.
        directory: folder for prepared material; in memory if None.
        tls: this party's certificates, or None.
        timeout: seconds the other side may be silent while something is under way.
        insecure: allow connections that leave this machine without TLS; seeds and
            masked values then travel in the clear.
        corrections: who must receive the dealer's, "server" or "client". None leaves it
            open: a client then asks for the server, a server takes what a client asks.
    """

    dealer: str | Sequence[str] | None = None
    directory: str | os.PathLike[str] | None = None
    tls: TLS | None = None
    timeout: float = TIMEOUT_S
    insecure: bool = False
    corrections: Party | None = None

    def __post_init__(self) -> None:
        if self.corrections not in (None, *get_args(Party)):
            raise ValueError(
                f"corrections={self.corrections!r} was given; give 'server' or 'client'"
            )
        if len(self.dealers) > DEALERS:
            raise ValueError(
                f"{len(self.dealers)} dealers were given; at most {DEALERS} are allowed"
            )

    @property
    def dealers(self) -> tuple[str, ...]:
        """The addresses of all dealers."""
        if self.dealer is None:
            return ()
        return (self.dealer,) if isinstance(self.dealer, str) else tuple(self.dealer)


def one_link(  # noqa: PLR0913 - a link's fields, as a user may give them
    link: Link | None,
    dealer: str | Sequence[str] | None,
    directory: str | os.PathLike[str] | None,
    tls: TLS | None,
    timeout: float | None,
    insecure: bool,
    corrections: Party | None,
) -> Link:
    """The link that was given, whole or field by field, and not both.

    Raises:
        TypeError: both were given.
    """
    if link is None:
        seconds = TIMEOUT_S if timeout is None else timeout
        return Link(dealer, directory, tls, seconds, insecure, corrections)
    fields = (dealer, directory, tls, timeout, insecure, corrections)
    if fields != (None, None, None, None, False, None):
        raise TypeError(
            "give link=, or dealer=, directory=, tls=, timeout=, insecure= and "
            "corrections=, not both"
        )
    return link


def check_positive(limits: object) -> None:
    """Refuse a dataclass of limits of which one is not above 0.

    Raises:
        ValueError: it names the limit.
    """
    for name, value in vars(limits).items():
        if value <= 0:
            raise ValueError(f"{name}={value} was given; a limit must be positive")


@dataclass(frozen=True)
class Limits:
    """What a server or a dealer accepts; what exceeds it is refused by name.

    Args:
        connections: connections that were greeted.
        greeting: connections not yet greeted; the oldest makes room for a newer one.
        handshake_s: seconds from accepting a connection to the end of its greeting.
        idle_s: seconds a connection may ask for nothing.
        waiting: clients that wait at the dealer; the oldest makes room for a newer one.
        waiting_s: seconds a client may wait there for its server.
        count: inferences in one order.
        batch: inputs in one inference.
        prepared: inferences of one session that are prepared and not used.
        material_bytes: material of all sessions that a server holds in memory; at the
            dealer the masks of all pairs' weights, and the material of an inference.
        plan_bytes: length of a plan.
        message_bytes: length of any other message that is no ring elements.
        grace_s: seconds that what is under way may still take once it is told to stop.
    """

    connections: int = 256
    greeting: int = 64
    handshake_s: float = 10.0
    idle_s: float = 3600.0
    waiting: int = 64
    waiting_s: float = 60.0
    count: int = 4096
    batch: int = 1024
    prepared: int = 16384
    material_bytes: int = 8 << 30
    plan_bytes: int = PLAN_BYTES
    message_bytes: int = 4096
    grace_s: float = 30.0

    def __post_init__(self) -> None:
        check_positive(self)

    def check_order(self, *, start: int, count: int, batch: int) -> None:
        """Check a wish for inferences before anything is prepared for it.

        Raises:
            LimitError: too many inferences, inputs, or a number that has no index.
        """
        for limit, what, given, most in (
            ("count", "inferences were asked for in one order", count, self.count),
            ("batch", "inputs in one inference were asked for", batch, self.batch),
        ):
            if given > most:
                raise LimitError(f"{given} {what}; at most {most} are allowed.", limit)
        if start + count > 1 << 32:
            raise LimitError(
                f"Inferences {start} to {start + count - 1} were asked for; a session "
                f"has {1 << 32}. Connect again to start a new one.",
                "index",
            )

    def check_bytes(self, size: int, *, held: int = 0) -> None:
        """Check what material would take, before anything is allocated for it.

        Raises:
            LimitError: it would take more than `material_bytes`.
        """
        if held + size > self.material_bytes:
            raise LimitError(
                f"Material of {size:,} bytes was asked for beside {held:,} already "
                f"held; at most {self.material_bytes:,} are allowed. Ask for fewer "
                "inferences, or smaller batches.",
                "material_bytes",
            )
