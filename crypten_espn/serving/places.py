"""Which of several processes holds a session, told by files that they share.

    folder/lock        held while the next is looked at or changed
    folder/SESSION     the name of the process that holds it
    folder/NAME.sock   where that process takes over the peers of its sessions

A process that died leaves its files: whoever finds that it does not answer takes its
sessions over.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


class Places:
    """The sessions of this host's workers.

    Args:
        folder: private, shared by all of them.
        name: of this process.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name

    def hold(self, session: str, *, instead_of: str | None = None) -> str:
        """Who holds a session: this process, if nobody did.

        Args:
            session: its name.
            instead_of: a process that is gone; what it held is this one's.
        """
        with self._locked():
            holder = self._read(session)
            if holder in (None, instead_of):
                holder = self.name
                (self.folder / session).write_text(holder)
            return holder

    def leave(self, session: str) -> None:
        """Hold it no more."""
        with self._locked():
            if self._read(session) == self.name:
                (self.folder / session).unlink()

    def door(self, name: str) -> Path:
        """Where a process takes over peers."""
        return self.folder / f"{name}.sock"

    def _read(self, session: str) -> str | None:
        try:
            return (self.folder / session).read_text()
        except FileNotFoundError:
            return None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        handle = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)
