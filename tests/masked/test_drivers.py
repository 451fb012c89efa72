"""Parts of a protocol over channels: what is written ahead, and what fails."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from crypten_espn.compiled import heat
from crypten_espn.errors import PeerError
from crypten_espn.masked.drivers import over
from crypten_espn.masked.memory import Space
from crypten_espn.masked.messages import Protocol, receive, send
from crypten_espn.wire.channel import Channel, socket_pair

LARGE = 300_000  # elements: more than a socket holds


@pytest.fixture(autouse=True)
def _kernels() -> None:
    """Nothing is compiled while a peer waits."""
    heat()


def no_thread_is_left() -> bool:
    return not any(one.name.startswith("sends") for one in threading.enumerate())


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    dealer, server = socket_pair(timeout=10, roles=("dealer", "server"))
    with dealer, server:
        yield dealer, server


def dealt(count: int, closed: list[bool] | None = None) -> Protocol[str]:
    """Messages of one value each, in memory that is used again."""
    space = Space()
    try:
        for number in range(count):
            values = space.message("values", (LARGE,), np.int64)
            values[:] = number
            yield send("server", values, 40)
        return "done"
    finally:
        if closed is not None:
            closed.append(True)


def taken(count: int) -> Protocol[list[int]]:
    found = []
    for _ in range(count):
        (values,) = yield receive("dealer", LARGE, 40)
        assert (values == values[0]).all()
        found.append(int(values[0]))
    return found


@pytest.mark.parametrize("ahead", [False, True])
def test_messages_arrive_whole_and_in_order(
    ends: tuple[Channel, Channel], ahead: bool
) -> None:
    dealer, server = ends
    found: list[list[int]] = []
    reader = threading.Thread(
        target=lambda: found.append(over(taken(6), {"dealer": server}, tag=3))
    )
    reader.start()
    assert over(dealt(6), {"server": dealer}, tag=3, ahead=ahead) == "done"
    # All of it was sent by then, whoever sent it.
    assert dealer.messages_sent == 6 and no_thread_is_left()
    reader.join()
    assert found == [list(range(6))]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("count", [1, 5])
def test_a_peer_that_is_gone_ends_the_part(
    ends: tuple[Channel, Channel], ahead: bool, count: int
) -> None:
    dealer, server = ends
    server.abort("the disk is full")
    closed: list[bool] = []
    with pytest.raises(PeerError, match="the disk is full"):
        over(dealt(count, closed), {"server": dealer}, ahead=ahead)
    assert closed == [True] and no_thread_is_left()


@pytest.mark.parametrize("ahead", [False, True])
def test_a_part_that_fails_has_sent_what_came_before(
    ends: tuple[Channel, Channel], ahead: bool
) -> None:
    def failing() -> Protocol[None]:
        yield send("server", np.arange(5), 40)
        raise ZeroDivisionError

    dealer, server = ends
    with pytest.raises(ZeroDivisionError):
        over(failing(), {"server": dealer}, ahead=ahead)
    assert np.array_equal(server.receive(5, bits=40), np.arange(5))
    assert no_thread_is_left()


def test_what_is_written_ahead_is_there_before_an_answer_is_waited_for(
    ends: tuple[Channel, Channel],
) -> None:
    def asks() -> Protocol[int]:
        yield send("server", np.full(LARGE, 7), 40)
        (values,) = yield receive("server", 1, 8)
        return int(values[0])

    def answers() -> Protocol[None]:
        (values,) = yield receive("dealer", LARGE, 40)
        yield send("dealer", values[:1], 8)

    dealer, server = ends
    other = threading.Thread(target=over, args=(answers(), {"dealer": server}))
    other.start()
    assert over(asks(), {"server": dealer}, ahead=True) == 7
    other.join()
