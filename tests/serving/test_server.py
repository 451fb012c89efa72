"""What a server refuses, by name, and that it goes on serving the others."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from pathlib import Path

import pytest

from crypten_espn.errors import EspnError, MaterialError, PeerError
from crypten_espn.masked.model import MaskedModel
from crypten_espn.masked.preparing import ServerPreparation
from crypten_espn.masked.store import DATA, open_data
from crypten_espn.masked.store_writer import MaterialWriter
from crypten_espn.serving.client import connect
from crypten_espn.serving.link import Limits, Link
from crypten_espn.serving.messages import Hello, Welcome, hear, receive_plan, tell
from crypten_espn.serving.server import ModelServer
from crypten_espn.serving.stock import material_bytes

from .conftest import Run, Served, serving
from .raw import NAME, at_server, greeted, refusal, say


def still_serves(served: Served) -> bool:
    x = served.inputs[:1]
    with connect(served.server.address, link=served.link) as client:
        return served.is_right(x, client.predict(x))


@pytest.mark.parametrize(
    "message",
    [
        b"not json",
        b"[]",
        b"[" * 4000,
        b"\xff",
        b'{"message": "hello", "session": "../../etc", "next_index": 0}',
        b'{"message": "hello", "session": null, "next_index": -1}',
        b'{"message": "hello", "session": null, "next_index": 0, "rank": 0}',
        b'{"message": "goodbye"}',
    ],
)
def test_greetings_that_are_none_are_refused_with_a_reason(
    served: Served, message: bytes
) -> None:
    with greeted(served.server.address, "client", "server") as channel:
        channel.send_bytes(message)
        assert "not the Hello that was expected" in refusal(channel)


def test_an_unknown_session_is_refused_with_a_reason(served: Served) -> None:
    with greeted(served.server.address, "client", "server") as channel:
        tell(channel, Hello(session=NAME, next_index=0))
        assert "no material of the session" in refusal(channel)
    assert still_serves(served)


@pytest.mark.parametrize(
    ("wish", "named"),
    [
        ({"count": 10**9}, "1000000000 inferences were asked for"),
        ({"batch": 10**9}, "1000000000 inputs in one inference"),
        ({"batch": 10**30}, "batch"),
        ({"count": -1}, "count"),
        ({"start": 2**32 - 1}, "a session has 4294967296"),
        ({"session": "../" * 10}, "session"),
    ],
)
def test_a_wish_beyond_a_limit_is_refused_before_anything_is_prepared(
    served: Served, model: MaskedModel, wish: dict[str, object], named: str
) -> None:
    fields = {"session": NAME, "start": 0, "count": 2, "batch": 1}
    with at_server(served.server.address, model.plan) as channel:
        say(channel, message="prepare", **(fields | wish))
        assert named in refusal(channel)


def test_material_in_memory_is_bounded_over_all_sessions(
    model: MaskedModel, run: Run
) -> None:
    each = material_bytes(model.plan, "server", 1, "server")
    served = serving(model, run, limits=Limits(material_bytes=3 * each))
    with connect(served.server.address, link=served.link) as first:
        first.prepare(2)
        with (
            connect(served.server.address, link=served.link) as second,
            pytest.raises(PeerError, match="already held"),
        ):
            second.prepare(2)
        first.predict(served.inputs[:1])  # what is used makes room
        with connect(served.server.address, link=served.link) as second:
            second.prepare(2)


def test_prepared_inferences_of_a_session_are_bounded(
    model: MaskedModel, run: Run
) -> None:
    served = serving(model, run, limits=Limits(prepared=3))
    with connect(served.server.address, link=served.link) as client:
        client.prepare(2)
        with pytest.raises(PeerError, match="2 inferences were asked for beside 2"):
            client.prepare(2)


def test_a_new_session_cannot_take_anothers_name(
    served: Served, model: MaskedModel
) -> None:
    with connect(served.server.address, link=served.link) as client:
        client.prepare(2)
        with at_server(served.server.address, model.plan) as stranger:
            say(
                stranger,
                message="prepare",
                session=client.session,
                start=0,
                count=1,
                batch=1,
            )
            assert "already taken" in refusal(stranger)
        x = served.inputs[:1]
        assert served.is_right(x, client.predict(x))


def test_one_connection_more_than_allowed_is_refused_by_name(
    model: MaskedModel, run: Run
) -> None:
    served = serving(model, run, limits=Limits(connections=1))
    with (
        connect(served.server.address, link=served.link),
        pytest.raises(PeerError, match="All 1 connections are in use"),
    ):
        connect(served.server.address, link=served.link)


def test_an_idle_client_is_told_before_it_is_dropped(
    model: MaskedModel, run: Run
) -> None:
    served = serving(model, run, limits=Limits(idle_s=0.2))
    with at_server(served.server.address, model.plan) as channel:
        assert "was silent for 0.2 s" in refusal(channel)


def test_a_client_that_dies_while_preparing_leaves_the_server_serving(
    served: Served, model: MaskedModel
) -> None:
    client = connect(served.server.address, link=served.link)
    client.prepare(1)
    with at_server(served.server.address, model.plan, client.session) as another:
        another.close()
    assert still_serves(served)
    client.close()


def test_an_unforeseen_failure_is_told_and_logged_without_its_text(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("the seed is 1234")

    with connect(served.server.address, link=served.link) as client:
        with monkeypatch.context() as patched:
            patched.setattr(ServerPreparation, "prepare", fail)
            with pytest.raises(PeerError, match="internal error") as error:
                client.prepare()
        assert "1234" not in str(error.value)
    assert "KeyError at" in caplog.text and "1234" not in caplog.text
    names = {r.name for r in caplog.records if r.levelno == logging.ERROR}
    assert names == {"crypten_espn.serving.server"}
    assert still_serves(served)


def test_a_full_disk_is_told_to_the_client(
    model: MaskedModel,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served = serving(model, run, directory=tmp_path / "kept")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(MaterialWriter, "add", full)
        with (
            connect(served.server.address, link=served.link) as client,
            pytest.raises(PeerError, match="No space left on device"),
        ):
            client.prepare()
    assert still_serves(served)
    served.server.close()
    assert os.listdir(tmp_path / "kept") == []  # nothing stays of either session


@pytest.mark.parametrize("whose", ["server", "client"])
def test_a_changed_record_is_named_and_the_session_goes_on_behind_it(
    whose: str, model: MaskedModel, run: Run, tmp_path: Path
) -> None:
    served = serving(model, run, directory=tmp_path / "server")
    kept = Link(served.dealer.address, tmp_path / "client", timeout=20)
    x = served.inputs[:1]
    with connect(served.server.address, link=kept) as client:
        client.prepare(3)
    (path,) = (tmp_path / whose).rglob(DATA)
    with open_data(path.parent) as data:
        place = data.header.offset(0)
        byte = os.pread(data.handle, 1, place)
        os.pwrite(data.handle, bytes([byte[0] ^ 1]), place)
    with (
        connect(served.server.address, link=kept) as client,
        pytest.raises((MaterialError, PeerError), match="record of inference 0 is dam"),
    ):
        client.predict(x)
    with connect(served.server.address, link=kept) as client:
        assert client.remaining == 2
        assert served.is_right(x, client.predict(x))
        assert served.is_right(x, client.predict(x))


def test_a_folder_that_cannot_be_written_is_told_to_the_client(
    model: MaskedModel, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    served = serving(model, run, directory=tmp_path / "file")
    with (
        connect(served.server.address, link=served.link) as client,
        pytest.raises(PeerError, match="stopped"),
    ):
        client.prepare()


def test_a_folder_of_another_servers_session_is_refused_by_both(
    model: MaskedModel, run: Run, tmp_path: Path
) -> None:
    served = serving(model, run, directory=tmp_path / "server")
    kept = Link(served.dealer.address, tmp_path / "client", timeout=20)
    with connect(served.server.address, link=kept) as client:
        client.prepare(2)
    other = run(ModelServer(model, "127.0.0.1:0", timeout=20))
    with pytest.raises(PeerError, match="no material of the session"):
        connect(other.address, link=kept)


def test_stored_material_outlives_connections_and_servers(
    model: MaskedModel, run: Run, tmp_path: Path
) -> None:
    served = serving(model, run, directory=tmp_path / "server")
    kept = Link(served.dealer.address, tmp_path / "client", timeout=20)
    x = served.inputs
    with connect(served.server.address, link=kept) as client:
        client.prepare(8)
        for i in range(2):
            assert served.is_right(x[i : i + 1], client.predict(x[i : i + 1]))
    for _ in range(2):  # reading ahead claims nothing: all eight can be used
        link = Link(served.dealer.address, tmp_path / "server", timeout=20)
        again = run(ModelServer(model, "127.0.0.1:0", link=link))
        with connect(again.address, link=kept) as client:
            assert client.remaining % 3 == 0
            for _ in range(3):
                assert served.is_right(x[:1], client.predict(x[:1]))
        again.close()
    assert client.remaining == 0
    assert os.listdir(tmp_path / "server") == []  # used-up folders go


def test_a_restored_copy_of_the_clients_folder_is_refused(
    model: MaskedModel, run: Run, tmp_path: Path
) -> None:
    served = serving(model, run, directory=tmp_path / "server")
    kept = Link(served.dealer.address, tmp_path / "client", timeout=20)
    with connect(served.server.address, link=kept) as client:
        client.prepare(4)
    shutil.copytree(tmp_path / "client", tmp_path / "copy")
    with connect(served.server.address, link=kept) as client:
        client.predict(served.inputs[:1])
    shutil.rmtree(tmp_path / "client")
    shutil.copytree(tmp_path / "copy", tmp_path / "client")
    with pytest.raises(EspnError, match="restored from a copy"):
        connect(served.server.address, link=kept)


def test_two_clients_that_prepare_into_one_folder_are_told_so(
    model: MaskedModel, run: Run, tmp_path: Path
) -> None:
    served = serving(model, run, directory=tmp_path / "server")
    kept = Link(served.dealer.address, tmp_path / "client", timeout=20)
    with (
        connect(served.server.address, link=kept) as first,
        connect(served.server.address, link=kept) as second,
    ):
        first.prepare(2)
        with pytest.raises(MaterialError, match="still holds material"):
            second.prepare(2)
        assert served.is_right(served.inputs[:1], first.predict(served.inputs[:1]))


def test_a_server_that_closes_says_so(served: Served, model: MaskedModel) -> None:
    with at_server(served.server.address, model.plan) as channel:
        served.server.close()
        assert "shutting down" in refusal(channel)
    with pytest.raises(PeerError, match="Cannot reach"):
        connect(served.server.address, timeout=0.2)


def test_a_plan_longer_than_the_client_takes_is_not_read(
    served: Served, model: MaskedModel
) -> None:
    with greeted(served.server.address, "client", "server") as channel:
        tell(channel, Hello(session=None, next_index=0))
        hear(channel, Welcome)
        with pytest.raises(PeerError, match="out of step"):
            receive_plan(channel, limit=100)
