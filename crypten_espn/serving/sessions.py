"""The sessions that a server's process has in use, and those on its disk."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..bundle import Bundle
from ..errors import EspnError, MaterialError, PeerError
from ..masked.header import check_corrections
from ..masked.store_writer import remove_used_up
from .events import Event, FolderStays
from .messages import Hello
from .places import Places
from .session import OWNER, Session, read_owner


class Sessions:
    """Finds the session that a client names, and forgets it after its last connection.

    Args:
        bundle: what new sessions are served.
        directory: where material is kept, a folder for each; None for memory.
        report: takes events.
        places: where other processes are told which sessions are here.
    """

    def __init__(
        self,
        bundle: Bundle,
        directory: Path | None,
        *,
        report: Callable[[Event], None],
        places: Places | None,
    ) -> None:
        self.bundle = bundle
        self._directory, self._report, self._places = directory, report, places
        self._found: dict[str, Session] = {}
        self._lock = threading.RLock()

    @property
    def count(self) -> int:
        """Sessions in use that have a name."""
        return len(self._found)

    @property
    def left(self) -> int:
        """Inferences prepared and not used, of the sessions that are in use."""
        left = 0
        for session in self._all():
            # Used up, and removed, meanwhile.
            with suppress(EspnError, OSError):
                left += session.stock.remaining
        return left

    @property
    def held(self) -> int:
        """Bytes of material in memory, or promised to be."""
        return sum(session.stock.held for session in self._all())

    @contextmanager
    def using(self, hello: Hello, owner: str) -> Iterator[Session]:
        """The session of a client with this name in its certificate.

        Raises:
            MaterialError: there is none of the name it gives, it cannot be used, or its
                corrections go to the other party.
            PeerError: it is another client's.
        """
        with self._lock:
            try:
                session = self._enter(hello, owner)
            except BaseException:
                if hello.session is not None and hello.session not in self._found:
                    self._leave(hello.session)
                raise
            session.users += 1
        try:
            yield session
        finally:
            with self._lock:
                session.users -= 1
                last = session.users == 0
                if last:
                    self._forget(session)
            if last:
                session.close()
                self._tidy(session)

    def rename(self, session: Session, name: str) -> None:
        """Begin a new dealing of a session whose material is used up.

        Raises:
            PeerError: the name is another session's.
        """
        session.close()
        with self._lock:
            taken = name in self._found or (
                self._directory is not None and (self._directory / name).exists()
            )
            if taken or not self._is_ours(name):
                raise PeerError("A new session has a name that is already taken.")
            self._forget(session)
            self._tidy(session)
            session.begin(name)
            self._found[name] = session

    def _all(self) -> list[Session]:
        with self._lock:
            return list(self._found.values())

    def _enter(self, hello: Hello, owner: str) -> Session:
        """The session that a client names: one in use, one on disk, or a new one."""
        if hello.session is None:
            return Session(self.bundle, owner, hello.corrections)
        if not self._is_ours(hello.session):
            raise PeerError("This session has just moved to another process; go on.")
        session = self._found.get(hello.session)
        if session is None:
            session = self._stored(hello.session, hello)
            if session.owner == owner:
                self._found[hello.session] = session
        if session.owner != owner:
            raise PeerError(
                "This session belongs to another certificate's name than the one that "
                "was shown. Prepare material again."
            )
        check_corrections("This session", session.corrections, hello.corrections)
        return session

    def _stored(self, name: str, hello: Hello) -> Session:
        if self._directory is None or not (self._directory / name).is_dir():
            kept = "" if self._directory else ", and keeps none without a folder for it"
            raise MaterialError(
                f"The server has no material of the session that the client names{kept}"
                ". Delete the client's and prepare material together again."
            )
        folder = self._directory / name
        session = Session(self.bundle, read_owner(folder), hello.corrections)
        session.name = name
        session.stock.open(folder, session=name, floor=hello.next_index)
        session.stock.compare(hello.next_index)
        return session

    def _forget(self, session: Session) -> None:
        if self._found.get(session.name) is session:
            del self._found[session.name]
            self._leave(session.name)

    def _tidy(self, session: Session) -> None:
        """Remove the folder of a session that is used up."""
        if self._directory is None or not session.name:
            return
        folder = self._directory / session.name
        try:
            if folder.is_dir() and session.stock.remaining == 0:
                (folder / OWNER).unlink(missing_ok=True)
                remove_used_up(folder)
        except (EspnError, OSError) as error:
            self._report(FolderStays(session.tag, type(error).__name__))

    def _is_ours(self, name: str) -> bool:
        places = self._places
        return places is None or places.hold(name) == places.name

    def _leave(self, name: str) -> None:
        if self._places is not None:
            self._places.leave(name)
