"""`serve --workers 2`: real processes on one address, seen by its clients as one."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.processes import SHAPE, Process, small_network
from crypten_espn.keys import make_keys
from crypten_espn.serving.client import connect
from crypten_espn.serving.dealer import DealerServer
from crypten_espn.serving.link import Link
from crypten_espn.wire.tls import TLS

from .conftest import Run
from .test_admin import ask

pytestmark = pytest.mark.slow


def children(pid: int) -> list[int]:
    return [*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


def workers_of(pid: int) -> list[int]:
    """The processes that a host has started to answer: one process forks them."""
    return [
        worker
        for child in children(pid)
        if b"forkserver" in Path(f"/proc/{child}/cmdline").read_bytes()
        for worker in children(child)
    ]


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 180
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def counted(address: str, name: str) -> float:
    """A sum over all labels."""
    status, text = ask(address, "/metrics")
    assert status == 200
    samples = [s for f in text_string_to_metric_families(text) for s in f.samples]
    return sum(sample.value for sample in samples if sample.name == name)


def test_two_workers_are_one_service_and_one_that_is_killed_is_replaced(
    run: Run, tmp_path: Path
) -> None:
    host, network = ["127.0.0.1"], small_network(tmp_path)
    keys = make_keys(tmp_path / "keys", servers=host, dealers=host, clients=["alice"])
    files = [[str(k.certificate), str(k.key), str(k.authority)] for k in keys]
    x = torch.randn(1, *SHAPE)
    common = ["--workers", "2", "--timeout", "60", "--verbose", "--admin", "0"]
    with ExitStack() as stack:
        dealer = run(DealerServer("127.0.0.1:0", tls=TLS(*files[1]), timeout=60))
        server = Process(
            "serve",
            [
                *(str(tmp_path / "network.onnx"), "127.0.0.1:0", *common),
                *("--dealer", dealer.address, "--tls", *files[0]),
                *("--calibration", str(tmp_path / "calibration.npy")),
                *("--material", str(tmp_path / "kept"), "--quota", "100"),
            ],
            tmp_path,
        )
        stack.callback(server.end)
        link = Link(dealer.address, tls=TLS(*files[2]), timeout=60)

        def is_right(logits: torch.Tensor) -> bool:
            return torch.allclose(logits, network(x), atol=0.02)

        def sessions(number: int) -> None:
            for _ in range(number):
                with connect(server.address, link=link) as client:
                    client.prepare(4)
                    assert all(map(is_right, client.predict_many([x] * 4, in_flight=3)))

        sessions(3)
        assert counted(server.admin, "crypten_espn_server_inferences_total") == 12
        before = workers_of(server.pid)
        assert len(before) == 2
        os.kill(before[0], signal.SIGKILL)
        sessions(1)  # the other one answers
        until(lambda: len(set(workers_of(server.pid)) - set(before)) == 1)
        until(lambda: ask(server.admin, "/health/live")[0] == 200)
        sessions(1)
        # What the one that is gone had counted when somebody looked is not lost.
        assert counted(server.admin, "crypten_espn_server_inferences_total") == 20
        with connect(server.address, link=link) as client:
            client.prepare(1)
            os.kill(server.pid, signal.SIGHUP)
            until(lambda: server.log.read_text().count("replaced plan=") == 2)
            assert is_right(client.predict(x))
        assert server.end() == 0
        text = server.log.read_text()
        assert "worker_gone" in text and "status=-9" in text
        assert "Traceback" not in text
        assert [pid for pid in before if Path(f"/proc/{pid}").exists()] == []
