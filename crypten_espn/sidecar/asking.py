"""Requests of any number of threads, asked one after the other of one server."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Protocol

import torch

from ..bundle import Description
from ..errors import (
    ClosingError,
    EspnError,
    LimitError,
    PeerError,
    PlanMismatchError,
)
from ..masked.plan import Plan
from ..serving.answer import Answer
from ..serving.boundary import FINAL, REFUSALS, told, traced
from ..serving.events import PlanChanged, Reachable, Repeated, Unreachable, report
from ..serving.filling import Asks, answers

log = logging.getLogger(__name__)

_TICK_S = 1.0


class Keeps(Asks, Protocol):
    """What answers, and connects again: a `Client`, or a `Supply`."""

    @property
    def plan(self) -> Plan:
        """The server's."""

    @property
    def description(self) -> Description:
        """What the server says of images and classes."""

    def keep(self) -> None:
        """Connect again if the connection was lost."""

    def close(self) -> None:
        """Say goodbye."""


class _Job:
    def __init__(self, x: torch.Tensor, show: bool) -> None:
        self.x, self.show = x, show
        self.future: Future[Answer] = Future()


class Queue:
    """Asks for what threads put into it, in their order, by a thread of its own.

    Inputs of several requests that wait make one batch. A request whose connection
    broke is asked for once more: with new material and under new masks, so that the
    server learns nothing from it. While nothing is asked for, a lost connection is made
    again. A server that has another network by now is connected to anew.

    Args:
        connect: makes who is asked, here and where the server's plan has changed; for
            this queue alone, which closes it.
        size: inputs of one inference, where no material for another number is there.
        waiting: requests that may wait.

    Attributes:
        served: plan and description of the server's network, as it is now.
    """

    def __init__(
        self, connect: Callable[[], Keeps], *, size: int, waiting: int
    ) -> None:
        self._connect, self._size, self._waiting = connect, size, waiting
        self._client = connect()
        self.served = self._client.plan, self._client.description
        self._jobs: deque[_Job] = deque()
        self._change = threading.Condition()
        self._closing = False
        self._reachable = True
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether the server was reachable when it was last asked."""
        return self._reachable and not self._closing

    def put(self, x: torch.Tensor, *, show: bool = False) -> Future[Answer]:
        """Ask for a batch of inputs that are known to be good.

        Args:
            x: (batch, *input_shape).
            show: keep what the server received of it.

        Returns: the answer to come, or what `Client.predict` raises.

        Raises:
            LimitError: too many wait.
            ClosingError: it is closed.
        """
        job = _Job(x, show)
        with self._change:
            if self._closing:
                raise _closing()
            if len(self._jobs) >= self._waiting:
                raise LimitError(
                    f"{self._waiting} requests wait already; try again later.",
                    "waiting",
                )
            self._jobs.append(job)
            self._change.notify()
        return job.future

    def close(self) -> None:
        """Finish what is under way; what waits is refused."""
        with self._change:
            self._closing = True
            left = list(self._jobs)
            self._jobs.clear()
            self._change.notify()
        for job in left:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(_closing())
        self._thread.join()
        self._client.close()

    # -- the asking thread

    def _run(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._jobs or self._closing, _TICK_S)
                jobs = self._next()
                if not jobs and self._closing:
                    return
            if jobs:
                self._do(jobs)
            else:
                self._keep()

    def _next(self) -> list[_Job]:
        """The oldest job, and those behind it that one inference takes too."""
        jobs: list[_Job] = []
        room = self._size
        while self._jobs and (not jobs or len(self._jobs[0].x) <= room):
            if jobs and (self._jobs[0].show or jobs[0].show):
                break
            job = self._jobs.popleft()
            if job.future.set_running_or_notify_cancel():
                jobs.append(job)
                room -= len(job.x)
        return jobs

    def _do(self, jobs: list[_Job]) -> None:
        try:
            found = self._ask(torch.cat([job.x for job in jobs]), jobs[0].show)
        except BaseException as error:
            for job in jobs:
                job.future.set_exception(error)
            return
        start = 0
        for job in jobs:
            logits = found.logits[start : start + len(job.x)]
            job.future.set_result(replace(found, logits=logits))
            start += len(job.x)

    def _ask(self, x: torch.Tensor, show: bool) -> Answer:
        """The answer to all inputs together."""
        try:
            try:
                return self._once(x, show)
            except PlanMismatchError:
                self._begin_anew()
            except PeerError as error:
                if isinstance(error, FINAL):
                    raise
                report(log, Repeated(len(x), told(error)))
            return self._once(x, show)
        except EspnError as error:
            self._note(error)
            raise

    def _begin_anew(self) -> None:
        """Connect to a server whose network takes or gives other shapes by now.

        Raises:
            PeerError, MaterialError: it cannot be reached, or a folder holds material
                for the plan before.
        """
        self._client.close()
        self._client = self._connect()

    def _once(self, x: torch.Tensor, show: bool) -> Answer:
        parts = list(
            answers(
                self._client,
                len(x),
                lambda start, end: x[start:end],
                size=self._size,
                show=show,
            )
        )
        self._note(None)
        return Answer(
            torch.cat([part.logits for part in parts]),
            sum(part.seconds for part in parts),
            sum(part.sent for part in parts),
            sum(part.received for part in parts),
            parts[0].masked,
        )

    def _keep(self) -> None:
        try:
            try:
                self._client.keep()
            except PlanMismatchError:
                self._begin_anew()
        except EspnError as error:
            self._note(error)
        except Exception as error:
            log.error("cannot look after the connection: %s", traced(error))
        else:
            self._note(None)

    def _note(self, error: EspnError | None) -> None:
        """Remember what is served, and whether it is there; log what changed."""
        there = not isinstance(error, PeerError) or isinstance(error, REFUSALS)
        before, self._reachable = self._reachable, there
        now, was = self._client.plan, self.served[0]
        self.served = now, self._client.description
        if now is not was and now != was:
            report(log, PlanChanged(was.digest.hex()[:16], now.digest.hex()[:16]))
        if before and error is not None and not there:
            report(log, Unreachable(told(error)))
        elif there and not before:
            report(log, Reachable())

    def __enter__(self) -> Queue:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _closing() -> ClosingError:
    return ClosingError("The sidecar is shutting down.")
