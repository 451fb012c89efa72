"""What is logged: one vocabulary, as text or as JSON lines, and nothing secret."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from crypten_espn.errors import LimitError, QuotaError
from crypten_espn.keys import make_keys
from crypten_espn.masked.model import MaskedModel
from crypten_espn.serving.boundary import session_tag
from crypten_espn.serving.client import connect
from crypten_espn.serving.dealer import DealerServer
from crypten_espn.serving.events import JsonLines, Left, Refused, reason_of, report
from crypten_espn.serving.link import Limits, Link
from crypten_espn.serving.server import ModelServer
from crypten_espn.wire.tls import TLS

from .conftest import Run, serving

LOG = logging.getLogger("crypten_espn.test_events")


def lines(caplog: pytest.LogCaptureFixture, logger: str = "") -> list[dict]:
    """What the log would hold as JSON lines."""
    formatted = [
        json.loads(JsonLines().format(record))
        for record in caplog.records
        if record.name.endswith(logger)
    ]
    assert all("\n" not in str(line) for line in formatted)
    return formatted


def named(found: list[dict], event: str) -> list[dict]:
    return [line for line in found if line["event"] == event]


def test_a_session_leaves_who_came_what_was_prepared_and_every_inference(
    model: MaskedModel, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    host = ["127.0.0.1"]
    made = make_keys(tmp_path / "k", servers=host, dealers=host, clients=["alice"])
    tls = {key.role: TLS(key.certificate, key.key, key.authority) for key in made}
    dealer = run(DealerServer("127.0.0.1:0", tls=tls["dealer"], timeout=20))
    link = Link(dealer.address, tls=tls["server"], timeout=20)
    server = run(ModelServer(model, "127.0.0.1:0", link=link))
    mine = Link(dealer.address, tls=tls["client"], timeout=20)
    with connect(server.address, link=mine) as client:
        client.prepare(3)
        for _ in range(2):
            client.predict(model_input(model))
        session = client.session
    server.close()
    dealer.close()
    assert session is not None
    at_server, at_dealer = lines(caplog, "server"), lines(caplog, "dealer")
    (connected,) = named(at_server, "connected")
    assert (connected["role"], connected["client"]) == ("client", "alice")
    assert connected["certificate"] and connected["level"] == "INFO"
    (prepared,) = named(at_server, "prepared")
    assert (prepared["count"], prepared["left"]) == (3, 3)
    assert prepared["sent"] > 0 and prepared["received"] > 0
    inferences = named(at_server, "inference")
    assert [line["index"] for line in inferences] == [0, 1]
    assert [line["left"] for line in inferences] == [2, 1]
    for line in inferences:
        phases = line["material_s"] + line["compute_s"] + line["wait_s"]
        assert phases == pytest.approx(line["seconds"], abs=1e-5)
        assert line["sent"] > 0 and line["client"] == "alice"
        assert line["session"] == session_tag(session) == prepared["session"]
    assert [line["index"] for line in named(at_server, "inference_begun")] == [0, 1]
    (dealing,) = named(at_dealer, "dealing")
    assert dealing["client"] == "alice" and dealing["server"] == "127.0.0.1"
    assert named(at_dealer, "dealt")[0]["sent"] > 0
    assert [line["event"] for line in at_server][-1] == "stopped"
    everything = caplog.text + json.dumps(lines(caplog))
    assert session not in everything
    assert not any(word in everything for word in ("seed", "BEGIN", "PRIVATE"))


@pytest.mark.parametrize("as_json", [False, True])
def test_what_a_peer_says_forges_no_line(
    as_json: bool, caplog: pytest.LogCaptureFixture
) -> None:
    forged = 'x"\n{"event": "stopped"}\x1b[2J'
    report(LOG, Refused(1, "client", forged, "quota", forged))
    formatter = JsonLines() if as_json else logging.Formatter("%(message)s")
    (line,) = [formatter.format(record) for record in caplog.records]
    assert "\n" not in line and "\x1b" not in line
    if as_json:
        assert json.loads(line)["event"] == "refused"


def test_what_is_no_event_of_ours_is_a_message_without_its_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    try:
        raise KeyError("secret")
    except KeyError:
        LOG.exception("it failed")
    (line,) = lines(caplog)
    assert (line["event"], line["text"], line["level"]) == (
        *("message", "it failed"),
        "ERROR",
    )
    assert "secret" not in json.dumps(line)


def test_a_level_below_the_logs_is_not_written(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, logger=LOG.name)
    report(LOG, Left(1, "client", "alice"))
    report(LOG, Refused(1, "client", "alice", "quota", "no"), level=logging.INFO)
    assert caplog.records == []


def test_a_reason_is_the_limit_or_the_kind_of_error() -> None:
    assert reason_of(LimitError("too many", "batch")) == "batch"
    assert reason_of(LimitError("the server stopped: ...")) == "LimitError"
    assert reason_of(QuotaError("enough")) == "QuotaError"
    assert reason_of(KeyError("secret")) == "internal"


def test_a_refusal_has_the_same_class_on_both_sides(
    model: MaskedModel, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    served = serving(model, run, limits=Limits(count=2))
    with (
        connect(served.server.address, link=served.link) as client,
        pytest.raises(LimitError, match="3 inferences were asked for in one order"),
    ):
        client.prepare(3)
    served.server.close()
    (refused,) = named(lines(caplog, "server"), "refused")
    assert refused["reason"] == "count" and refused["role"] == "client"


def model_input(model: MaskedModel) -> torch.Tensor:
    return torch.zeros(1, *model.plan.input.shape)
