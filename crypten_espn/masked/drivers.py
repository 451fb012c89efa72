"""Where the messages of a protocol's parts travel: over channels, or in one process."""

from __future__ import annotations

import hmac
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..errors import MaterialError
from ..wire.channel import HEADER_BYTES, Channel
from ..wire.packing import pack, packed_bytes, unpack
from .messages import Agree, Protocol, Receive, Send

T = TypeVar("T")
AGREEMENT_BYTES = 32


def over(part: Protocol[T], channels: Mapping[str, Channel], *, tag: int = 0) -> T:
    """Run one party's part of a protocol over channels to the others.

    Args:
        part: the generator; closed when a channel fails.
        channels: by the other party's name.
        tag: number that every message carries.

    Raises: PeerError as the channels do; MaterialError if the parties' digests differ,
        on both sides.
    """
    answer: Any = None
    try:
        while True:
            event = part.send(answer)
            if isinstance(event, Send):
                answer = channels[event.to].send_parts(event.parts, tag=tag)
            elif isinstance(event, Receive):
                answer = channels[event.of].receive_parts(event.parts, tag=tag)
            else:
                channel = channels[event.party]
                channel.send_bytes(event.digest, tag=tag)
                answer = _agree(
                    event, channel.receive_bytes(limit=AGREEMENT_BYTES, tag=tag)
                )
    except StopIteration as end:
        return end.value
    finally:
        part.close()


def _agree(mine: Agree, theirs: bytes) -> None:
    if not hmac.compare_digest(mine.digest, theirs):
        raise MaterialError(
            f"The {mine.party} used material of another inference, session or plan, so "
            "the result is worthless and was dropped. Prepare material together again."
        )


@dataclass
class Transcript:
    """What parties in one process sent, in order.

    Args:
        messages: sender, receiver and payload bytes of each message of ring elements.
        sends: the messages themselves.
    """

    messages: list[tuple[str, str, int]] = field(default_factory=list)
    sends: list[tuple[str, Send]] = field(default_factory=list, repr=False)

    def bytes_sent(self, sender: str, *, agreements: int = 0) -> int:
        """Bytes a party puts on the wire, frame headers included."""
        payloads = [size for who, _, size in self.messages if who == sender]
        frames = len(payloads) + agreements
        return sum(payloads) + frames * HEADER_BYTES + agreements * AGREEMENT_BYTES


def together(
    parts: Mapping[str, Protocol[Any]], *, keep: bool = False
) -> tuple[dict[str, Any], Transcript]:
    """Run every party's part in this process; what they send is packed and unpacked.

    Args:
        parts: generators by party.
        keep: whether the transcript holds the messages, not only their sizes.

    Returns: each part's value, and the transcript.

    Raises: MaterialError if digests differ; RuntimeError if all wait for each other.
    """
    queues: dict[tuple[str, str], deque[Any]] = {}
    transcript = Transcript()
    values: dict[str, Any] = {}
    waiting: dict[str, Any] = dict.fromkeys(parts)  # the event each one is held by
    running = dict(parts)
    while running:
        moved = False
        for name, part in list(running.items()):
            event = waiting[name]
            while True:
                answer: Any = None
                if event is not None:
                    other = event.party if isinstance(event, Agree) else event.of
                    queue = queues.get((other, name))
                    if not queue:
                        break
                    answer = _take(event, queue.popleft())
                moved = True
                try:
                    event = part.send(answer)
                    while isinstance(event, Send):
                        _post(name, event, queues, transcript, keep)
                        event = part.send(None)
                except StopIteration as end:
                    values[name] = end.value
                    del running[name]
                    break
                if isinstance(event, Agree):
                    queues.setdefault((name, event.party), deque()).append(event)
                waiting[name] = event
        if not moved:
            raise RuntimeError(f"{', '.join(running)} wait for each other.")
    return values, transcript


def _post(
    name: str,
    event: Send,
    queues: dict[tuple[str, str], deque[Any]],
    transcript: Transcript,
    keep: bool,
) -> None:
    data = [(bytes(pack(array, bits=bits)), bits) for array, bits in event.parts]
    transcript.messages.append((name, event.to, event.payload))
    if keep:
        kept = tuple((array.copy(), bits) for array, bits in event.parts)
        transcript.sends.append((name, Send(event.to, kept)))
    queues.setdefault((name, event.to), deque()).append(data)


def _take(event: Receive | Agree, message: Any) -> Any:
    """What a waiting part gets from a message, checked as a channel would."""
    if isinstance(event, Agree):
        return _agree(event, message.digest)
    expected = [packed_bytes(count, bits) for count, bits in event.parts]
    if [len(data) for data, _ in message] != expected:
        raise RuntimeError(f"The {event.of} sent parts of another size than expected.")
    return [
        unpack(bytearray(data), count, bits=bits)
        for (data, _), (count, bits) in zip(message, event.parts, strict=True)
    ]
