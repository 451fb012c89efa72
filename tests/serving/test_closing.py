"""A host that stops: what is under way is finished, or burnt, and everybody is told."""

from __future__ import annotations

import threading
import time

import pytest

from crypten_espn.errors import ClosingError, PeerError
from crypten_espn.masked.model import MaskedModel
from crypten_espn.serving.client import connect
from crypten_espn.serving.events import (
    Burnt,
    Dealing,
    Inference,
    InferenceBegun,
    Stopped,
    Stopping,
)
from crypten_espn.serving.link import Limits

from .conftest import Heard, Run, Served, serving
from .raw import at_server, paired, refusal, say
from .stalled import stalled


def test_an_inference_under_way_is_finished_before_the_server_ends(
    served: Served, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = served.inputs[:1]
    with connect(served.server.address, link=served.link) as client:
        client.prepare(2)
        with stalled(monkeypatch, client, x) as held:
            heard.wait("server", InferenceBegun)
            closing = threading.Thread(target=served.server.close)
            closing.start()
            (stopping,) = heard.wait("server", Stopping)
            assert stopping.under_way == 1
            with pytest.raises(PeerError):  # nobody new is let in meanwhile
                connect(served.server.address, timeout=0.2)
            held.go_on()
        closing.join(60)
        assert served.is_right(x, held.result)  # type: ignore[arg-type]
    assert heard.of("server", Stopped)[0].burnt == 0
    assert len(heard.of("server", Inference)) == 1
    assert heard.of("server", Burnt) == []


def test_what_is_not_finished_in_time_is_burnt_and_said_so(
    model: MaskedModel, run: Run, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serving(model, run, limits=Limits(grace_s=0.1))
    with connect(served.server.address, link=served.link) as client:
        client.prepare(2)
        with stalled(monkeypatch, client, served.inputs[:1]) as held:
            heard.wait("server", InferenceBegun)
            served.server.close()
            held.go_on()
        assert isinstance(held.error, ClosingError)
    assert heard.of("server", Stopped)[0].burnt == 1
    (burnt,) = heard.of("server", Burnt)
    assert burnt.index == 0
    (mine,) = heard.of("client", Burnt)
    assert (mine.session, mine.index) == (burnt.session, burnt.index)


def test_a_client_that_asks_for_nothing_is_told_at_once(
    served: Served, model: MaskedModel, heard: Heard
) -> None:
    with at_server(served.server.address, model.plan) as channel:
        served.server.close()
        assert "ClosingError: It is shutting down" in refusal(channel)
    assert heard.of("server", Stopping)[0].under_way == 0


def test_a_second_close_does_nothing(served: Served, heard: Heard) -> None:
    for _ in range(2):
        served.server.close()
    assert len(heard.of("server", Stopped)) == 1


def test_a_dealer_that_stops_finishes_the_order_under_way(
    served: Served, model: MaskedModel, heard: Heard
) -> None:
    """A server that does not take what it ordered is waited for, and then cut."""
    with paired(served.dealer.address, model.plan) as (server, _):
        heard.wait("dealer", Dealing)
        say(server, message="order", start=0, count=1, batch=1)
        server.wait(timeout=20, rings=range(1 << 40))  # it has begun to deal
        served.dealer.close()
        while True:  # all that was ordered, then why it ends
            try:
                header = server.wait(timeout=20, rings=range(1 << 40))
                server.receive_packed(header.size, tag=header.tag)
            except PeerError as error:
                assert isinstance(error, ClosingError)
                break
    assert heard.of("dealer", Stopped)[0].burnt == 0


def test_closing_waits_for_nobody_without_something_under_way(served: Served) -> None:
    """However many are connected; the grace period is for work alone."""
    with (
        connect(served.server.address, link=served.link),
        connect(served.server.address, link=served.link),
    ):
        before = time.monotonic()
        served.server.close()
        assert time.monotonic() - before < Limits().grace_s
