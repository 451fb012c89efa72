"""How many inputs each client may have answered in a day, kept across restarts.

    {"version": 1, "day": "2026-11-26", "used": {"alice": 120}, "check": "..."}

The file holds one day, in UTC, and a SHA-256 of the rest of it. It is replaced as a
whole, and on the disk before material is used: whoever kills the server never allows
more. A clock that goes back to an earlier day does not either.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ..errors import DataError, QuotaError
from ..masked.private_files import replace_file
from .messages import INDEX_LIMIT

_LIMIT = 1 << 26


class _Day(msgspec.Struct, forbid_unknown_fields=True):
    version: int
    day: str
    used: dict[str, int]
    check: str = ""

    @property
    def digest(self) -> str:
        content = (self.version, self.day, sorted(self.used.items()))
        return hashlib.sha256(msgspec.json.encode(content)).hexdigest()


def _today() -> datetime.date:
    return datetime.datetime.now(datetime.timezone.utc).date()


@dataclass(frozen=True)
class Quota:
    """What a client may have answered in a day (UTC); an input counts, not a batch.

    Clients are told apart by the name in their certificate, which a new certificate
    keeps; without TLS all are one. What was begun counts, answered or not. Several
    processes may share a file.

    Args:
        daily: inputs for each client.
        path: of the file where they are counted; made where there is none.
        today: tells the date.

    Raises:
        DataError: there is a file that cannot be used.
    """

    daily: int
    path: str | os.PathLike[str]
    today: Callable[[], datetime.date] = _today

    def __post_init__(self) -> None:
        if not 1 <= self.daily < INDEX_LIMIT:
            raise ValueError(
                f"daily={self.daily} was given; allowed are 1 to {INDEX_LIMIT - 1}"
            )
        object.__setattr__(self, "_lock", threading.Lock())
        with self._locked():
            self._read()

    def left(self, client: str) -> int:
        """Inputs that a client may still have answered today."""
        with self._locked():
            return max(0, self.daily - self._read().used.get(client, 0))

    def check(self, client: str) -> int:
        """`left`, of a client that has some.

        Raises:
            QuotaError: it has none.
        """
        left = self.left(client)
        if not left:
            raise self._exceeded(client, 1, 0)
        return left

    def charge(self, client: str, inputs: int) -> None:
        """Count inputs of a client, on the disk when this returns.

        Raises:
            QuotaError: it may not have so many, or they cannot be noted.
        """
        with self._locked():
            day = self._read()
            used = day.used.get(client, 0)
            if used + inputs > self.daily:
                raise self._exceeded(client, inputs, self.daily - used)
            day.used[client] = used + inputs
            self._write(day)

    def _exceeded(self, client: str, inputs: int, left: int) -> QuotaError:
        return QuotaError(
            f"{inputs} input(s) were to be answered, and {client or 'a client'} may "
            f"have {max(0, left)} more today: {self.daily} a day are allowed, counted "
            "anew from midnight UTC."
        )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        lock: threading.Lock = self._lock  # type: ignore[attr-defined]
        path = f"{os.fspath(self.path)}.lock"
        with lock:
            try:
                os.makedirs(os.path.dirname(path) or ".", mode=0o700, exist_ok=True)
                handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise DataError(
                    f"{path} cannot be written ({error.strerror}), so quotas cannot "
                    "be kept."
                ) from None
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                yield
            finally:
                os.close(handle)

    def _read(self) -> _Day:
        today = self.today().isoformat()
        try:
            with open(self.path, "rb") as file:
                found = _DECODER.decode(file.read(_LIMIT))
        except FileNotFoundError:
            return _Day(1, today, {})
        except OSError as error:
            raise DataError(
                f"{self.path} cannot be read ({error.strerror}), so quotas cannot be "
                "kept."
            ) from None
        except msgspec.MsgspecError:
            found = _Day(1, today, {})
        if found.version != 1 or found.check != found.digest:
            raise DataError(
                f"{self.path} is damaged or no file of quotas, so nobody knows what "
                "was used today. Delete it to begin anew, with nothing used."
            )
        return found if found.day >= today else _Day(1, today, {})

    def _write(self, day: _Day) -> None:
        day.check = day.digest
        try:
            replace_file(Path(self.path), [msgspec.json.encode(day)])
        except OSError as error:
            raise QuotaError(
                f"The server cannot note what is used ({error.strerror}), so nothing "
                "is answered."
            ) from None


# Made here once: two threads that decode a type for the first time crash msgspec.
_DECODER = msgspec.json.Decoder(_Day)
