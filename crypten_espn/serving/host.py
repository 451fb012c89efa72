"""Accepting connections: a thread and a boundary for each, and limits for all."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Collection
from types import TracebackType

from ..compiled import heat
from ..errors import EspnError, PeerError
from ..wire.channel import Channel
from ..wire.connect import Incoming, Listener
from ..wire.frames import printable
from .boundary import told, traced
from .link import Limits, Link

_TICK_S = 0.25
_FAREWELL_S = 5.0
# Connections that are being told why they end; one more is closed without a word.
_ENDING = 1024


class Connection:
    """One accepted connection.

    Attributes:
        number: what the log calls it.
        since: when it was accepted, monotonic seconds.
        ended: why this side ends it, if it does.
        wake: set when it is ended, for a thread that waits for something else.
    """

    def __init__(self, incoming: Incoming, number: int) -> None:
        self.number = number
        self.since = time.monotonic()
        self.ended: str | None = None
        self.wake = threading.Event()
        self._incoming = incoming
        self._channel: Channel | None = None
        self._farewell: threading.Thread | None = None

    @property
    def channel(self) -> Channel:
        """To the peer; once `open` has succeeded."""
        assert self._channel is not None
        return self._channel

    def open(self, peer_roles: Collection[str], timeout: float) -> Channel:
        """Do what TLS needs and check the peer's role."""
        self._channel = self._incoming.open(peer_roles=peer_roles, timeout=timeout)
        if self.ended is not None:
            raise PeerError(self.ended)
        return self._channel

    def end(self, reason: str) -> None:
        """Give the peer this reason and make the connection's own thread stop."""
        if self.ended is not None:
            return
        self.ended = reason
        if self._channel is not None:
            # The peer has seconds to read it, and nobody should wait for that here.
            farewell = threading.Thread(
                target=self._channel.abort, args=(reason,), daemon=True
            )
            farewell.start()
            self._farewell = farewell
        self.wake.set()

    def tell(self, reason: str) -> None:
        """Give the peer the reason and close; nothing before it is open."""
        if self._channel is not None:
            self._channel.abort(reason)

    def close(self) -> None:
        """Close the socket, once the peer has had time to read why."""
        if self._farewell is not None:
            self._farewell.join()
        if self._channel is None:
            self._incoming.close()
        else:
            self._channel.close()


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
    ) -> None:
        self.limits = limits
        self._peer_roles, self._link, self._log = peer_roles, link, log
        heat()  # before anyone's time-out runs
        self._listener = Listener(
            address, role=role, tls=link.tls, insecure=link.insecure
        )
        self.address = self._listener.address
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        # In the order of their arrival: the oldest is the first to go.
        self._greeting: dict[Connection, threading.Thread] = {}
        self._greeted: dict[Connection, threading.Thread] = {}
        self._ending: dict[Connection, threading.Thread] = {}
        self._closed = threading.Event()

    def answer(self, connection: Connection) -> None:
        """Serve one peer until it leaves; whatever is raised ends the connection."""
        raise NotImplementedError

    def run(self) -> None:
        """Accept connections until `stop` or `close` is called."""
        while not self._closed.is_set():
            self._end_slow()
            try:
                incoming = self._listener.accept(timeout=_TICK_S)
            except PeerError:
                continue
            self._begin(incoming)

    def stop(self) -> None:
        """Make `run` return, from a signal handler or another thread."""
        self._closed.set()

    def close(self, reason: str = "It is shutting down.") -> None:
        """Stop accepting, give every peer the reason, and wait for the threads."""
        self._closed.set()
        self._listener.close()
        with self._lock:
            ending = {**self._greeting, **self._greeted, **self._ending}
        for connection in ending:
            connection.end(reason)
        deadline = time.monotonic() + _FAREWELL_S
        for connection, thread in ending.items():
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))
            connection.close()

    def greeted(self, connection: Connection) -> None:
        """Count a connection among those that said who they are.

        Raises:
            PeerError: there are too many.
        """
        with self._lock:
            if len(self._greeted) >= self.limits.connections:
                raise PeerError(
                    f"All {self.limits.connections} connections are in use; try again "
                    "later."
                )
            thread = self._greeting.pop(connection, None)
            if thread is not None:
                self._greeted[connection] = thread
        connection.channel.timeout = self._link.timeout

    def _begin(self, incoming: Incoming) -> None:
        connection = Connection(incoming, next(self._numbers))
        thread = threading.Thread(target=self._run, args=(connection,), daemon=True)
        oldest = None
        with self._lock:
            if len(self._ending) >= _ENDING:
                self._log.warning(
                    "connection %d: closed, %d others are being told why they end",
                    connection.number,
                    _ENDING,
                )
                incoming.close()
                return
            if len(self._greeting) >= self.limits.greeting:
                oldest = next(iter(self._greeting))
                self._ending[oldest] = self._greeting.pop(oldest)
            self._greeting[connection] = thread
        if oldest is not None:
            oldest.end(
                f"{self.limits.greeting} connections are being greeted; this one makes "
                "room for a newer one."
            )
        try:
            thread.start()
        except RuntimeError:
            self._log.error("no thread is left for connection %d", connection.number)
            self._forget(connection)

    def _end_slow(self) -> None:
        """End connections that take too long to say who they are."""
        limit = self.limits.handshake_s
        with self._lock:
            now = time.monotonic()
            slow = [c for c in self._greeting if now - c.since > limit]
            for connection in slow:
                self._ending[connection] = self._greeting.pop(connection)
        for connection in slow:
            connection.end(f"The greeting was not complete after {limit:g} s.")

    def _run(self, connection: Connection) -> None:
        self._log.debug("connection %d: accepted", connection.number)
        try:
            channel = connection.open(self._peer_roles, self.limits.handshake_s)
            self.answer(connection)
            self._log.info("connection %d: %s left", connection.number, channel.peer)
        except BaseException as error:
            reason = connection.ended or told(error)
            if connection.ended is None and not isinstance(error, EspnError):
                self._log.error("connection %d: %s", connection.number, traced(error))
            else:
                # Whoever is still here when a host closes is no cause for worry.
                level = logging.INFO if self._closed.is_set() else logging.WARNING
                self._log.log(
                    level,
                    "connection %d: ended: %s",
                    connection.number,
                    printable(reason),
                )
            connection.tell(reason)
        finally:
            self._forget(connection)

    def _forget(self, connection: Connection) -> None:
        connection.close()
        with self._lock:
            for group in (self._greeting, self._greeted, self._ending):
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
