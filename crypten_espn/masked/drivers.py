"""Where the messages of a protocol's parts travel: over channels, or in one process."""

from __future__ import annotations

import hmac
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import numpy as np

from ..errors import MaterialError
from ..wire.channel import Channel
from ..wire.frames import HEADER_BYTES
from ..wire.packing import pack, packed_bytes, unpack_parts
from .messages import AHEAD, Compare, Protocol, Receive, Send, Tell

T = TypeVar("T")
# A message of packed ring elements, each part with its bits; or what a party tells.
_Message = list[tuple[bytes, int]] | bytes
# What is on its way, by sender and receiver.
_Queues = dict[tuple[str, str], deque[_Message]]
TOLD_BYTES = 32


def over(
    part: Protocol[T],
    channels: Mapping[str, Channel],
    *,
    tag: int = 0,
    ahead: bool = False,
) -> T:
    """Run one party's part of a protocol over channels to the others.

    Args:
        part: the generator; closed when a channel fails.
        channels: by the other party's name.
        tag: number that every message carries.
        ahead: let the part go on while a thread writes its last messages. For one that
            sends much and waits for nobody: it costs a thread's start.

    Raises: PeerError as the channels do; MaterialError if the parties' digests differ,
        on both sides.
    """
    answer: list[np.ndarray] | None = None
    with _Writer(tag, ahead=ahead) as writer:
        try:
            while True:
                event, answer = part.send(answer), None
                if isinstance(event, Send):
                    writer.send(channels[event.to], event)
                    continue
                writer.wait()
                if isinstance(event, Receive):
                    answer = channels[event.of].receive_parts(
                        event.parts, tag=tag, out=event.out
                    )
                elif isinstance(event, Tell):
                    channels[event.to].send_bytes(event.digest, tag=tag)
                else:
                    told = channels[event.of].receive_bytes(limit=TOLD_BYTES, tag=tag)
                    _compare(event, told)
        except StopIteration as end:
            writer.wait()
            return cast(T, end.value)
        finally:
            part.close()


class _Writer:
    """Writes messages at once, or in a thread while the next ones are made."""

    def __init__(self, tag: int, *, ahead: bool) -> None:
        self._tag = tag
        self._thread = ThreadPoolExecutor(1, "sends") if ahead else None
        self._under_way: deque[Future[None]] = deque()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._thread is not None:
            self._thread.shutdown()

    def send(self, channel: Channel, event: Send) -> None:
        """Send this, now or after the others that are under way; see `Send`."""
        if self._thread is None:
            channel.send_parts(event.parts, tag=self._tag)
            return
        self.wait(AHEAD - 1)
        self._under_way.append(
            self._thread.submit(channel.send_parts, event.parts, tag=self._tag)
        )

    def wait(self, most: int = 0) -> None:
        """Until no more than so many messages are under way.

        Raises: PeerError as the channel does.
        """
        while len(self._under_way) > most:
            self._under_way.popleft().result()


def _compare(mine: Compare, theirs: bytes) -> None:
    if not hmac.compare_digest(mine.digest, theirs):
        raise MaterialError(
            f"The {mine.of} used material of another inference, session or plan, so "
            "the result is worthless and was dropped. Prepare material together again."
        )


@dataclass
class Transcript:
    """What parties in one process sent, in order.

    Args:
        messages: sender, receiver and payload bytes of each message of ring elements.
        told: how often each party told the other what to compare.
        sends: the messages themselves.
    """

    messages: list[tuple[str, str, int]] = field(default_factory=list)
    told: dict[str, int] = field(default_factory=dict)
    sends: list[tuple[str, Send]] = field(default_factory=list, repr=False)

    def bytes_sent(self, sender: str) -> int:
        """Bytes a party puts on the wire, frame headers included."""
        payloads = [size for who, _, size in self.messages if who == sender]
        payloads += [TOLD_BYTES] * self.told.get(sender, 0)
        return sum(payloads) + len(payloads) * HEADER_BYTES


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
    queues: _Queues = {}
    transcript = Transcript()
    values: dict[str, Any] = {}
    # The event each one is held by.
    waiting: dict[str, Receive | Compare | None] = dict.fromkeys(parts)
    running = dict(parts)
    while running:
        moved = False
        for name, part in list(running.items()):
            event = waiting[name]
            while True:
                answer: list[np.ndarray] | None = None
                if event is not None:
                    queue = queues.get((event.of, name))
                    if not queue:
                        break
                    answer = _take(event, queue.popleft())
                moved = True
                try:
                    asked = part.send(answer)
                    while isinstance(asked, Send | Tell):
                        _post(name, asked, queues, transcript, keep)
                        asked = part.send(None)
                except StopIteration as end:
                    values[name] = end.value
                    del running[name]
                    break
                event = waiting[name] = asked
        if not moved:
            raise RuntimeError(f"{', '.join(running)} wait for each other.")
    return values, transcript


def _post(
    name: str,
    event: Send | Tell,
    queues: _Queues,
    transcript: Transcript,
    keep: bool,
) -> None:
    queue = queues.setdefault((name, event.to), deque())
    if isinstance(event, Tell):
        transcript.told[name] = transcript.told.get(name, 0) + 1
        queue.append(event.digest)
        return
    data = [(bytes(pack(array, bits=bits)), bits) for array, bits in event.parts]
    transcript.messages.append((name, event.to, event.payload))
    if keep:
        kept = tuple((array.copy(), bits) for array, bits in event.parts)
        transcript.sends.append((name, Send(event.to, kept)))
    queue.append(data)


def _take(event: Receive | Compare, message: _Message) -> list[np.ndarray] | None:
    """What a waiting part gets from a message, checked as a channel would."""
    if isinstance(event, Compare) and isinstance(message, bytes):
        _compare(event, message)
        return None
    if isinstance(event, Compare) or isinstance(message, bytes):
        raise RuntimeError(
            f"The {event.of} sent another kind of message than expected."
        )
    expected = [packed_bytes(count, bits) for count, bits in event.parts]
    if [len(data) for data, _ in message] != expected:
        raise RuntimeError(f"The {event.of} sent parts of another size than expected.")
    return unpack_parts(
        [memoryview(bytearray(data)) for data, _ in message], event.parts, event.out
    )
