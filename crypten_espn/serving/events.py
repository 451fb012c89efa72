"""What the parties report: each event is a line of the log, and counts in the metrics.

Every event is a class here, and its fields are all that is written of it: names,
numbers and reasons, never a seed, a mask, an input, a weight or a session's name, for
which `boundary.session_tag` stands.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from typing import ClassVar

from ..errors import EspnError, LimitError
from ..wire.frames import printable

_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@dataclass(frozen=True)
class Event:
    """Anything that is reported; subclasses add their fields."""

    level: ClassVar[int] = logging.INFO

    @property
    def name(self) -> str:
        """What logs call it: InferenceBegun is inference_begun."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()

    @property
    def values(self) -> dict[str, str | int | float]:
        """Its fields, each ready to be written in one line."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: _written(value) for name, value in found.items()}

    def __str__(self) -> str:
        shown = (
            f"{name}={json.dumps(value, ensure_ascii=False)}"
            for name, value in self.values.items()
        )
        return " ".join([self.name, *shown])


@dataclass(frozen=True)
class Listening(Event):
    """A server or a dealer accepts connections."""

    role: str
    address: str


@dataclass(frozen=True)
class Stopping(Event):
    """It accepts none any more, and finishes what is under way."""

    role: str
    address: str
    under_way: int
    grace_s: float


@dataclass(frozen=True)
class Stopped(Event):
    """It is gone; `burnt` inferences or preparations were not finished."""

    role: str
    address: str
    burnt: int


@dataclass(frozen=True)
class Connected(Event):
    """A peer has said who it is.

    Args:
        connection: its number at this host.
        role: what it is.
        client: the name in its certificate; empty without TLS.
        certificate: the beginning of its certificate's SHA-256.
        seconds: since it was accepted.
    """

    connection: int
    role: str
    client: str
    certificate: str
    seconds: float


@dataclass(frozen=True)
class WorkerGone(Event):
    """A worker ended without being told to; another one takes its place."""

    level = logging.ERROR

    worker: str
    status: int


@dataclass(frozen=True)
class HandedOver(Event):
    """A peer was handed to the worker that holds its session."""

    connection: int
    role: str
    client: str
    session: str


@dataclass(frozen=True)
class Left(Event):
    """A peer said goodbye."""

    connection: int
    role: str
    client: str


@dataclass(frozen=True)
class Refused(Event):
    """A connection was ended, and its peer told why.

    Args:
        connection, role, client: as `Connected`, where they are known.
        reason: one word, as `reason_of` says.
        text: what the peer was told.
    """

    level = logging.WARNING

    connection: int
    role: str
    client: str
    reason: str
    text: str


@dataclass(frozen=True)
class Failed(Event):
    """A fault of this side ended a connection; `text` is its kind and place."""

    level = logging.ERROR

    connection: int
    text: str


@dataclass(frozen=True)
class SessionOpened(Event):
    """A client begins a session, or goes on with one that lies on the disk."""

    connection: int
    client: str
    session: str
    left: int


@dataclass(frozen=True)
class Prepared(Event):
    """Inferences were prepared; `sent` and `received` are bytes of this side."""

    client: str
    session: str
    start: int
    count: int
    batch: int
    seconds: float
    sent: int
    received: int
    left: int


@dataclass(frozen=True)
class InferenceBegun(Event):
    """Material was claimed, and is used from here on."""

    client: str
    session: str
    index: int
    batch: int


@dataclass(frozen=True)
class Inference(Event):
    """An inference was answered.

    Args:
        client, session, index, batch: as `InferenceBegun`.
        seconds: of all of it.
        material_s, compute_s, wait_s: for its material, for computing, for the peer.
        sent, received: bytes.
        left: inferences of the session that are still prepared.
    """

    client: str
    session: str
    index: int
    batch: int
    seconds: float
    material_s: float
    compute_s: float
    wait_s: float
    sent: int
    received: int
    left: int


@dataclass(frozen=True)
class Burnt(Event):
    """An inference that had begun was not answered; its material is not used again."""

    level = logging.WARNING

    client: str
    session: str
    index: int
    reason: str


@dataclass(frozen=True)
class FolderStays(Event):
    """The folder of a session that is used up could not be removed."""

    level = logging.WARNING

    session: str
    reason: str


@dataclass(frozen=True)
class Replaced(Event):
    """New sessions are served another bundle than before; `plan` is its digest's."""

    plan: str


@dataclass(frozen=True)
class Reconnected(Event):
    """The client connected to its server again; `reason` is why it had to."""

    session: str
    reason: str


@dataclass(frozen=True)
class TopUpFailed(Event):
    """Preparing in the background failed.

    Args:
        attempt, attempts: how many in a row, and after how many it is given up.
        wait_s: until the next one; 0 where it is given up until the next input.
        reason: what went wrong.
    """

    level = logging.WARNING

    attempt: int
    attempts: int
    wait_s: float
    reason: str


@dataclass(frozen=True)
class Repeated(Event):
    """A sidecar asks for inputs once more, with new material; `reason` is why."""

    level = logging.WARNING

    inputs: int
    reason: str


@dataclass(frozen=True)
class PlanChanged(Event):
    """A sidecar's server has another plan than before; requests are checked by it."""

    level = logging.WARNING

    before: str
    now: str


@dataclass(frozen=True)
class Reachable(Event):
    """A sidecar reaches its server again, after it did not."""


@dataclass(frozen=True)
class Unreachable(Event):
    """A sidecar does not reach its server, or is not welcome there."""

    level = logging.WARNING

    reason: str


@dataclass(frozen=True)
class RequestRefused(Event):
    """A sidecar refused or failed an HTTP request; its text may tell of the input."""

    status: int
    reason: str


@dataclass(frozen=True)
class Dealing(Event):
    """A dealer has paired a server and a client."""

    server: str
    client: str
    session: str
    plan: str


@dataclass(frozen=True)
class Dealt(Event):
    """A dealer has dealt what a server ordered."""

    session: str
    start: int
    count: int
    batch: int
    seconds: float
    sent: int


def report(log: logging.Logger, event: Event, *, level: int | None = None) -> None:
    """Write an event to a log, at its own level or another."""
    log.log(
        event.level if level is None else level, "%s", event, extra={"event": event}
    )


def reason_of(error: BaseException) -> str:
    """One word for why a connection ended: the limit, or the kind of error."""
    if isinstance(error, LimitError) and error.limit:
        return error.limit
    return type(error).__name__ if isinstance(error, EspnError) else "internal"


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, event, and the event's fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Whatever is no event of ours is called a message, without its traceback."""
        moment = datetime.fromtimestamp(record.created, timezone.utc)
        line: dict[str, object] = {
            "time": moment.isoformat(timespec="microseconds"),
            "level": record.levelname,
            "logger": record.name,
        }
        event = getattr(record, "event", None)
        if isinstance(event, Event):
            line |= {"event": event.name, **event.values}
        else:
            line |= {"event": "message", "text": printable(record.getMessage())}
        return json.dumps(line, ensure_ascii=False)


def log_to_stderr(*, verbose: bool, as_json: bool) -> None:
    """Write this process's log to standard error.

    Args:
        verbose: every event, not only refusals and failures.
        as_json: every event too, as JSON lines.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if as_json else logging.Formatter(_TEXT))
    level = logging.INFO if verbose or as_json else logging.WARNING
    logging.basicConfig(level=level, handlers=[handler])


def _written(value: object) -> str | int | float:
    if isinstance(value, float):
        return round(value, 6)
    return value if isinstance(value, int) else printable(str(value))
