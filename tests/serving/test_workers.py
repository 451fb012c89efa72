"""Processes that share an address: a peer reaches the one that holds its session.

Here they are hosts of one process that listen apart: a test says who is reached.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from crypten_espn.errors import EspnError, PeerError
from crypten_espn.keys import make_keys
from crypten_espn.masked.model import MaskedModel
from crypten_espn.serving.client import connect
from crypten_espn.serving.dealer import DealerServer
from crypten_espn.serving.events import Dealt, HandedOver, Inference, InferenceBegun
from crypten_espn.serving.handover import Letter, take_over
from crypten_espn.serving.link import Link
from crypten_espn.serving.metrics import summed
from crypten_espn.serving.places import Places
from crypten_espn.serving.server import ModelServer
from crypten_espn.serving.share import Share
from crypten_espn.wire.connect import listen, to_listen_on
from crypten_espn.wire.tls import TLS

from ..masked.cases import residual
from .conftest import Heard, Run


class Workers:
    """Two dealers and two servers; two of a kind are workers of one service."""

    def __init__(
        self, model: MaskedModel, run: Run, folder: Path, tls: dict[str, TLS]
    ) -> None:
        self._folder, self._tls = folder, tls
        self.dealers = [
            run(
                DealerServer(
                    "127.0.0.1:0",
                    tls=tls.get("dealer"),
                    timeout=20,
                    share=self._share("deal", number),
                )
            )
            for number in range(2)
        ]
        # The server of a session is not at the worker where its client waits.
        link = Link(
            self.dealers[1].address, folder / "kept", tls.get("server"), timeout=20
        )
        self.servers = [
            run(
                ModelServer(
                    model, "127.0.0.1:0", link=link, share=self._share("serve", number)
                )
            )
            for number in range(2)
        ]
        network, self.inputs = residual()
        self.expected = network(self.inputs)

    def _share(self, kind: str, number: int) -> Share:
        place = self._folder / kind
        place.mkdir(mode=0o700, exist_ok=True)
        return Share(
            listen("127.0.0.1:0", to_listen_on("127.0.0.1:0")),
            place,
            f"{kind}-{number}",
        )

    def link(self, directory: Path | None = None) -> Link:
        first = self.dealers[0].address
        return Link(first, directory, self._tls.get("client"), timeout=20)


@pytest.fixture(params=["plain", "TLS"])
def workers(
    request: pytest.FixtureRequest, model: MaskedModel, run: Run, tmp_path: Path
) -> Iterator[Workers]:
    tls = {}
    if request.param == "TLS":
        host = ["127.0.0.1"]
        made = make_keys(
            tmp_path / "keys", servers=host, dealers=host, clients=["alice"]
        )
        tls = {key.role: TLS(key.certificate, key.key, key.authority) for key in made}
    yield Workers(model, run, tmp_path, tls)


def test_a_server_reaches_the_dealer_at_which_its_client_waits(
    workers: Workers, heard: Heard
) -> None:
    x = workers.inputs[:1]
    with connect(workers.servers[0].address, link=workers.link()) as client:
        client.prepare(2)
        for _ in range(2):
            assert (client.predict(x) - workers.expected[:1]).abs().max() < 0.02
    (handed,) = heard.of("dealer", HandedOver)
    assert handed.role == "server"
    (dealt,) = heard.of("dealer", Dealt)  # once, whoever was asked
    assert (dealt.start, dealt.count) == (0, 2)


def test_connections_of_one_session_are_answered_by_one_worker(
    workers: Workers, heard: Heard, tmp_path: Path
) -> None:
    x, kept = workers.inputs, workers.link(tmp_path / "client")
    with ExitStack() as stack:
        first = stack.enter_context(connect(workers.servers[0].address, link=kept))
        first.prepare(4)
        second = stack.enter_context(connect(workers.servers[1].address, link=kept))
        assert second.session == first.session
        for number, client in enumerate([second, first, second, first]):
            logits = client.predict(x[number : number + 1])
            assert (logits - workers.expected[number]).abs().max() < 0.02
    assert [handed.role for handed in heard.of("server", HandedOver)] == ["client"]
    used = [event.index for event in heard.of("server", InferenceBegun)]
    assert used == [0, 1, 2, 3]
    assert len(heard.wait("server", Inference, 4)) == 4


def test_a_session_on_the_disk_moves_when_its_worker_is_gone(
    workers: Workers, heard: Heard, tmp_path: Path
) -> None:
    x, kept = workers.inputs[:1], workers.link(tmp_path / "client")
    with connect(workers.servers[0].address, link=kept) as client:
        client.prepare(2)
        client.predict(x)
        workers.servers[0].close()
    with connect(workers.servers[1].address, link=kept) as client:
        assert client.remaining == 1
        assert (client.predict(x) - workers.expected[:1]).abs().max() < 0.02
    assert [event.index for event in heard.of("server", InferenceBegun)] == [0, 1]


def test_a_place_is_held_once_and_taken_over_from_who_is_gone(tmp_path: Path) -> None:
    one, two = Places(tmp_path, "one"), Places(tmp_path, "two")
    assert one.hold("s") == "one" and two.hold("s") == "one"
    two.leave("s")  # not its own
    assert two.hold("s") == "one"
    assert two.hold("s", instead_of="one") == "two"
    assert one.hold("s", instead_of="one") == "two"  # somebody was faster
    two.leave("s")
    two.leave("s")
    assert one.hold("s") == "one"


def test_what_is_no_peer_is_not_taken_over(tmp_path: Path) -> None:
    import socket

    letter = Letter("client", "", "", "", "")
    assert "client" in repr(letter)
    for data in (b"", b"\x00\x00\x00\x02{}", b"\xff\xff\xff\xff"):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            if data:
                socket.send_fds(ours, [data], [ours.fileno()])
            ours.shutdown(socket.SHUT_WR)
            with pytest.raises((PeerError, EspnError)):
                take_over(theirs)


def test_pages_of_several_workers_are_added_up() -> None:
    def page(answered: int, left: int, since: float) -> bytes:
        return (
            "# HELP espn_inferences_total Answered\n"
            "# TYPE espn_inferences_total counter\n"
            f'espn_inferences_total{{role="a"}} {answered}\n'
            "# HELP espn_inferences_created Answered\n"
            "# TYPE espn_inferences_created gauge\n"
            f"espn_inferences_created {since}\n"
            "# HELP espn_left Left\n# TYPE espn_left gauge\n"
            f"espn_left {left}\n"
            "# HELP espn_seconds Seconds\n# TYPE espn_seconds histogram\n"
            f'espn_seconds_bucket{{le="1.0"}} {answered}\n'
            f'espn_seconds_bucket{{le="+Inf"}} {answered}\n'
            f"espn_seconds_count {answered}\nespn_seconds_sum {answered}\n"
        ).encode()

    text = summed([page(1, 2, 50.0), page(3, 4, 40.0)], gone=[page(5, 6, 30.0)])
    lines = set(text.decode().splitlines())
    assert 'espn_inferences_total{role="a"} 9.0' in lines
    assert "espn_left 6.0" in lines  # what is gone has none left
    assert "espn_inferences_created 30.0" in lines
    assert 'espn_seconds_bucket{le="+Inf"} 9.0' in lines
