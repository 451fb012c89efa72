"""How an inference is reported, alike by the client and by the server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..wire.channel import Channel
from .boundary import told
from .events import Burnt, Event, Inference, InferenceBegun


@contextmanager
def reported(
    begun: InferenceBegun,
    report: Callable[[Event], None],
    channel: Channel,
    *,
    since: float,
    left: Callable[[], int],
) -> Iterator[None]:
    """Report that an inference begins, then that it was answered or is burnt.

    Args:
        begun: what begins; its material was claimed.
        report: takes the events.
        channel: to the other party; its bytes and waits are counted.
        since: when the material was asked for, by `time.perf_counter`.
        left: inferences of the session that are still prepared, asked at the end.
    """
    report(begun)
    claimed, waited = time.perf_counter(), channel.seconds_waited
    sent, received = channel.bytes_sent, channel.bytes_received
    try:
        yield
    except BaseException as error:
        report(Burnt(begun.client, begun.session, begun.index, told(error)))
        raise
    end, waited = time.perf_counter(), channel.seconds_waited - waited
    report(
        Inference(
            begun.client,
            begun.session,
            begun.index,
            begun.batch,
            seconds=end - since,
            material_s=claimed - since,
            compute_s=end - claimed - waited,
            wait_s=waited,
            sent=channel.bytes_sent - sent,
            received=channel.bytes_received - received,
            left=left(),
        )
    )
