"""Real `serve` and `deal` processes that are told to read again, and to stop."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from benchmarks.processes import SHAPE, Process, small_network
from crypten_espn.errors import ClosingError, PeerError
from crypten_espn.keys import Key, make_keys
from crypten_espn.serving.client import connect
from crypten_espn.serving.dealer import DealerServer
from crypten_espn.serving.link import Link
from crypten_espn.wire.tls import TLS

from ..masked.cases import planned, residual
from .conftest import Run
from .raw import NAME, paired, say, waiting
from .stalled import stalled

pytestmark = pytest.mark.slow


def logged(process: Process, words: str) -> str:
    """The log, once it holds these words."""
    end = time.monotonic() + 60
    while words not in (text := process.log.read_text()):
        assert time.monotonic() < end, f"{words!r} is not in the log: {text}"
        time.sleep(0.02)
    return text


def shown(key: Key) -> TLS:
    return TLS(key.certificate, key.key, key.authority)


def test_a_server_reads_certificates_on_sighup_and_finishes_on_sigterm(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = ["127.0.0.1"]
    server, dealer, client = make_keys(
        tmp_path / "keys", servers=host, dealers=host, clients=["alice"]
    )
    network, x = small_network(tmp_path), torch.randn(1, *SHAPE)
    dealing = run(DealerServer("127.0.0.1:0", tls=shown(dealer), timeout=60))
    files = [str(server.certificate), str(server.key), str(server.authority)]
    process = Process(
        "serve",
        [
            *(str(tmp_path / "network.onnx"), "127.0.0.1:0", "--verbose"),
            *("--dealer", dealing.address, "--timeout", "60", "--tls", *files),
            *("--calibration", str(tmp_path / "calibration.npy")),
        ],
        tmp_path,
    )
    link = Link(dealing.address, tls=shown(client), timeout=60)
    try:
        with connect(process.address, link=link) as kept:
            kept.prepare(2)
            kept.predict(x)
            os.kill(process.pid, signal.SIGHUP)
            logged(process, "read again")
            with connect(process.address, link=link) as new:
                assert torch.allclose(new.predict(x), network(x), atol=0.02)
            with stalled(monkeypatch, kept, x) as held:
                logged(process, "index=1 batch=1")
                os.kill(process.pid, signal.SIGTERM)
                assert "under_way=1" in logged(process, "stopping")
                with pytest.raises(PeerError):  # it accepts nobody any more
                    connect(process.address, link=Link(tls=link.tls, timeout=0.2))
                held.go_on()
            assert isinstance(held.result, torch.Tensor)
            assert torch.allclose(held.result, network(x), atol=0.02)
        assert process.wait() == 0
        assert "burnt=0" in logged(process, "stopped") and process.foreign() == []
    finally:
        process.end()


def test_a_dealer_goes_on_after_sighup_and_burns_on_sigterm_what_is_not_taken(
    tmp_path: Path,
) -> None:
    plan = planned(*residual()).plan
    count = 4096  # more than fits between the two sockets
    process = Process(
        "deal",
        ["127.0.0.1:0", "--verbose", "--timeout", "60", "--limit", "grace_s=0.1"],
        tmp_path,
    )
    try:
        os.kill(process.pid, signal.SIGHUP)
        with (
            waiting(process.address, plan, NAME[::-1]) as other,
            paired(process.address, plan) as (server, _),
        ):
            say(server, message="order", start=0, count=count, batch=1)
            server.wait(timeout=60, rings=range(1 << 40))  # it has begun to deal
            os.kill(process.pid, signal.SIGTERM)
            assert "under_way=1" in logged(process, "stopping")
            logged(process, "stopped")
            with pytest.raises(ClosingError):  # nothing was under way for this one
                other.receive_bytes()
        assert process.wait() == 0
        assert "burnt=1" in logged(process, "stopped") and process.foreign() == []
    finally:
        process.end()
