"""Corrections to either party: a session's choice, which all three sides check."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from crypten_espn import cli
from crypten_espn.errors import LimitError, MaterialError
from crypten_espn.estimate.deployment import Deployment, capacities
from crypten_espn.estimate.engines import engine_costs
from crypten_espn.estimate.processor import REFERENCE
from crypten_espn.estimate.workload import workload
from crypten_espn.graph import export
from crypten_espn.masked.messages import CLIENT, SERVER, Party
from crypten_espn.masked.model import MaskedModel
from crypten_espn.masked.store import material_info
from crypten_espn.serving.client import connect
from crypten_espn.serving.dealer import DealerServer
from crypten_espn.serving.events import Dealt, Refused
from crypten_espn.serving.link import Link
from crypten_espn.serving.local import run_session
from crypten_espn.serving.messages import Hello, Join, tell
from crypten_espn.serving.server import ModelServer
from crypten_espn.serving.supply import Supply
from crypten_espn.simulate import simulate_model
from crypten_espn.wire.channel import Channel
from crypten_espn.wire.frames import HEADER_BYTES
from crypten_espn.wire.packing import packed_bytes

from ..masked.cases import residual
from .conftest import Heard, Run, Served, serving
from .raw import NAME, greeted, refusal, waiting


def asking(served: Served, corrections: Party, folder: Path | None = None) -> Link:
    """A client's link that asks for corrections to one party."""
    return Link(served.dealer.address, folder, timeout=20, corrections=corrections)


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """Bytes of ring elements that came in: by receiver and sender, as they come."""
    counted: Counter[tuple[str, str]] = Counter()
    original = Channel.receive_parts

    def count(channel, sizes, *, tag=0, out=None):
        arrays = original(channel, sizes, tag=tag, out=out)
        size = sum(packed_bytes(*part) for part in sizes)
        counted[channel.role, channel.peer_role] += size
        return arrays

    monkeypatch.setattr(Channel, "receive_parts", count)
    return counted


