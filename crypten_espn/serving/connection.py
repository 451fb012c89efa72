"""One accepted connection: what is known of its peer, and how it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection

from ..errors import PeerError
from ..wire.channel import Channel
from ..wire.connect import Incoming
from .boundary import told
from .handover import Handed, Relay


class Connection:
    """One accepted connection.

    Attributes:
        number: what the log calls it.
        since: when it was accepted, monotonic seconds.
        ended: why this side ends it, if it does.
        wake: set when it is ended, for a thread that waits for something else.
        busy: whether something is under way that should not be cut.
        greeted: whether the peer has said who it is.
        handed_over: whether another process of this host answers it.
        said: its first message, if another process of this host has taken it.
    """

    def __init__(self, incoming: Incoming | Handed, number: int) -> None:
        self.number = number
        self.since = time.monotonic()
        self.ended: PeerError | None = None
        self.wake = threading.Event()
        self.busy = self.greeted = self.handed_over = False
        self._incoming: Incoming | Handed | Relay = incoming
        self.said = incoming.said if isinstance(incoming, Handed) else None
        self._channel: Channel | None = None
        self._farewell: threading.Thread | None = None

    @property
    def channel(self) -> Channel:
        """To the peer; once `open` has succeeded."""
        assert self._channel is not None
        return self._channel

    def open(self, peer_roles: Collection[str], timeout: float) -> Channel:
        """Do what TLS needs and check the peer's role."""
        assert not isinstance(self._incoming, Relay)
        self._channel = self._incoming.open(peer_roles=peer_roles, timeout=timeout)
        if self.ended is not None:
            raise self.ended
        return self._channel

    @property
    def role(self) -> str:
        """What the peer is; empty until its greeting, or its certificate, says so."""
        return "" if self._channel is None else self._channel.peer_role

    @property
    def client(self) -> str:
        """The name in the peer's certificate; empty without one."""
        return "" if self._channel is None else self._channel.peer_name

    def end(self, reason: PeerError) -> None:
        """Give the peer this reason and make the connection's own thread stop."""
        if self.ended is not None:
            return
        self.ended = reason
        if self._channel is not None:
            # The peer has seconds to read it, and nobody should wait for that here.
            farewell = threading.Thread(
                target=self._channel.abort, args=(told(reason),), daemon=True
            )
            farewell.start()
            self._farewell = farewell
        self.wake.set()

    def tell(self, reason: str) -> None:
        """Give the peer the reason and close; nothing before it is open."""
        if self._channel is not None:
            self._channel.abort(reason)

    def becomes(self, relay: Relay) -> None:
        """Carry another process's bytes from here on, and nothing of its own."""
        self._incoming, self._channel = relay, None

    def close(self) -> None:
        """Close the socket, once the peer has had time to read why."""
        if self._farewell is not None:
            self._farewell.join()
        if self._channel is None:
            self._incoming.close()
        else:
            self._channel.close()
