"""Bytes over one connected socket, in both directions at once, within deadlines.

`Stream` knows nothing of messages save where one begins and ends: it writes views,
fills the buffers that a reader asks for, and keeps account of what was cut. A message
that was cut is never continued, in either direction.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Generic, TypeVar

from ..errors import IdleError, PeerError
from .tls import describe

MINIMUM_RATE = 1 << 16  # bytes a second; a slower peer is dropped
INBOX_BYTES = 1 << 25  # kept of what arrives while this side only writes
LINGER_S = 2.0  # how long a side that stops reads on, so that its reason arrives
LINGER_BYTES = 1 << 28
_CHUNK = 1 << 20
_LOOK = 4 << 20  # bytes written between two looks at what arrived

_GLANCE = 0.5  # seconds a waiting thread may take to see that another ended it

T = TypeVar("T")
Reading = Generator[memoryview, None, T]


def nothing() -> Reading[None]:
    """Read nothing."""
    return None
    yield  # what makes it a generator


class Deadline:
    """When a message has taken too long.

    A peer may be silent for `timeout` seconds at a time, and a message of n bytes may
    take `timeout` + n / MINIMUM_RATE seconds from its first byte on.

    Args:
        timeout: seconds.
        idle: seconds to wait for the first byte.
        now: the time.
    """

    def __init__(self, timeout: float, *, idle: float, now: float) -> None:
        self.timeout, self.idle = timeout, idle
        self.moved = 0
        self._start = self._last = now

    def progress(self, moved: int, now: float) -> None:
        """Take note that bytes moved, in whichever direction."""
        if self.moved == 0:
            self._start = now
        self.moved += moved
        self._last = now

    def left(self, now: float) -> float:
        """Seconds until the peer is dropped if nothing moves."""
        if self.moved == 0:
            return self._start + self.idle - now
        earned = self._start + self.timeout + self.moved / MINIMUM_RATE
        return min(self._last + self.timeout, earned) - now

    def missed(self, peer: str, now: float) -> PeerError:
        """The error for a peer that missed it."""
        silent = now - self._last
        limit = self.timeout if self.moved else self.idle
        if silent >= limit and not self.moved and self.idle != self.timeout:
            return IdleError(
                f"{peer} was silent for {limit:g} s, and asked for nothing. Connect "
                "again when there is something to ask.",
                "idle_s",
            )
        if silent >= limit:
            return PeerError(
                f"{peer} was silent for {limit:g} s. Check that it is running, or "
                "allow more with timeout=."
            )
        return PeerError(
            f"{peer} is too slow: {self.moved} bytes of a message in "
            f"{now - self._start:.3g} s; after {self.timeout:g} s at least "
            f"{MINIMUM_RATE} bytes a second must move. Allow more with timeout=."
        )


class Stream:
    """One connected socket, plain or TLS; used by one thread at a time.

    Args:
        sock: it belongs to the stream from now on.
        peer: what to call the other side in errors.
        last_word: given the bytes that arrived and were not read, the error by which
            the peer said why it stops, if it did.

    `finish` and `close` may be called from any thread.

    Attributes:
        waited: seconds that transfers have waited for the other side.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        peer: str,
        last_word: Callable[[bytearray], PeerError | None],
    ) -> None:
        self.peer = peer
        self.waited = 0.0
        self._sock = sock
        self._last_word = last_word
        self._inbox = bytearray()
        self._half_sent = self._half_read = False
        self._closed = False
        self._farewell: Iterable[memoryview] | None = None
        self._busy = threading.Lock()
        sock.setblocking(False)

    @property
    def sock(self) -> socket.socket:
        """For its options and its certificate; bytes go through `transfer`."""
        return self._sock

    def is_quiet(self) -> bool:
        """Whether nothing has arrived, and neither side has closed."""
        if self._closed or self._inbox:
            return False
        return not self._poll(select.POLLIN, 0.0)

    def transfer(
        self,
        outgoing: Iterable[memoryview],
        reading: Reading[T],
        *,
        timeout: float,
        idle: float | None = None,
    ) -> T:
        """Write one message and read one, whichever the socket allows first.

        What arrives while only writing is kept for the next read, up to INBOX_BYTES,
        so that two sides that both send large messages do not wait for each other.

        Args:
            outgoing: what to write; may be empty. Each view is asked for when those
                before it are written, so that all can lie in one place.
            reading: yields the buffers to fill, one after the other, and returns what
                they mean; `nothing()` reads nothing.
            timeout: seconds, as in `Deadline`.
            idle: seconds to wait for the first byte; `timeout` if None.

        Returns: what `reading` returned.

        Raises:
            PeerError: the peer is gone, silent or too slow, or has said why it stops;
                what `reading` raised; or a message was cut before.
        """
        with self._alone():
            if self._closed:
                raise PeerError(f"The channel to {self.peer} is closed.")
            writer = _Writer(outgoing)
            if writer.left is not None and self._half_sent:
                raise PeerError(f"A message to {self.peer} was cut; nothing follows.")
            now = time.monotonic()
            deadline = Deadline(
                timeout, idle=timeout if idle is None else idle, now=now
            )
            return self._transfer(writer, reading, deadline)

    def finish(self, farewell: Iterable[memoryview]) -> None:
        """Write a last message if none is half written, then close. Never raises.

        The other side gets it even when it is itself writing: this side stops writing,
        but reads on and discards for up to LINGER_S seconds, since a connection closed
        with unread data takes the last message with it. A thread that uses the stream
        does this in its place.
        """
        self._farewell = farewell
        if self._busy.acquire(blocking=False):
            try:
                self._say_farewell()
            finally:
                self._busy.release()

    def close(self) -> None:
        """Close the socket; a second call does nothing."""
        self._closed = True
        self._shutdown(socket.SHUT_RDWR)
        if self._busy.acquire(blocking=False):
            # Else the thread that uses the socket wakes up and closes it.
            self._sock.close()
            self._busy.release()

    def release(self) -> tuple[socket.socket, bytes]:
        """The socket, still open, and what arrived on it; this is closed without it."""
        with self._alone():
            sock, arrived = self._sock, bytes(self._inbox)
            self._inbox.clear()
            self._sock = socket.socket(socket.AF_UNIX)
            self._closed = True
        return sock, arrived

    def refill(self, arrived: bytes) -> None:
        """Have this before anything that is read from the socket."""
        self._inbox[:0] = arrived

    # -- inside

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise RuntimeError(
                f"Two threads use the channel to {self.peer} at once; each needs one."
            )
        try:
            yield
        finally:
            self._busy.release()
            if self._closed:
                self._sock.close()
            elif self._farewell is not None:
                self.finish(self._farewell)

    def _transfer(self, writer: _Writer, reading: Reading[T], deadline: Deadline) -> T:
        reader = _Reader(reading)
        if reader.target is not None and self._half_read:
            raise PeerError(f"A message from {self.peer} was cut; nothing follows.")
        self._from_inbox(reader)
        looked = 0
        while writer.left is not None or reader.target is not None:
            self._check_ending()
            moved = events = 0
            if writer.left is not None:
                moved, events = self._try_to_write(writer, reader)
                looked += moved
            ahead = writer.left is not None and (not moved or looked >= _LOOK)
            room = len(self._inbox) < INBOX_BYTES
            if reader.target is not None or (ahead and room):
                looked = 0
                got, awaited = self._try_to_read(reader)
                moved += got
                events |= awaited
            now = time.monotonic()
            if moved:
                deadline.progress(moved, now)
            left = deadline.left(now)
            if left <= 0:
                raise deadline.missed(self.peer, now)
            if not moved:
                self._poll(events, left)
                self.waited += time.monotonic() - now
        return reader.value

    def _try_to_write(self, writer: _Writer, reader: _Reader[T]) -> tuple[int, int]:
        """How many bytes went, and what to wait for if none could."""
        try:
            return self._write(writer), 0
        except (BlockingIOError, ssl.SSLWantWriteError):
            return 0, select.POLLOUT
        except ssl.SSLWantReadError:
            return 0, select.POLLIN
        except OSError as error:
            raise self._lost(error, reader) from None

    def _try_to_read(self, reader: _Reader[T]) -> tuple[int, int]:
        """How many bytes came, and what to wait for if none could."""
        try:
            got = self._read(reader)
        except (BlockingIOError, ssl.SSLWantReadError):
            return 0, select.POLLIN
        except ssl.SSLWantWriteError:
            return 0, select.POLLOUT
        except OSError as error:
            raise self._lost(error, reader) from None
        if got == 0:
            raise self._lost(None, reader)
        self._arrived(reader, got)
        return got, 0

    def _write(self, writer: _Writer) -> int:
        assert writer.left is not None
        # A TLS record may be half written when send() says that it would block.
        self._half_sent = True
        sent = self._sock.send(writer.left[: 4 * _CHUNK])
        writer.written(sent)
        self._half_sent = writer.left is not None
        return sent

    def _read(self, reader: _Reader[T]) -> int:
        if reader.target is not None:
            return self._fill(reader.target)
        data = self._sock.recv(min(_CHUNK, INBOX_BYTES - len(self._inbox)))
        self._inbox += data
        return len(data)

    def _fill(self, target: memoryview) -> int:
        got = self._sock.recv_into(target)
        if not isinstance(self._sock, ssl.SSLSocket):
            return got
        # TLS gives a record at a time: take those that are there before looking up.
        end = min(len(target), _CHUNK)
        with contextlib.suppress(OSError):  # the next call meets it again
            while 0 < got < end and (more := self._sock.recv_into(target[got:])):
                got += more
        return got

    def _arrived(self, reader: _Reader[T], got: int) -> None:
        if reader.target is None:
            said = self._said()
            if said is not None:
                raise said
            return
        self._half_read = True
        reader.filled(got)
        self._half_read = reader.target is not None

    def _from_inbox(self, reader: _Reader[T]) -> None:
        while reader.target is not None and self._inbox:
            got = min(len(reader.target), len(self._inbox))
            reader.target[:got] = self._inbox[:got]
            del self._inbox[:got]
            self._arrived(reader, got)

    def _lost(self, error: OSError | None, reader: _Reader[T]) -> PeerError:
        """Why the connection ended: in the peer's words, if they arrived before."""
        self._check_ending()
        while error is not None and len(self._inbox) < INBOX_BYTES:
            try:
                got = self._read(reader)
            except OSError as another:
                # A TLS alert says more than a broken pipe.
                error = another if isinstance(another, ssl.SSLError) else error
                break
            if got == 0:
                break
            self._arrived(reader, got)
        said = self._said()
        if said is not None:
            return said
        detail = "it closed the connection" if error is None else describe(error)
        if self._half_read:
            detail += " in the middle of a message"
        return PeerError(f"Lost {self.peer}: {detail}.")

    def _said(self) -> PeerError | None:
        return None if self._half_read else self._last_word(self._inbox)

    def _check_ending(self) -> None:
        if self._farewell is not None:
            self._say_farewell()
        if self._closed:
            raise PeerError(f"The channel to {self.peer} was closed on this side.")

    def _say_farewell(self) -> None:
        message, self._farewell = self._farewell, None
        if self._closed or message is None:
            return
        now = time.monotonic()
        try:
            if not self._half_sent:
                deadline = Deadline(LINGER_S, idle=LINGER_S, now=now)
                self._transfer(_Writer(message), nothing(), deadline)
            self._shutdown(socket.SHUT_WR)
            self._discard(now + LINGER_S)
        except OSError:
            pass  # the peer is gone, and so is nobody who waits for the reason
        finally:
            self._closed = True
            self._shutdown(socket.SHUT_RDWR)
            self._sock.close()

    def _discard(self, end: float) -> None:
        """Read until the peer closes, below TLS: nobody will see it."""
        for _ in range(LINGER_BYTES // _CHUNK):
            while not self._poll(select.POLLIN, end - time.monotonic()):
                if time.monotonic() >= end:
                    return
            if not socket.socket.recv(self._sock, _CHUNK):
                return

    def _poll(self, events: int, seconds: float) -> bool:
        poller = select.poll()
        poller.register(self._sock, events)
        return bool(poller.poll(max(0.0, min(seconds, _GLANCE)) * 1000))

    def _shutdown(self, how: int) -> None:
        # Of the socket below TLS: SSLSocket.shutdown would go on in plaintext.
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._sock, how)


class _Writer:
    """What is left of the view that is being written, then the next one."""

    left: memoryview | None

    def __init__(self, views: Iterable[memoryview]) -> None:
        self._views = iter(views)
        self._advance()

    def written(self, count: int) -> None:
        assert self.left is not None
        self.left = self.left[count:]
        if not len(self.left):
            self._advance()

    def _advance(self) -> None:
        self.left = next((view for view in self._views if len(view)), None)


class _Reader(Generic[T]):
    """The buffer that is being filled, and the next one; at the end the value."""

    target: memoryview | None
    value: T

    def __init__(self, reading: Reading[T]) -> None:
        self._reading = reading
        self._advance()

    def filled(self, got: int) -> None:
        assert self.target is not None
        self.target = self.target[got:]
        if not len(self.target):
            self._advance()

    def _advance(self) -> None:
        self.target = None
        try:
            target = next(self._reading)
            while not len(target):
                target = next(self._reading)
            self.target = target
        except StopIteration as end:
            self.value = end.value