@pytest.mark.parametrize("corrections", [SERVER, CLIENT])
def test_two_clients_are_answered_at_the_bytes_that_the_estimate_says(
    corrections: Party,
    served: Served,
    model: MaskedModel,
    heard: Heard,
    received: Counter[tuple[str, str]],
    tmp_path: Path,
) -> None:
    path = tmp_path / "network.onnx"
    path.write_bytes(export(served.network, served.inputs[:1]))
    work = workload(str(path), input_shape=(3, 8, 8))
    # What an opening drops follows calibration; the parties' plan says it.
    work = dataclasses.replace(work, plan=model.plan)
    x = torch.randn(9, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    batches, link = [x[:1], x], asking(served, corrections)
    clients = [connect(served.server.address, link=link) for _ in range(2)]
    for client in clients:
        with client:
            for batch in batches:
                client.prepare(1, batch=len(batch))
                assert served.is_right(batch, client.predict(batch))
    costs = [
        engine_costs(work, batch=len(batch), corrections=corrections)[0]
        for batch in batches
    ]
    at_server, at_client = (
        len(clients) * sum(cost.received[place] for cost in costs) for place in (0, 1)
    )
    once = len(clients) * costs[0].once_bytes
    dealt = len(clients) * sum(cost.dealer_bytes for cost in costs)
    assert received["server", "client"] + received["server", "dealer"] == at_server
    assert received["client", "server"] + received["client", "dealer"] == (
        at_client + once
    )
    assert received[corrections, "dealer"] == dealt > 0
    assert len(received) == 3  # the other party has nothing from the dealer
    frames = len(clients) * sum(
        len(model.plan.dealer_messages(batch=len(batch))) for batch in batches
    )
    sent = sum(event.sent for event in heard.of("dealer", Dealt))
    assert sent == dealt + HEADER_BYTES * frames


@pytest.mark.slow
def test_a_servers_line_carries_200_images_a_second_of_resnet18() -> None:
    work = workload("resnet18")
    line = Deployment(rtt_s=0.1, bits_per_second=1e8, server_bits=1e10)
    usual, swapped = (
        engine_costs(work, corrections=corrections)[0]
        for corrections in (SERVER, CLIENT)
    )
    before, after = (capacities(cost, REFERENCE, line) for cost in (usual, swapped))
    assert after["server line"] >= 200 > 5 * before["server line"]
    assert swapped.stored[0] < usual.stored[0] / 10
    # What the server is spared is on the client's line and disk.
    assert after["clients"] < before["clients"]
    assert swapped.stored[1] > 10 * usual.stored[1]
    assert usual.dealer_bytes == swapped.dealer_bytes
    assert sum(usual.received) == sum(swapped.received)


@pytest.mark.parametrize("corrections", [SERVER, CLIENT])
def test_stored_material_of_either_choice_serves_later_connections(
    corrections: Party, model: MaskedModel, run: Run, tmp_path: Path
) -> None:
    served = serving(model, run, directory=tmp_path / "server")
    link = asking(served, corrections, tmp_path / "client")
    x = served.inputs
    with connect(served.server.address, link=link) as client:
        client.prepare(3, batch=2)
    (kept,) = (tmp_path / "server").iterdir()
    infos = {SERVER: material_info(kept), CLIENT: material_info(tmp_path / "client")}
    for info in infos.values():
        assert info.corrections == corrections and info.remaining == 3
        assert f"corrections to the {corrections}" in str(info)
    other: Party = CLIENT if corrections == SERVER else SERVER
    assert infos[corrections].bytes_on_disk > 3 * infos[other].bytes_on_disk
    again = run(
        ModelServer(
            model,
            "127.0.0.1:0",
            link=Link(served.dealer.address, tmp_path / "server", timeout=20),
        )
    )
    for _ in range(3):
        with connect(again.address, link=link) as client:
            assert served.is_right(x[:2], client.predict(x[:2]))
    assert client.remaining == 0


@pytest.mark.parametrize("kept, wanted", [(SERVER, CLIENT), (CLIENT, SERVER)])
def test_material_of_one_choice_is_refused_by_name_in_the_other_on_both_sides(
    kept: Party, wanted: Party, model: MaskedModel, run: Run, tmp_path: Path
) -> None:
    served = serving(model, run, directory=tmp_path / "server")
    with connect(
        served.server.address, link=asking(served, kept, tmp_path / "client")
    ) as client:
        client.prepare()
    name = client.session
    named = f"material with corrections to the {kept}; corrections to the {wanted} were"
    # The client finds out by itself, before it says anything.
    with pytest.raises(MaterialError, match=named):
        connect("127.0.0.1:1", link=asking(served, wanted, tmp_path / "client"))
    # The server, of what lies on its disk.
    with greeted(served.server.address, "client", "server") as channel:
        tell(channel, Hello(session=name, next_index=0, corrections=wanted))
        assert named in refusal(channel)
    # Nothing was used by that.
    link = asking(served, kept, tmp_path / "client")
    with connect(served.server.address, link=link) as client:
        # And of a session that is in use.
        with greeted(served.server.address, "client", "server") as channel:
            tell(channel, Hello(session=name, next_index=0, corrections=wanted))
            assert f"corrections to the {wanted} were asked for" in refusal(channel)
        assert served.is_right(served.inputs[:1], client.predict(served.inputs[:1]))
    # Once it is used up the folder is free for the other choice.
    link = asking(served, wanted, tmp_path / "client")
    with connect(served.server.address, link=link) as client:
        client.prepare()
        assert served.is_right(served.inputs[:1], client.predict(served.inputs[:1]))


def test_a_server_offers_one_choice_alone_and_says_which(
    model: MaskedModel, run: Run, heard: Heard
) -> None:
    served = serving(model, run, corrections=CLIENT)
    with pytest.raises(LimitError, match="offers those to the client alone"):
        connect(served.server.address, link=served.link)
    assert [r.reason for r in heard.wait("server", Refused)] == ["corrections"]
    link = asking(served, CLIENT)
    with connect(served.server.address, link=link) as client:
        assert served.is_right(served.inputs[:1], client.predict(served.inputs[:1]))


def test_parties_that_want_them_to_go_different_ways_are_told_so_by_the_dealer(
    model: MaskedModel, run: Run
) -> None:
    dealer = run(DealerServer("127.0.0.1:0", timeout=20))
    plan = model.plan
    with (
        waiting(dealer.address, plan) as client,
        greeted(dealer.address, "server", "dealer") as server,
    ):
        tell(server, Join(NAME, plan.digest.hex(), CLIENT))
        for channel in (server, client):
            said = refusal(channel)
            assert "the server says the client, the client the server" in said


def test_a_client_that_goes_while_it_is_dealt_to_ends_the_servers_preparation(
    model: MaskedModel, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dealer then has nobody to send to; neither side waits for its time-out."""
    served = serving(model, run)
    original = Channel.receive_parts

    def leave(channel, sizes, *, tag=0, out=None):
        if (channel.role, channel.peer_role, tag) == ("client", "dealer", 1):
            raise KeyboardInterrupt
        return original(channel, sizes, tag=tag, out=out)

    monkeypatch.setattr(Channel, "receive_parts", leave)
    link = asking(served, CLIENT)
    with (
        connect(served.server.address, link=link) as client,
        pytest.raises(KeyboardInterrupt),
    ):
        client.prepare(3)
    monkeypatch.undo()
    with connect(served.server.address, link=link) as client:
        client.prepare(2)
        assert served.is_right(served.inputs[:1], client.predict(served.inputs[:1]))


def test_a_choice_that_is_none_is_refused_at_once(served: Served) -> None:
    for wrong in ("dealer", "Server", 1):
        with pytest.raises(ValueError, match="give 'server' or 'client'"):
            connect(served.server.address, timeout=20, corrections=wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not both"):
        connect(served.server.address, link=served.link, corrections=CLIENT)


def test_inferences_prepared_in_the_background_keep_to_the_choice(
    served: Served, received: Counter[tuple[str, str]]
) -> None:
    link = asking(served, CLIENT)
    with Supply(served.server.address, link, ahead=2, low=1) as supply:
        for _ in range(4):
            x = served.inputs[:1]
            assert served.is_right(x, supply.ask(x).logits)
    assert received["client", "dealer"] > 0 == received["server", "dealer"]


def test_three_processes_give_the_answer_and_its_declared_cost(
    model: MaskedModel,
) -> None:
    network, inputs = residual()
    x = inputs[:1]
    ((logits, cost),) = run_session(model, [x], corrections=CLIENT)
    assert float((logits - network(x)).abs().max()) < 0.02
    assert cost.corrections == CLIENT
    # Everybody sends what a simulation with corrections to the server sends.
    _, usual = simulate_model(model, x)
    assert usual.corrections == SERVER
    for field in (
        *("rounds", "bytes_sent", "peer_bytes_sent"),
        *("peer_offline_bytes_sent", "dealer_bytes_sent"),
    ):
        assert getattr(cost, field) == getattr(usual, field) > 0
    # Its order for an inference travels too.
    assert 0 < cost.offline.bytes_sent - usual.offline.bytes_sent < 300


def test_commands_prepare_and_predict_with_corrections_to_the_client(
    model: MaskedModel, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    served = serving(model, run, directory=tmp_path / "server")
    folder, x, y = (tmp_path / name for name in ("client", "x.npy", "y.npy"))
    np.save(x, served.inputs[:1].numpy())
    common = [
        *(served.server.address, "--dealer", served.dealer.address),
        *("--material", str(folder)),
    ]
    toward = ["--corrections", "client"]
    predict = ["predict", *common, "--input", str(x), "--out", str(y)]
    assert cli.main(["prepare", *common, *toward, "--count", "2"]) == 0
    assert cli.main(["material", str(folder)]) == 0
    assert "2 of 2 inferences left" in capsys.readouterr().out
    assert material_info(folder).corrections == CLIENT
    assert cli.main(predict) == 2
    err = capsys.readouterr().err
    assert "corrections to the client" in err and "--corrections" in err
    assert cli.main([*predict, *toward]) == 0
    assert served.is_right(served.inputs[:1], torch.from_numpy(np.load(y)))
    with pytest.raises(SystemExit):
        cli.main([*predict, "--corrections", "dealer"])
    assert "choose from server, client" in " ".join(capsys.readouterr().err.split())


def test_serve_offers_the_one_choice_that_it_was_told(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, images = tmp_path / "network.onnx", tmp_path / "images.npy"
    network.write_bytes(export(served.network, served.inputs[:1]))
    np.save(images, served.inputs.numpy())
    answered: list[bool] = []

    def run(server: ModelServer) -> None:
        thread = threading.Thread(target=original, args=(server,))
        thread.start()
        with pytest.raises(LimitError, match="to the client alone"):
            connect(server.address, link=served.link)
        with connect(server.address, link=asking(served, CLIENT)) as client:
            x = served.inputs[:1]
            answered.append(served.is_right(x, client.predict(x)))
        server.close()
        thread.join()

    original = ModelServer.run
    monkeypatch.setattr(ModelServer, "run", run)
    words = [
        *("serve", str(network), "127.0.0.1:0", "--calibration", str(images)),
        *("--dealer", served.dealer.address, "--corrections", "client"),
    ]
    assert cli.main(words) == 0 and answered == [True]
