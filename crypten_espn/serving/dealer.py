"""The dealer's process: pairs a server with its client and deals for both."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch

from ..errors import LimitError, MaterialError, PeerError, PlanError
from ..masked.dealing import Dealing
from ..masked.drivers import over
from ..masked.memory import Space
from ..masked.messages import Party
from ..masked.plan import Plan
from ..wire.channel import Channel
from ..wire.tls import TLS
from .boundary import session_tag, told
from .connection import Connection
from .events import Dealing as DealingEvent
from .events import Dealt
from .host import Host
from .link import Limits, Link, one_link
from .messages import (
    Goodbye,
    Join,
    Joined,
    Order,
    Paired,
    Seed,
    hear,
    receive_plan,
    tell,
)
from .share import Share
from .stock import material_bytes

log = logging.getLogger(__name__)

# How soon it is noticed that a waiting client has left.
_GLANCE_S = 0.25


class _Seat:
    """A client that waits for its server, or whose material is being dealt."""

    def __init__(self, join: Join, connection: Connection) -> None:
        self.join = join
        self.connection = connection
        self.taken = False
        # The client has been told that it waits; its server's thread speaks to it now.
        self.told = threading.Event()
        self.over = threading.Event()
        self.error: BaseException | None = None


class DealerServer(Host):
    """Deals correlated randomness to pairs of parties; see `deal`.

    A client comes first and waits; its server finds it by the session's name, which
    only these two know. A session has one of each: whoever else names it is refused,
    and the pair that exists notices nothing.

    Args:
        address: "host:port" to listen on.
        link: certificates and time-out; or `tls`, `timeout`, `insecure` apart.
        limits: what it puts up with.
        plans: digests of the plans it deals for; any plan if None.
        share: what it has in common with other processes on this address.
    """

    def __init__(
        self,
        address: str,
        *,
        link: Link | None = None,
        tls: TLS | None = None,
        timeout: float | None = None,
        insecure: bool = False,
        limits: Limits | None = None,
        plans: Collection[bytes] | None = None,
        share: Share | None = None,
    ) -> None:
        super().__init__(
            address,
            role="dealer",
            peer_roles=("server", "client"),
            link=one_link(link, None, None, tls, timeout, insecure, None),
            limits=Limits() if limits is None else limits,
            log=log,
            share=share,
        )
        self._plans = plans
        self._seats: dict[str, _Seat] = {}
        self._held = 0
        self.metrics.gauge(
            "sessions_open", "Clients waiting or dealt to", lambda: len(self._seats)
        )

    def answer(self, connection: Connection) -> None:
        """Greet a party; a client then waits for its server, a server is dealt to."""
        join = self.first(connection, Join)
        if self.is_elsewhere(join.session, join, connection):
            return
        channel = connection.channel
        party = channel.peer_role
        channel.peer = f"the {party}"
        try:
            self.greeted(connection)
            if party == "client":
                self._wait(join, connection)
            else:
                self._deal_to(join, connection)
        finally:
            with self._lock:
                if join.session not in self._seats:
                    self.leave_place(join.session)

    def _wait(self, join: Join, connection: Connection) -> None:
        seat = _Seat(join, connection)
        with self._lock:
            if join.session in self._seats:
                raise PeerError("This session already has its client.")
            waiting = [s for s in self._seats.values() if not s.taken]
            if len(waiting) >= self.limits.waiting:
                oldest = waiting[0]
                self._remove(oldest)
                oldest.connection.end(
                    LimitError(
                        f"{self.limits.waiting} clients wait here for their servers; "
                        "this one makes room for a newer one.",
                        "waiting",
                    )
                )
            self._seats[join.session] = seat
        try:
            try:
                tell(connection.channel, Joined())
            finally:
                seat.told.set()
            self._await_server(seat)
            seat.over.wait()
            if seat.error is not None:
                raise PeerError(told(seat.error))
        finally:
            self._leave(seat)

    def _await_server(self, seat: _Seat) -> None:
        """Wait until the client's server has come.

        Raises:
            PeerError: it does not come in time, or the client leaves first.
        """
        limit, connection = self.limits.waiting_s, seat.connection
        end = time.monotonic() + limit
        while not connection.wake.wait(min(_GLANCE_S, end - time.monotonic())):
            # The server's thread speaks to this client once it has taken the seat.
            with self._lock:
                if seat.taken or connection.ended is not None:
                    break
                left = not connection.channel.is_quiet()
                if left or time.monotonic() >= end:
                    self._remove(seat)
                    if left:
                        raise PeerError("The client left before its server came.")
                    raise LimitError(
                        f"No server joined this client within {limit:g} s.", "waiting_s"
                    )
        if connection.ended is not None and not seat.taken:
            raise connection.ended

    def _deal_to(self, join: Join, connection: Connection) -> None:
        with self._lock:
            seat = self._seats.get(join.session)
            if seat is None:
                raise PeerError(
                    "No client of this session waits here; the client joins first."
                )
            if seat.taken:
                raise PeerError("This session already has its server and its client.")
            seat.taken = True
        seat.connection.wake.set()
        # A server may come before the thread that told the client is back.
        seat.told.wait()
        try:
            self._deal(join, connection, seat)
        except BaseException as error:
            seat.error = error
            raise
        finally:
            self._leave(seat)
            seat.over.set()

    def _leave(self, seat: _Seat) -> None:
        with self._lock:
            self._remove(seat)

    def _remove(self, seat: _Seat) -> None:
        if self._seats.get(seat.join.session) is seat:
            del self._seats[seat.join.session]

    def _deal(self, join: Join, server: Connection, seat: _Seat) -> None:
        """Deal what the server orders, until it says goodbye."""
        down = server.channel
        if join.digest != seat.join.digest:
            raise PlanError(
                f"The parties' plans differ: the server's is {join.digest[:16]}, the "
                f"client's {seat.join.digest[:16]}."
            )
        if join.corrections != seat.join.corrections:
            raise PeerError(
                "The parties disagree on who receives the corrections: the server says "
                f"the {join.corrections}, the client the {seat.join.corrections}."
            )
        if self._plans is not None and bytes.fromhex(join.digest) not in self._plans:
            raise PlanError(
                f"This dealer does not deal for plan {join.digest[:16]}; it has a list "
                "of plans it deals for."
            )
        tell(down, Paired())
        plan = receive_plan(down, limit=self.limits.plan_bytes, digest=join.digest)
        with self._holding(sum(weight.filter_bytes for weight in plan.weights)):
            self._deal_plan(plan, server, seat)

    def _deal_plan(self, plan: Plan, server: Connection, seat: _Seat) -> None:
        down, up = server.channel, seat.connection.channel
        tag, client = session_tag(seat.join.session), seat.connection.client
        corrections = seat.join.corrections
        dealing = Dealing(plan, corrections=corrections)
        receiver = {"server": down, "client": up}[corrections]
        for mine, other, secret in ((down, up, 0), (up, down, 1)):
            seed = dealing.seeds[secret].hex()
            tell(mine, Seed(seed=seed, partner=other.fingerprint))
        digest = plan.digest.hex()[:16]
        self.report(DealingEvent(server.client, client, tag, digest))
        following, most = 0, self.limits.message_bytes
        while True:
            down.wait(timeout=self.limits.idle_s, limit=most)
            order = hear(down, Order, Goodbye, limit=most)
            if isinstance(order, Goodbye):
                return
            with self.under_way(server):
                up.check_revoked()
                self._check(order, plan, following, corrections)
                following = order.start + order.count
                began, sent = time.perf_counter(), receiver.bytes_sent
                _deal_order(dealing, order, {corrections: receiver})
                self.report(
                    Dealt(
                        tag,
                        order.start,
                        order.count,
                        order.batch,
                        seconds=time.perf_counter() - began,
                        sent=receiver.bytes_sent - sent,
                    )
                )

    @contextmanager
    def _holding(self, size: int) -> Iterator[None]:
        """Count the masks of a pair's weights among what is held for all pairs."""
        with self._lock:
            self.limits.check_bytes(size, held=self._held)
            self._held += size
        try:
            yield
        finally:
            with self._lock:
                self._held -= size

    def _check(
        self, order: Order, plan: Plan, following: int, corrections: Party
    ) -> None:
        self.limits.check_order(start=order.start, count=order.count, batch=order.batch)
        if order.start < following:
            raise MaterialError(
                f"Inference {order.start} was prepared before, and a mask is used "
                f"once; go on from {following}, or start a new session."
            )
        size = material_bytes(plan, corrections, order.batch, corrections)
        self.limits.check_bytes(size)


