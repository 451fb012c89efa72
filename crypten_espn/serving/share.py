"""What the processes of one host that answer on one address have in common."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import PeerError
from .handover import Letter, take_over
from .places import Places

_TICK_S = 0.25
_LETTER_S = 5.0  # for another process of this host to say whom it hands over


@dataclass(frozen=True)
class Share:
    """One process's part.

    Args:
        sock: listens on the address, in every process.
        folder: private to them; tells who holds which session.
        name: of this process.
    """

    sock: socket.socket
    folder: Path
    name: str

    @property
    def places(self) -> Places:
        """Where sessions are looked up."""
        return Places(self.folder, self.name)


class Door:
    """Where a process takes over the peers of its sessions, until `close`.

    Args:
        places: of this process.
        take: given each peer's socket, and what goes with it.
    """

    def __init__(
        self, places: Places, take: Callable[[socket.socket, Letter], None]
    ) -> None:
        self._path, self._take = places.door(places.name), take
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.bind(os.fspath(self._path))
        self._sock.listen()
        self._sock.settimeout(_TICK_S)
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._closed:
            with contextlib.suppress(OSError, PeerError):
                way, _ = self._sock.accept()
                with way:
                    way.settimeout(_LETTER_S)
                    self._take(*take_over(way))

    def close(self) -> None:
        """Take over nobody any more."""
        self._closed = True
        self._thread.join()
        self._sock.close()
        self._path.unlink(missing_ok=True)
