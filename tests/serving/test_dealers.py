"""Several dealers: the server names them, the client takes one that it trusts."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence

import pytest

from crypten_espn.errors import MaterialError, PeerError
from crypten_espn.masked.model import MaskedModel
from crypten_espn.serving.client import connect
from crypten_espn.serving.dealer import DealerServer
from crypten_espn.serving.dealers import DEALERS, Dealers, trusted
from crypten_espn.serving.events import Dealing
from crypten_espn.serving.link import Link
from crypten_espn.serving.server import ModelServer

from ..masked.cases import residual
from .conftest import Heard, Run, Served
from .raw import NAME, at_server, refusal, say


def serving(
    model: MaskedModel, run: Run, dealers: Sequence[DealerServer | str]
) -> tuple[Served, Link]:
    """A server that works with these, and a link of a client that trusts them."""
    addresses = [d if isinstance(d, str) else d.address for d in dealers]
    link = Link(addresses, timeout=20)
    server = run(ModelServer(model, "127.0.0.1:0", link=link))
    network, inputs = residual()
    first = next(d for d in dealers if isinstance(d, DealerServer))
    return Served(server, first, network, inputs), link


def dealer(run: Run) -> DealerServer:
    return run(DealerServer("127.0.0.1:0", timeout=20))


def test_sessions_take_turns_at_the_dealers(
    model: MaskedModel, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = [dealer(run), dealer(run)]
    served, link = serving(model, run, both)
    x = served.inputs[:1]
    for _ in range(2):
        with connect(served.server.address, link=link) as client:
            assert served.is_right(x, client.predict(x))
    assert [b"sessions_total 1.0" in d.metrics.text() for d in both] == [True, True]


def test_when_one_of_two_dealers_is_gone_sessions_go_on_with_the_other(
    model: MaskedModel, run: Run, heard: Heard
) -> None:
    both = [dealer(run), dealer(run)]
    served, link = serving(model, run, both)
    x = served.inputs[:1]
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(connect(served.server.address, link=link))
            for _ in range(2)
        ]
        for client in clients:
            client.prepare(2)
            assert served.is_right(x, client.predict(x))
        both[0].close()
        # What is prepared needs no dealer; then one client's session has lost its own.
        for _ in range(3):
            for client in clients:
                assert served.is_right(x, client.predict(x))
        with connect(served.server.address, link=link) as new:
            assert served.is_right(x, new.predict(x))
    assert len({event.session for event in heard.of("dealer", Dealing)}) == 4


def test_a_session_whose_dealer_is_gone_says_so_while_material_is_left(
    model: MaskedModel, run: Run
) -> None:
    served, link = serving(model, run, [dealer(run)])
    with connect(served.server.address, link=link) as client:
        client.prepare(2)
        served.dealer.close()
        with pytest.raises(MaterialError, match=r"is gone .* use up the 2 prepared"):
            client.prepare()
        assert served.is_right(served.inputs[:1], client.predict(served.inputs[:1]))


def test_a_dealer_that_holds_still_is_passed_over(model: MaskedModel, run: Run) -> None:
    """It is there, and says nothing: its share of the time, and the next one."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        still = f"127.0.0.1:{silent.getsockname()[1]}"
        served, link = serving(model, run, [still, dealer(run)])
        short = Link(link.dealer, timeout=2)
        with connect(served.server.address, link=short) as client:
            x = served.inputs[:1]
            assert served.is_right(x, client.predict(x))


def test_when_every_dealer_is_gone_each_is_named(model: MaskedModel, run: Run) -> None:
    both = [dealer(run), dealer(run)]
    served, link = serving(model, run, both)
    for host in both:
        host.close()
    with (
        connect(served.server.address, link=Link(link.dealer, timeout=0.5)) as client,
        pytest.raises(PeerError, match="No dealer was found") as error,
    ):
        client.prepare()
    assert all(host.address in str(error.value) for host in both)


def test_a_client_takes_only_dealers_that_it_trusts_in_the_servers_order() -> None:
    assert trusted(["a:1", "b:2"], ["c:3", "b:2", "a:1"]) == [
        ("b:2", "b:2"),
        ("a:1", "a:1"),
    ]
    # One each: the same dealer under two names.
    assert trusted(["dealer.example:1"], ["10.0.0.7:1"]) == [
        ("10.0.0.7:1", "dealer.example:1")
    ]
    with pytest.raises(MaterialError, match=r"deals with c:3, d:4, .* trusts a:1"):
        trusted(["a:1"], ["c:3", "d:4"])
    for mine, named in (([], ["a:1"]), (["a:1"], [])):
        with pytest.raises(MaterialError, match="dealer"):
            trusted(mine, named)


def test_a_dealer_that_failed_is_named_last_for_a_while() -> None:
    now = 0.0
    dealers = Dealers(["a:1", "b:2", "c:3"], clock=lambda: now)
    assert [dealers.named()[0] for _ in range(4)] == ["a:1", "b:2", "c:3", "a:1"]
    dealers.failed("b:2")
    assert {dealers.named()[-1] for _ in range(3)} == {"b:2"}
    now = 61.0
    assert {dealers.named()[0] for _ in range(3)} == {"a:1", "b:2", "c:3"}
    assert Dealers([]).named() == ()


@pytest.mark.parametrize("named", ["", "127.0.0.1:3"])
def test_a_dealer_that_is_not_the_servers_is_refused_by_name(
    named: str, model: MaskedModel, run: Run
) -> None:
    link = Link(["127.0.0.1:1", "127.0.0.1:2"], timeout=20)
    server = run(ModelServer(model, "127.0.0.1:0", link=link))
    with at_server(server.address, model.plan) as client:
        wish = {"session": NAME, "start": 0, "count": 1, "batch": 1, "dealer": named}
        say(client, message="prepare", **wish)
        assert "deals with 127.0.0.1:1, 127.0.0.1:2, and not with" in refusal(client)


def test_too_many_dealers_are_refused_before_anything_starts() -> None:
    assert Link("a:1").dealers == ("a:1",) and Link().dealers == ()
    with pytest.raises(ValueError, match="9 dealers were given"):
        Link([f"d:{number}" for number in range(DEALERS + 1)])
