"""Where errors of a connection end: told to the peer by name, and logged."""

from __future__ import annotations

import contextlib
import hashlib
import traceback
from collections.abc import Iterator

from ..errors import EspnError, LimitError, QuotaError, RevokedError
from ..wire.channel import Channel

# A peer that says so would say it again.
REFUSALS = (LimitError, QuotaError)
FINAL = (*REFUSALS, RevokedError)


def told(error: BaseException) -> str:
    """What a peer may know of an error: ours by name, another's nothing.

    The text of a foreign exception may hold whatever was being worked on, secrets too.
    """
    if isinstance(error, EspnError):
        return f"{type(error).__name__}: {error}"
    if isinstance(error, OSError) and error.strerror:
        return f"internal error ({error.strerror})"
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return "interrupted"
    return "internal error"


def traced(error: BaseException) -> str:
    """Kind and place of a foreign error for the log, without its text."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{f.filename.rpartition('/')[2]}:{f.lineno} {f.name}" for f in frames]
    system = getattr(error, "strerror", None)
    kind = type(error).__name__ + (f" ({system})" if system else "")
    return f"{kind} at {' > '.join(places)}"


@contextlib.contextmanager
def telling(*channels: Channel | None) -> Iterator[None]:
    """Tell an error to the peers and close their channels, then raise it here."""
    try:
        yield
    except BaseException as error:
        for channel in channels:
            if channel is not None:
                channel.abort(told(error))
        raise


def session_tag(name: str) -> str:
    """What the log calls a session; its name itself lets one take part in it."""
    return hashlib.sha256(name.encode()).hexdigest()[:8]
