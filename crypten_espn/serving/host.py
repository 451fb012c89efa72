"""Accepting connections: a thread and a boundary for each, and limits for all."""

from __future__ import annotations

import itertools
import logging
import socket
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType

from ..compiled import heat
from ..errors import ClosingError, EspnError, LimitError, PeerError
from ..wire.connect import Incoming, Listener
from .boundary import session_tag, told, traced
from .connection import Connection
from .events import (
    Connected,
    Event,
    Failed,
    HandedOver,
    Left,
    Listening,
    Refused,
    Stopped,
    Stopping,
    reason_of,
    report,
)
from .handover import Handed, Letter, hand_over
from .link import Limits, Link
from .memory import give_back
from .messages import GREETING, M, Message, decode, encode, hear
from .metrics import Metrics
from .share import Door, Share

_TICK_S = 0.25
_LIVE_S = 30.0  # a host that has not looked for connections so long is stuck
_FAREWELL_S = 5.0
_TIDY_S = 5.0
# Connections that are being told why they end; one more is closed without a word.
_ENDING = 1024


class Host:
    """Accepts connections on one address and answers each in a thread of its own.

    Whatever goes wrong while a connection is answered is told to its peer by name,
    logged, and ends that connection alone.

    Args:
        address: "host:port" to listen on; port 0 lets the system choose.
        role: what this process is.
        peer_roles: who may connect.
        link: certificates, the time-out, and whether plaintext may leave the machine.
        limits: what is put up with.
        log: where refusals and failures are written.
        share: what it has in common with other processes that answer on this address.

    Raises:
        TransportError: the address cannot be used, or the certificates cannot.
    """

    def __init__(
        self,
        address: str,
        *,
        role: str,
        peer_roles: Collection[str],
        link: Link,
        limits: Limits,
        log: logging.Logger,
        share: Share | None = None,
    ) -> None:
        self.limits, self.role = limits, role
        self.metrics = Metrics(role, connections=lambda: len(self._greeted))
        self._peer_roles, self._link, self._log = peer_roles, link, log
        heat()  # before anyone's time-out runs
        self._listener = Listener(
            address,
            role=role,
            tls=link.tls,
            insecure=link.insecure,
            shared=None if share is None else share.sock,
        )
        self._places = None if share is None else share.places
        self.address = self._listener.address
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        # In the order of their arrival: the oldest is the first to go.
        self._greeting: dict[Connection, threading.Thread] = {}
        self._greeted: dict[Connection, threading.Thread] = {}
        self._ending: dict[Connection, threading.Thread] = {}
        self._relayed: dict[Connection, threading.Thread] = {}
        # Told to stop; not running any more; said how it ended.
        self._closed = threading.Event()
        self._reloading = threading.Event()
        self._over = False
        self._ticked = 0.0
        self._door: Door | None = None
        # Somebody has left since memory was given back, and when that was.
        self._left, self._tidied = False, 0.0

    @property
    def ready(self) -> bool:
        """Whether it accepts connections."""
        return self.live and not self._closed.is_set()

    @property
    def live(self) -> bool:
        """Whether the thread in `run` has looked for connections lately."""
        return time.monotonic() - self._ticked < _LIVE_S

    def report(self, event: Event, *, level: int | None = None) -> None:
        """Write an event to the log, and count it."""
        self.metrics.count(event)
        report(self._log, event, level=level)

    def answer(self, connection: Connection) -> None:
        """Serve one peer until it leaves; whatever is raised ends the connection."""
        raise NotImplementedError

    def run(self) -> None:
        """Accept connections until `stop` or `close` is called."""
        self.report(Listening(self.role, self.address))
        if self._places is not None:
            self._door = Door(self._places, self._take_over)
        while not self._closed.is_set():
            self._ticked = time.monotonic()
            self._end_slow()
            if self._reloading.is_set():
                self._reloading.clear()
                self.read_again()
            try:
                incoming = self._listener.accept(timeout=_TICK_S)
            except PeerError:
                self._tidy()
                continue
            self._begin(incoming)

    def stop(self) -> None:
        """Make `run` return, from a signal handler or another thread."""
        self._closed.set()

    def reload(self) -> None:
        """Read certificates again at once, from a signal handler or another thread.

        Without it they are read again when their files change.
        """
        self._reloading.set()

    def read_again(self) -> None:
        """Read files again, in the thread of `run`."""
        self._listener.reload()

    def close(self) -> None:
        """Stop accepting, finish what is under way, and give every peer the reason.

        What is not finished after `limits.grace_s` is cut: its material was claimed
        and is not used again. A second call does nothing.
        """
        with self._lock:
            self._closed.set()
            over, self._over = self._over, True
            everybody = {**self._greeting, **self._greeted, **self._ending}
            busy = {c: thread for c, thread in everybody.items() if c.busy}
            relayed = dict(self._relayed)
        if over:
            return
        self._listener.close()
        if self._door is not None:
            self._door.close()
        end = time.monotonic() + self.limits.grace_s + _FAREWELL_S
        grace = self.limits.grace_s
        self.report(Stopping(self.role, self.address, len(busy), grace))
        for connection in everybody:
            if connection not in busy:
                connection.end(_closing())
        self._join(busy, grace)
        burnt = sum(connection.busy for connection in busy)
        for connection in busy:
            connection.end(_closing())
        self._join(everybody, _FAREWELL_S)
        # Those who answer them stop in the same time.
        self._join(relayed, end - time.monotonic())
        for connection in (*everybody, *relayed):
            connection.close()
        self.report(Stopped(self.role, self.address, burnt))

    @staticmethod
    def _join(threads: Mapping[Connection, threading.Thread], seconds: float) -> None:
        end = time.monotonic() + seconds
        for thread in threads.values():
            if thread.ident is not None:
                thread.join(max(0.0, end - time.monotonic()))

    @contextmanager
    def under_way(self, connection: Connection) -> Iterator[None]:
        """Something that `close` lets finish.

        Raises:
            ClosingError: the host is stopping: before it has begun, or after its end.
            RevokedError: the peer's certificate was revoked meanwhile.
        """
        connection.channel.check_revoked()
        with self._lock:
            if self._closed.is_set():
                raise _closing()
            connection.busy = True
        try:
            yield
        finally:
            with self._lock:
                connection.busy = False
        if self._closed.is_set():
            raise _closing()

    def greeted(self, connection: Connection) -> None:
        """Count a connection among those that said who they are.

        Raises:
            LimitError: there are too many.
        """
        with self._lock:
            if len(self._greeted) >= self.limits.connections:
                raise LimitError(
                    f"All {self.limits.connections} connections are in use; try again "
                    "later.",
                    "connections",
                )
            thread = self._greeting.pop(connection, None)
            if thread is not None:
                self._greeted[connection] = thread
        connection.greeted = True
        channel = connection.channel
        channel.timeout = self._link.timeout
        self.report(
            Connected(
                connection.number,
                channel.peer_role,
                channel.peer_name,
                channel.fingerprint[:16],
                time.monotonic() - connection.since,
            )
        )

    def first(self, connection: Connection, kind: type[M]) -> M:
        """A peer's greeting and its first message, here or where it was handed over.

        Raises:
            PeerError: it is none, or none of this kind.
        """
        channel = connection.channel
        if connection.said is not None:
            return decode(connection.said, kind)
        channel.handshake(digest=GREETING)
        return hear(channel, kind)

    def is_elsewhere(self, session: str, said: Message, connection: Connection) -> bool:
        """Whether another process of this host has answered the peer of a session.

        If not, the session is this one's until `leave_place`.

        Args:
            session: its name.
            said: the peer's first message, which names it.
            connection: to the peer; over when this returns True.
        """
        if self._places is None:
            return False
        gone = None
        while True:
            holder = self._places.hold(session, instead_of=gone)
            if holder == self._places.name:
                return False
            try:
                self._hand_over(connection, session, said, holder)
                return True
            except (ConnectionRefusedError, FileNotFoundError):
                gone = holder

    def _hand_over(
        self, connection: Connection, session: str, said: Message, holder: str
    ) -> None:
        assert self._places is not None
        door, channel = self._places.door(holder), connection.channel
        number, role, client = connection.number, connection.role, connection.client
        relay = hand_over(channel, encode(said), door, timeout=self.limits.handshake_s)
        connection.handed_over = True
        self.report(HandedOver(number, role, client, session_tag(session)))
        with self._lock:
            thread = self._greeting.pop(connection, None)
            if relay is not None and thread is not None:
                self._relayed[connection] = thread
        if relay is not None:
            connection.becomes(relay)
            relay.run()

    def _take_over(self, sock: socket.socket, letter: Letter) -> None:
        self._begin(Handed(sock, letter, self.role, self._listener.tls))

    def leave_place(self, session: str) -> None:
        """Another process may hold a session from now on."""
        if self._places is not None:
            self._places.leave(session)

    def _begin(self, incoming: Incoming | Handed) -> None:
        connection = Connection(incoming, next(self._numbers))
        thread = threading.Thread(target=self._run, args=(connection,), daemon=True)
        oldest = None
        with self._lock:
            if self._closed.is_set():
                incoming.close()
                return
            if len(self._ending) >= _ENDING:
                text = f"closed: {_ENDING} others are being told why they end"
                self.report(Refused(connection.number, "", "", "ending", text))
                incoming.close()
                return
            if len(self._greeting) >= self.limits.greeting:
                oldest = next(iter(self._greeting))
                self._ending[oldest] = self._greeting.pop(oldest)
            self._greeting[connection] = thread
        if oldest is not None:
            oldest.end(
                LimitError(
                    f"{self.limits.greeting} connections are being greeted; this one "
                    "makes room for a newer one.",
                    "greeting",
                )
            )
        try:
            thread.start()
        except RuntimeError:
            self.report(Failed(connection.number, "no thread is left for it"))
            self._forget(connection)

    def _tidy(self) -> None:
        """Give memory back now and then, once somebody has left."""
        now = time.monotonic()
        if self._left and now - self._tidied > _TIDY_S:
            self._left, self._tidied = False, now
            give_back()

    def _end_slow(self) -> None:
        """End connections that take too long to say who they are."""
        limit = self.limits.handshake_s
        with self._lock:
            now = time.monotonic()
            slow = [c for c in self._greeting if now - c.since > limit]
            for connection in slow:
                self._ending[connection] = self._greeting.pop(connection)
        for connection in slow:
            connection.end(self._too_slow())

    def _too_slow(self) -> LimitError:
        limit = self.limits.handshake_s
        return LimitError(
            f"The greeting was not complete after {limit:g} s.", "handshake_s"
        )

    def _run(self, connection: Connection) -> None:
        number = connection.number
        try:
            connection.open(self._peer_roles, self.limits.handshake_s)
            self.answer(connection)
            if not connection.handed_over:
                self.report(Left(number, connection.role, connection.client))
        except BaseException as error:
            reason = error if connection.ended is None else connection.ended
            late = time.monotonic() - connection.since >= self.limits.handshake_s
            if late and not connection.greeted and type(reason) is PeerError:
                reason = self._too_slow()  # its own wait was over first
            if isinstance(reason, EspnError):
                role, client = connection.role, connection.client
                # Whoever is still here when a host closes is no cause for worry.
                level = logging.INFO if self._closed.is_set() else None
                text = told(reason)
                self.report(
                    Refused(number, role, client, reason_of(reason), text), level=level
                )
            else:
                self.report(Failed(number, traced(error)))
            connection.tell(told(reason))
        finally:
            self._forget(connection)

    def _forget(self, connection: Connection) -> None:
        connection.close()
        self._left = True
        with self._lock:
            for group in (
                self._greeting,
                self._greeted,
                self._ending,
                self._relayed,
            ):
                group.pop(connection, None)

    def __enter__(self) -> Host:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _closing() -> ClosingError:
    return ClosingError("It is shutting down.")
