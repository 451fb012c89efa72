"""What exceeds a limit is refused by its name on both sides, and logged with it."""

from __future__ import annotations

import contextlib

import pytest

from crypten_espn.errors import LimitError, PeerError
from crypten_espn.masked.model import MaskedModel
from crypten_espn.serving.client import connect
from crypten_espn.serving.events import Refused
from crypten_espn.serving.link import Limits
from crypten_espn.wire.channel import socket_pair

from .conftest import Heard, Run, serving
from .raw import waiting
from .test_host import silent


@pytest.mark.parametrize(
    ("limits", "named", "wish"),
    [
        (Limits(count=1), "count", {"count": 2}),
        (Limits(batch=1), "batch", {"batch": 2}),
        (Limits(prepared=1), "prepared", {"count": 2}),
        (Limits(material_bytes=1000), "material_bytes", {}),
        (Limits(message_bytes=64), "message_bytes", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_order_beyond_a_limit_is_refused_by_its_name(
    limits: Limits,
    named: str,
    wish: dict[str, int],
    model: MaskedModel,
    run: Run,
    heard: Heard,
) -> None:
    served = serving(model, run, limits=limits)
    with (
        connect(served.server.address, link=served.link) as client,
        pytest.raises(LimitError, match="the server stopped: LimitError"),
    ):
        client.prepare(**wish)
    assert [r.reason for r in heard.wait("server", Refused)] == [named]


def test_a_plan_beyond_the_dealers_limit_is_refused_by_its_name(
    model: MaskedModel, run: Run, heard: Heard
) -> None:
    served = serving(model, run, limits=Limits(plan_bytes=100))
    with (
        connect(served.server.address, link=served.link) as client,
        pytest.raises(PeerError, match="LimitError"),
    ):
        client.prepare()
    reasons = {refused.reason for refused in heard.wait("dealer", Refused, 2)}
    assert "plan_bytes" in reasons


def test_one_connection_too_many_is_logged_by_its_limit(
    model: MaskedModel, run: Run, heard: Heard
) -> None:
    served = serving(model, run, limits=Limits(connections=1))
    with (
        connect(served.server.address, link=served.link),
        pytest.raises(LimitError, match="All 1 connections"),
    ):
        connect(served.server.address, link=served.link)
    assert heard.wait("server", Refused)[0].reason == "connections"


def test_a_greeting_that_takes_too_long_is_logged_by_its_limit(
    model: MaskedModel, run: Run, heard: Heard
) -> None:
    served = serving(model, run, limits=Limits(handshake_s=0.2))
    with silent(served.server.address):
        assert heard.wait("server", Refused)[0].reason == "handshake_s"


def test_waiting_at_the_dealer_has_limits_of_time_and_number(
    model: MaskedModel, run: Run, heard: Heard
) -> None:
    served = serving(model, run, limits=Limits(waiting=1))
    names = [f"{number:032x}" for number in range(2)]
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(waiting(served.dealer.address, model.plan, name))
        assert heard.wait("dealer", Refused)[0].reason == "waiting"
    slow = serving(model, run, limits=Limits(waiting_s=0.1))
    with (
        waiting(slow.dealer.address, model.plan) as channel,
        pytest.raises(LimitError, match="No server joined this client"),
    ):
        channel.receive_bytes()


def test_idle_time_is_a_limit_and_silence_in_between_is_none() -> None:
    first, second = socket_pair(timeout=0.1)
    with first, second:
        with pytest.raises(LimitError, match="asked for nothing") as idle:
            first.wait(timeout=0.05)
        assert idle.value.limit == "idle_s"
        with pytest.raises(PeerError, match=r"was silent for 0\.1 s") as silence:
            first.receive_bytes()
        assert type(silence.value) is PeerError
