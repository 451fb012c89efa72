"""Connections that say nothing, or too little, delay nobody and do not stay."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path

import pytest
import torch

from crypten_espn.errors import PeerError
from crypten_espn.keys import make_keys
from crypten_espn.masked.model import MaskedModel
from crypten_espn.serving.boundary import told, traced
from crypten_espn.serving.client import connect
from crypten_espn.serving.dealer import DealerServer
from crypten_espn.serving.link import Limits, Link
from crypten_espn.serving.memory import give_back, keep_together
from crypten_espn.serving.messages import Seed, hear
from crypten_espn.serving.server import ModelServer
from crypten_espn.wire.connect import parse_address
from crypten_espn.wire.tls import TLS

from .conftest import Run, Served, serving
from .fuzz import mutated
from .raw import NAME, at_server, greeted, refusal, say, waiting


def silent(address: str) -> socket.socket:
    """A connection that never says a word."""
    return socket.create_connection(parse_address(address), timeout=20)


def everything(sock: socket.socket) -> bytes:
    """What the other side says before it closes."""
    heard = b""
    with contextlib.suppress(ConnectionError):
        while piece := sock.recv(4096):
            heard += piece
    return heard


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TLS]:
    """Certificates of each role, and of a second client."""
    folder = tmp_path_factory.mktemp("keys")
    host = ["127.0.0.1"]
    made = make_keys(folder, servers=host, dealers=host, clients=["alice", "bob"])
    found = {}
    for key in made:
        name = "bob" if "bob" in key.certificate.name else key.role
        found[name] = TLS(key.certificate, key.key, key.authority)
    return found


def over_tls(
    model: MaskedModel, run: Run, keys: dict[str, TLS], folder: Path | None = None
) -> tuple[ModelServer, DealerServer]:
    dealer = run(DealerServer("127.0.0.1:0", tls=keys["dealer"], timeout=20))
    link = Link(dealer.address, folder, keys["server"], timeout=20)
    return run(ModelServer(model, "127.0.0.1:0", link=link)), dealer


def test_three_silent_connections_delay_nobody(
    model: MaskedModel, run: Run, keys: dict[str, TLS]
) -> None:
    """The accept loop does no handshake: the greeting of others goes on at once."""
    server, dealer = over_tls(model, run, keys)
    link = Link(dealer.address, tls=keys["client"], timeout=20)
    with contextlib.ExitStack() as stack:
        for address in (server.address, dealer.address):
            for _ in range(3):
                stack.enter_context(silent(address))
        with connect(server.address, link=link) as client:
            client.prepare()
            assert client.remaining == 1


def test_a_connection_that_does_not_greet_is_told_and_ended(
    model: MaskedModel, run: Run
) -> None:
    served = serving(model, run, limits=Limits(handshake_s=0.3))
    with silent(served.server.address) as nobody:
        assert b"0.3 s" in everything(nobody)


def test_a_greeting_that_trickles_is_ended_too(model: MaskedModel, run: Run) -> None:
    """A byte now and then does not extend the time for the whole greeting."""
    served = serving(model, run, limits=Limits(handshake_s=0.5))
    stop = threading.Event()
    with silent(served.server.address) as slow:

        def trickle() -> None:
            with contextlib.suppress(OSError):
                for byte in b"ESPN" + bytes(1000):
                    slow.send(bytes([byte]))
                    if stop.wait(0.05):
                        return

        thread = threading.Thread(target=trickle)
        thread.start()
        everything(slow)  # returns: the server has closed
        stop.set()
        thread.join(20)


def test_the_oldest_of_too_many_silent_connections_makes_room(
    model: MaskedModel, run: Run
) -> None:
    served = serving(model, run, limits=Limits(greeting=2))
    with contextlib.ExitStack() as stack:
        nobodies = [
            stack.enter_context(silent(served.server.address)) for _ in range(3)
        ]
        assert b"makes room for a newer one" in everything(nobodies[0])
        with connect(served.server.address, link=served.link) as client:
            x = served.inputs[:1]
            assert served.is_right(x, client.predict(x))


def test_memory_is_given_back_when_somebody_has_left(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = threading.Event()
    monkeypatch.setattr("crypten_espn.serving.host.give_back", given.set)
    with connect(served.server.address, link=served.link):
        pass
    assert given.wait(60)
    keep_together()  # what these do is the C library's, and never fails
    give_back()


@pytest.mark.parametrize("role", ["server", "dealer"])
def test_a_wrong_role_is_refused_by_name(served: Served, role: str) -> None:
    with greeted(served.server.address, role, "server") as channel:  # type: ignore[arg-type]
        assert f"talks to a client; greeted by a {role}" in refusal(channel)


def test_a_dealer_is_not_greeted_by_a_dealer(served: Served) -> None:
    with greeted(served.dealer.address, "dealer", "dealer") as channel:  # type: ignore[arg-type]
        assert "talks to a server or a client" in refusal(channel)


def test_another_clients_session_cannot_be_entered(
    model: MaskedModel, run: Run, keys: dict[str, TLS], tmp_path: Path
) -> None:
    """Whoever names a session must show the certificate that it began with."""
    server, dealer = over_tls(model, run, keys, tmp_path / "server")
    alice = Link(dealer.address, tmp_path / "client", keys["client"], timeout=20)
    bob = Link(dealer.address, tmp_path / "client", keys["bob"], timeout=20)
    with connect(server.address, link=alice) as client:
        client.prepare(2)
        with pytest.raises(PeerError, match="belongs to another certificate's name"):
            connect(server.address, link=bob)
        client.predict(model_input(model))
    # Nor later, when nobody uses it and it lies on the disk.
    with pytest.raises(PeerError, match="belongs to another certificate's name"):
        connect(server.address, link=bob)
    with connect(server.address, link=alice) as client:
        client.predict(model_input(model))


def test_a_stranger_who_takes_a_clients_place_at_the_dealer_is_noticed(
    model: MaskedModel, run: Run, keys: dict[str, TLS]
) -> None:
    """The server compares whom the dealer paired it with with whom it talks to."""
    server, dealer = over_tls(model, run, keys)
    with (
        waiting(dealer.address, model.plan, NAME, tls=keys["bob"]) as stranger,
        at_server(server.address, model.plan, tls=keys["client"]) as client,
    ):
        wish = {"session": NAME, "start": 0, "count": 1, "batch": 1}
        say(client, message="prepare", **wish)
        assert "paired this session with another certificate" in refusal(client)
        hear(stranger, Seed)  # a seed that nothing is ever prepared with
        assert "another certificate" in refusal(stranger)


def test_mutated_messages_to_running_hosts_raise_nothing_foreign(
    served: Served, model: MaskedModel, caplog: pytest.LogCaptureFixture
) -> None:
    places = [("client", "server", served.server), ("client", "dealer", served.dealer)]
    places.append(("server", "dealer", served.dealer))
    for number, data in enumerate(mutated(150, seed=5)):
        role, peer, host = places[number % 3]
        with greeted(host.address, role, peer) as channel:  # type: ignore[arg-type]
            channel.send_bytes(data)
            with contextlib.suppress(PeerError):
                while True:
                    channel.receive_bytes()
                    channel.send_bytes(data)
    assert [r for r in caplog.records if r.levelname == "ERROR"] == []
    x = served.inputs[:1]
    with connect(served.server.address, link=served.link) as client:
        assert served.is_right(x, client.predict(x))


def model_input(model: MaskedModel) -> torch.Tensor:
    return torch.zeros(1, *model.plan.input.shape)


def test_what_a_peer_is_told_of_a_foreign_error_holds_none_of_its_text() -> None:
    try:
        raise KeyError("secret\x1b[2J")
    except KeyError as error:
        assert told(error) == "internal error"
        assert "secret" not in traced(error) and "KeyError at test_host.py" in traced(
            error
        )
    assert told(OSError(28, "No space left on device", "/secret")) == (
        "internal error (No space left on device)"
    )
    assert told(PeerError("gone")) == "PeerError: gone"


@pytest.mark.parametrize("limit", ["connections", "waiting_s", "batch", "plan_bytes"])
def test_limits_are_positive(limit: str) -> None:
    with pytest.raises(ValueError, match=limit):
        Limits(**{limit: 0})