def _deal_order(
    dealing: Dealing, order: Order, channels: Mapping[str, Channel]
) -> None:
    # Memory and masks of what is dealt here end with the order.
    space = Space()
    # A message that another core writes leaves this one's cache: worth it where there
    # are cores to spare.
    ahead = torch.get_num_threads() > 1
    for index in range(order.start, order.start + order.count):
        part = dealing.deal(index, order.batch, space=space)
        over(part, channels, tag=index, ahead=ahead)


def deal(
    address: str,
    *,
    link: Link | None = None,
    tls: TLS | None = None,
    timeout: float | None = None,
    insecure: bool = False,
    limits: Limits | None = None,
    plans: Collection[bytes] | None = None,
) -> None:
    """Be the dealer for any number of pairs until interrupted.

    The dealer sees plans, and neither weights nor data. It must not collude with
    either party: with one of them it could undo the other's masks.

    Args:
        address: "host:port" to listen on.
        link: certificates and time-out as one object, instead of the next three.
        tls: mutual TLS certificates.
        timeout: seconds a party may be silent while something is under way.
        insecure: allow an address that others reach without TLS; the seeds then travel
            in the clear.
        limits: what it puts up with; the defaults of `Limits` if None.
        plans: digests of the plans it deals for; any plan if None.

    Raises:
        PeerError: the address cannot be used.
    """
    with DealerServer(
        address,
        link=link,
        tls=tls,
        timeout=timeout,
        insecure=insecure,
        limits=limits,
        plans=plans,
    ) as server:
        server.run()
