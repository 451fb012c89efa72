"""Inferences prepared in the background while others are used: two clients in turns.

One client answers from what it holds. Once that falls to the low-water mark, a thread
prepares with the other one, over a connection and in a session of its own; the two
change places when the first is used up. Each keeps its dealer, so that the server's
masked weights travel twice in all, and neither ever holds the other's material.

At the server these are two sessions of one client: it stores and answers them as any,
and what it holds is topped up with what the client holds.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from pathlib import Path

from ..bundle import Description
from ..errors import EspnError
from ..masked.plan import Plan
from .answer import Answer
from .boundary import told, traced
from .client import Client, connect
from .events import TopUpFailed, report
from .link import Link

log = logging.getLogger(__name__)

ATTEMPTS = 8
_LONGEST_S = 60.0
_END_S = 5.0  # for a preparation under way when its supply is closed


class Supply:
    """A client whose material is topped up in the background.

    What is missing all the same is prepared when it is needed, as by `Client`. For one
    asking thread; `ask` and `keep` take turns.

    Args:
        address: "host:port" of the server.
        link: how to reach it and the dealer, and where material is kept: in a folder
            for each of the two clients.
        ahead: inferences prepared at a time.
        low: the mark: so many left, or fewer, and the other client prepares.
        batch: inputs in each.
        pause_s: before the second attempt; each further pause is twice as long, up to
            a minute. After `ATTEMPTS` in a row nothing is tried until the next input.

    Attributes:
        plan, description: the server's.

    Raises:
        PeerError, MaterialError: as `connect`.
        ValueError: `ahead` is below 1, or `low` not between 0 and `ahead`.
    """

    def __init__(
        self,
        address: str,
        link: Link,
        *,
        ahead: int,
        low: int,
        batch: int = 1,
        pause_s: float = 1.0,
    ) -> None:
        if not 0 <= low <= ahead or ahead < 1:
            raise ValueError(
                f"ahead={ahead} and low={low} were given; 1 or more are prepared at a "
                "time, and the mark is between 0 and that"
            )
        self._address, self._link, self._pause = address, link, pause_s
        self._ahead, self._low, self._batch = ahead, low, batch
        self._asking = threading.Lock()
        self._front = self._connect(0)
        try:
            self._front.check_kept()
            self._back = self._connect(1)
        except BaseException:
            self._front.close()
            raise
        # What the filling thread goes by; the clients' own state is their user's.
        self._change = threading.Condition()
        self._left = self._front.remaining
        self._filled = self._back.remaining > 0
        self._asked = self._closing = False
        self._filling = threading.Thread(target=self._fill, daemon=True)
        self._filling.start()

    @property
    def plan(self) -> Plan:
        """The server's."""
        return self._front.plan

    @property
    def description(self) -> Description:
        """What the server says of images and classes."""
        return self._front.description

    @property
    def next_batch(self) -> int | None:
        """Inputs that the next prepared inference is for; None if none is prepared."""
        with self._asking:
            self._turn()
            return self._front.next_batch

    def ask(self, x: object, *, force: bool = False, show: bool = False) -> Answer:
        """As `Client.ask`.

        Cost, Error, Raises: as `Client.ask`.
        """
        with self._asking:
            self._turn()
            try:
                return self._front.ask(x, force=force, show=show)
            finally:
                self._note(asked=True)

    def keep(self) -> None:
        """As `Client.keep`, of the client that answers next.

        Raises:
            PeerError: as `Client.keep`.
        """
        with self._asking:
            self._turn()
            try:
                self._front.keep()
            finally:
                self._note()

    def close(self) -> None:
        """Say goodbye; a preparation under way is given some seconds."""
        with self._change:
            self._closing = True
            self._change.notify_all()
        self._filling.join(_END_S)
        with self._asking:
            self._front.close()

    def __enter__(self) -> Supply:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _connect(self, number: int) -> Client:
        link = self._link
        if link.directory is not None:
            link = replace(link, directory=Path(link.directory) / str(number))
        return connect(self._address, link=link)

    def _turn(self) -> None:
        """Let the client that was filled answer, once the other is used up."""
        if self._front.remaining:
            return
        with self._change:
            if self._filled:
                self._front, self._back = self._back, self._front
                self._filled, self._left = False, self._front.remaining
                self._change.notify_all()

    def _note(self, *, asked: bool = False) -> None:
        left = self._front.remaining
        with self._change:
            self._left = left
            self._asked |= asked
            self._change.notify_all()

    # -- the filling thread: `_back` is its own while it is not filled

    def _fill(self) -> None:
        failures = 0
        while self._wait(failures):
            try:
                self._prepare()
            except BaseException as error:
                failures = failures % ATTEMPTS + 1
                reason = told(error) if isinstance(error, EspnError) else traced(error)
                wait = self._wait_s(failures)
                report(log, TopUpFailed(failures, ATTEMPTS, wait, reason))
                self._back.close()
            else:
                failures = 0
                with self._change:
                    self._filled = True
        self._back.close()

    def _prepare(self) -> None:
        if not self._back.remaining:
            self._back.prepare(self._ahead, batch=self._batch)

    def _wait_s(self, failures: int) -> float:
        """The pause after so many failures; 0 for one that ends with the next input."""
        if failures == ATTEMPTS:
            return 0.0
        return min(_LONGEST_S, self._pause * 2.0 ** (failures - 1))

    def _wait(self, failures: int) -> bool:
        """Wait until something is to be prepared; False if nothing is any more."""
        with self._change:
            self._asked = False
            if failures == ATTEMPTS:
                self._change.wait_for(lambda: self._asked or self._closing)
            elif failures:
                self._change.wait_for(lambda: self._closing, self._wait_s(failures))
            self._change.wait_for(
                lambda: self._closing or (not self._filled and self._left <= self._low)
            )
            return not self._closing
