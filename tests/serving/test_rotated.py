"""Sessions over certificates that are replaced or revoked while they last."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from crypten_espn.errors import RevokedError
from crypten_espn.keys import make_keys
from crypten_espn.masked.model import MaskedModel
from crypten_espn.serving.client import Client, connect
from crypten_espn.serving.dealer import DealerServer
from crypten_espn.serving.link import Link
from crypten_espn.serving.server import ModelServer
from crypten_espn.wire.tls import TLS

from ..wire.test_rotation import fingerprint
from .conftest import Run


class Party:
    """Two certificates of each role and the one in use, in files of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        host = ["127.0.0.1"]
        for turn in ("old", "new"):
            make_keys(folder, servers=host, dealers=host, clients=["alice"])
            for role, name in (
                ("server", "127.0.0.1"),
                ("dealer", "127.0.0.1"),
                ("client", "alice"),
            ):
                for end in ("pem", "key"):
                    path = folder / f"{role}-{name}.{end}"
                    path.rename(folder / f"{role}.{end}.{turn}")
        self.revoked = folder / "revoked"
        self.revoked.write_text("")
        for role in ("server", "dealer", "client"):
            self.show(role, "old")

    def show(self, role: str, turn: str) -> None:
        """Put a pair in place."""
        for end in ("key", "pem"):
            shutil.copy(
                self._folder / f"{role}.{end}.{turn}", self._folder / f"{role}.{end}"
            )

    def tls(self, role: str) -> TLS:
        folder = self._folder
        return TLS(
            folder / f"{role}.pem",
            folder / f"{role}.key",
            folder / "authority.pem",
            self.revoked,
        )


@pytest.fixture
def party(tmp_path: Path) -> Party:
    return Party(tmp_path / "keys")


@pytest.fixture
def hosts(
    model: MaskedModel, run: Run, party: Party
) -> tuple[ModelServer, DealerServer]:
    dealer = run(DealerServer("127.0.0.1:0", tls=party.tls("dealer"), timeout=20))
    link = Link(dealer.address, tls=party.tls("server"), timeout=20)
    return run(ModelServer(model, "127.0.0.1:0", link=link)), dealer


def client_of(party: Party, hosts: tuple[ModelServer, DealerServer]) -> Client:
    server, dealer = hosts
    link = Link(dealer.address, tls=party.tls("client"), timeout=20)
    return connect(server.address, link=link)


def test_a_client_goes_on_with_its_material_under_a_new_certificate(
    party: Party, model: MaskedModel, run: Run, tmp_path: Path
) -> None:
    dealer = run(DealerServer("127.0.0.1:0", tls=party.tls("dealer"), timeout=20))
    link = Link(dealer.address, tmp_path / "server", party.tls("server"), timeout=20)
    server = run(ModelServer(model, "127.0.0.1:0", link=link))
    mine = Link(dealer.address, tmp_path / "client", party.tls("client"), timeout=20)
    x = torch.zeros(1, *model.plan.input.shape)
    with connect(server.address, link=mine) as client:
        client.prepare(5)
        client.predict(x)
        party.show("client", "new")
        client.predict_many([x, x], in_flight=2)
    with connect(server.address, link=mine) as client:
        assert client.remaining == 2
        client.predict(x)


@pytest.mark.parametrize("role", ["server", "dealer", "client"])
def test_a_session_that_began_before_a_rotation_prepares_and_predicts_after_it(
    role: str,
    party: Party,
    hosts: tuple[ModelServer, DealerServer],
    model: MaskedModel,
) -> None:
    """The dealer pairs the parties by the certificates they showed each other."""
    x = torch.zeros(1, *model.plan.input.shape)
    with client_of(party, hosts) as before:
        party.show(role, "new")
        first = before.predict(x)
        with client_of(party, hosts) as after:
            assert float((after.predict(x) - first).abs().max()) < 0.02
        before.predict(x)


def test_a_client_that_is_revoked_while_connected_gets_no_further_answer(
    party: Party, hosts: tuple[ModelServer, DealerServer], model: MaskedModel
) -> None:

    x = torch.zeros(1, *model.plan.input.shape)
    with client_of(party, hosts) as client:
        client.prepare(2)
        client.predict(x)
        party.revoked.write_text(fingerprint(Path(party.tls("client").certificate)))
        with pytest.raises(RevokedError, match="the server stopped: RevokedError"):
            client.predict(x)
    with pytest.raises(RevokedError):
        client_of(party, hosts)


def test_a_client_gives_a_server_that_is_revoked_nothing_more(
    party: Party, hosts: tuple[ModelServer, DealerServer], model: MaskedModel
) -> None:

    with client_of(party, hosts) as client:
        client.prepare(2)
        party.revoked.write_text(fingerprint(Path(party.tls("server").certificate)))
        with pytest.raises(RevokedError, match="certificate of a server was revoked"):
            client.predict(torch.zeros(1, *model.plan.input.shape))
        assert client.remaining == 2
