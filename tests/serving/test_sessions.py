"""Sessions over sockets: the answers are the network's, inferences are used once."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from crypten_espn.errors import (
    DataError,
    MaterialError,
    PeerError,
    PlanMismatchError,
    ShapeError,
)
from crypten_espn.masked.model import MaskedModel
from crypten_espn.serving.client import connect
from crypten_espn.serving.link import Limits, Link
from crypten_espn.serving.server import ModelServer
from crypten_espn.serving.stock import Stock
from crypten_espn.wire.channel import Channel
from crypten_espn.wire.connect import Listener

from ..masked.cases import planned, residual
from .conftest import Run, Served, serving
from .raw import at_server, refusal


def test_a_client_gets_the_networks_answers(served: Served, model: MaskedModel) -> None:
    x = served.inputs
    with connect(served.server.address, link=served.link) as client:
        assert client.plan == model.plan
        client.prepare(2)
        assert client.remaining == 2
        for i in range(3):  # the third prepares on its own
            assert served.is_right(x[i : i + 1], client.predict(x[i : i + 1]))
        client.prepare(1, batch=3)
        assert served.is_right(x[:3], client.predict(x[:3]))
        client.prepare(1, batch=2)
        with pytest.raises(MaterialError, match="batches of 2"):
            client.predict(x[:3])
        assert served.is_right(x[:2], client.predict(x[:2]))
        with pytest.raises(ShapeError):
            client.predict(torch.zeros(1, 3, 9, 9))
        with pytest.raises(DataError, match="PIL image"):
            client.predict(Image.new("RGB", (8, 8)))
        assert served.is_right(x[:1], client.predict(x[:1].numpy()))


def test_a_link_and_its_fields_are_the_same_and_not_both(served: Served) -> None:
    address, dealer = served.server.address, served.dealer.address
    with connect(address, dealer=dealer, timeout=20) as client:
        assert served.is_right(served.inputs[:1], client.predict(served.inputs[:1]))
    with pytest.raises(TypeError, match="not both"):
        connect(address, link=served.link, dealer=dealer)


def test_a_large_batch_takes_no_more_rounds(served: Served) -> None:
    x = torch.randn(9, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with connect(served.server.address, link=served.link) as client:
        alone = client.predict(x[:1])
        assert client.online.rounds == client.plan.messages
        together = client.predict(x)
        assert client.online.rounds == 2 * client.plan.messages
    assert served.is_right(x[:1], alone) and served.is_right(x, together)


def test_two_clients_at_once(served: Served) -> None:
    right: list[bool] = []

    def one() -> None:
        with connect(served.server.address, link=served.link) as client:
            for i in range(3):
                x = served.inputs[i : i + 1]
                right.append(served.is_right(x, client.predict(x)))

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert right == [True] * 6


@pytest.mark.parametrize("stored", [False, True])
def test_many_in_flight(
    stored: bool, model: MaskedModel, run: Run, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folders = [tmp_path_factory.mktemp(who) / "kept" for who in ("server", "client")]
    server = serving(model, run, directory=folders[0] if stored else None)
    x = [server.inputs[i % 4 : i % 4 + 1] for i in range(10)]
    link = Link(server.dealer.address, folders[1] if stored else None, timeout=20)
    with connect(server.server.address, link=link) as client:
        for _ in range(2):
            results = client.predict_many(x, in_flight=4)
            assert all(map(server.is_right, x, results))
        assert client.predict_many([]) == []
        with pytest.raises(ShapeError):
            client.predict_many([x[0], torch.zeros(1, 3, 9, 9)])
        with pytest.raises(ValueError, match="1 to 64"):
            client.predict_many(x, in_flight=65)


def test_many_in_flight_use_the_connections_that_are_let_in(
    model: MaskedModel, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    served = serving(model, run, limits=Limits(connections=2))
    x = [served.inputs[i : i + 1] for i in range(4)]
    with connect(served.server.address, link=served.link) as client:
        logits = client.predict_many(x, in_flight=4)
    assert all(map(served.is_right, x, logits))
    assert "no further connection" in caplog.text


def test_no_weight_reaches_the_client(
    served: Served, model: MaskedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing the client receives holds a layer's weights, in ring form or as text."""
    received: list[bytes] = []
    for name in ("receive", "receive_parts", "receive_bytes"):
        original: Callable[..., object] = getattr(Channel, name)

        def record(channel, *args, _original=original, **options):
            data = _original(channel, *args, **options)
            if channel.role == "client":
                arrays = data if isinstance(data, list) else [data]
                received.extend(np.asarray(a).tobytes() for a in arrays)
            return data

        monkeypatch.setattr(Channel, name, record)
    with connect(served.server.address, link=served.link) as client:
        client.predict(served.inputs[:1])
    assert len(received) > 8
    stream = b"".join(received)
    for array in (*model.weights.integers, *model.weights.biases):
        if array is None or not array.any():
            continue
        assert array.reshape(-1)[:4].tobytes() not in stream


def test_another_plan_is_refused_on_both_sides(
    served: Served, model: MaskedModel
) -> None:
    other = planned(*residual(), precision="high").plan
    with pytest.raises(PlanMismatchError) as error:
        connect(served.server.address, plan=other, timeout=20)
    for digest in (other.digest, model.plan.digest):
        assert digest.hex()[:16] in str(error.value)


def test_a_side_without_a_dealer_says_so(
    served: Served, model: MaskedModel, run: Run
) -> None:
    alone = run(ModelServer(model, "127.0.0.1:0", timeout=20))
    with (
        connect(alone.address, link=served.link) as client,
        pytest.raises(MaterialError, match="The server knows no dealer"),
    ):
        client.prepare()
    with (
        connect(served.server.address, timeout=20) as client,
        pytest.raises(MaterialError, match="no dealer is known"),
    ):
        client.predict(served.inputs[:1])


def test_unreachable_and_silent_servers_are_errors() -> None:
    with pytest.raises(PeerError, match="Cannot reach"):
        connect("127.0.0.1:1", timeout=0.2)
    with (
        Listener("127.0.0.1:0", role="server") as silent,
        pytest.raises(PeerError, match="silent"),
    ):
        connect(silent.address, timeout=0.2)


def test_the_server_refuses_what_was_used_and_what_never_was(
    served: Served, model: MaskedModel
) -> None:
    """A repeated index is refused before the server sends anything."""
    x = model.plan.encode(served.inputs[:1])
    with connect(served.server.address, link=served.link) as client:
        client.prepare(2)
        client.predict(served.inputs[:1])
        first = model.plan.sources[0]
        for index in (0, 2):  # used, and never prepared
            address = served.server.address
            with at_server(address, model.plan, client.session) as channel:
                channel.send(
                    np.zeros(x.size, dtype=x.dtype), bits=first.ring, tag=index
                )
                named = f"Inference {index} has no unused material"
                assert named in refusal(channel)
        assert served.is_right(served.inputs[:1], client.predict(served.inputs[:1]))


def test_material_of_different_inferences_is_noticed_by_both_sides(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The server takes another inference's material than it is asked for."""
    original = Stock.take
    with connect(served.server.address, link=served.link) as client:
        client.prepare(2)
        monkeypatch.setattr(Stock, "take", lambda stock, index: original(stock, 1))
        with pytest.raises((MaterialError, PeerError), match="another inference"):
            client.predict(served.inputs[:1])
    assert "another inference" in caplog.text
