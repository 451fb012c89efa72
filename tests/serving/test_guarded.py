"""Inputs that the guard refuses, over sockets: nothing is sent, sessions go on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import crypten_espn as espn
from crypten_espn import cli
from crypten_espn.errors import PeerError, RangeError
from crypten_espn.masked.model import MaskedModel
from crypten_espn.masked.planning import masked_model
from crypten_espn.serving.client import Client, connect

from ..masked.cases import Pair, residual
from .conftest import Run, Served, serving

Counts = tuple[int, ...]


@pytest.fixture(scope="module")
def guarded() -> MaskedModel:
    network, inputs = residual()
    model = masked_model(
        espn.convert(network, inputs, guard=espn.InputGuard.fit(inputs))
    )
    Pair(model).infer(inputs[:1])
    return model


@pytest.fixture
def asked(guarded: MaskedModel, run: Run) -> Served:
    return serving(guarded, run)


def counts(client: Client) -> Counts:
    """What was sent, and what is left."""
    online, offline = client.online, client.offline
    return online.bytes_sent, online.rounds, offline.bytes_sent, client.remaining


def test_a_refused_input_costs_nothing_and_the_session_goes_on(asked: Served) -> None:
    x = asked.inputs
    with connect(asked.server.address, link=asked.link) as client:
        assert client.plan.guard == espn.InputGuard.fit(x)
        with pytest.raises(RangeError, match="unlike those"):
            client.predict(2 * x[:1])  # before anything is prepared
        assert counts(client) == (0, 0, 0, 0) and client.session is None
        client.prepare(2)
        before = counts(client)
        for wild in (2 * x[:1], x[:1] * torch.nan, x[:1] / 0.0):
            with pytest.raises(RangeError):
                client.predict(wild)
        with pytest.raises(RangeError):
            client.predict_many([x[:1], 2 * x[:1]])
        assert counts(client) == before
        assert asked.is_right(x[:1], client.predict(x[:1]))
        assert client.remaining == 1


def test_force_sends_what_the_guard_refuses_and_never_nan(asked: Served) -> None:
    x = 2 * asked.inputs[:1]
    with connect(asked.server.address, link=asked.link) as client:
        assert asked.is_right(x, client.predict(x, force=True))
        (logits,) = client.predict_many([x], force=True)
        assert asked.is_right(x, logits)
        before = counts(client)
        for bad in (torch.nan, torch.inf, -torch.inf):
            with pytest.raises(RangeError, match="NaN or infinite"):
                client.predict(torch.full_like(x, bad), force=True)
        assert counts(client) == before


def test_a_server_without_a_guard_answers_anything(served: Served) -> None:
    x = 2 * served.inputs[:1]
    with connect(served.server.address, link=served.link) as client:
        assert client.plan.guard is None
        assert served.is_right(x, client.predict(x))


def test_serving_without_a_guard_says_so_and_how_to_get_one(
    model: MaskedModel, guarded: MaskedModel, caplog: pytest.LogCaptureFixture
) -> None:
    for served_model, lines in ((guarded, 0), (model, 1)):
        with pytest.raises(PeerError):
            espn.serve(served_model, "127.0.0.1:no-port")
        said = [text for text in caplog.messages if "input guard: none" in text]
        assert len(said) == lines
    assert "InputGuard.fit(images)" in said[0]


def test_the_command_refuses_and_is_forced(
    asked: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = 2 * asked.inputs[:1]
    np.save(tmp_path / "x.npy", x.numpy())
    command = [
        *("predict", asked.server.address, "--dealer", asked.dealer.address),
        *("--input", str(tmp_path / "x.npy"), "--out", str(tmp_path / "logits.npy")),
    ]
    assert cli.main(command) == 2
    err = capsys.readouterr().err
    assert "RangeError" in err and "--force" in err and "Traceback" not in err
    assert not (tmp_path / "logits.npy").exists()
    assert cli.main([*command, "--force"]) == 0
    logits = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    assert asked.is_right(x, logits)
