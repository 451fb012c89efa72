"""Three servers behind HAProxy as docs/deploy configures it, and two dealers."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from crypten_espn.bundle import Bundle
from crypten_espn.errors import EspnError
from crypten_espn.masked.model import MaskedModel
from crypten_espn.serving.admin import Admin
from crypten_espn.serving.client import Client, connect
from crypten_espn.serving.dealer import DealerServer
from crypten_espn.serving.host import Host
from crypten_espn.serving.link import Link
from crypten_espn.serving.server import ModelServer

from ..masked.cases import planned, residual
from .test_admin import ask

CONFIGURATION = Path(__file__).parents[2] / "docs" / "deploy" / "haproxy.cfg"
CLIENTS = 4

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("haproxy") is None, reason="needs haproxy"),
]


def _run(host: Host, pipe: Connection) -> None:
    signal.signal(signal.SIGHUP, lambda *_: host.reload())
    with host, Admin(host, "0") as admin:
        pipe.send((host.address, admin.address))
        host.run()


def _dealer(pipe: Connection) -> None:
    _run(DealerServer("127.0.0.1:0", timeout=60), pipe)


def _server(path: Path, dealers: list[str], pipe: Connection) -> None:
    def read() -> Bundle:
        return Bundle(pickle.loads(path.read_bytes()))

    link = Link(dealers, timeout=60)
    _run(ModelServer(read(), "127.0.0.1:0", link=link, again=read), pipe)


@dataclass
class Started:
    """A process, where it listens, and where it tells its health."""

    pid: int
    address: str
    admin: str


class Processes:
    """Forked by one process that has imported everything once."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["pytest", __name__])

    def start(self, what: Callable[..., None], *arguments: object) -> Started:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=what, args=(*arguments, theirs))
        process.start()
        self._stack.callback(process.join)
        self._stack.callback(process.kill)
        self._stack.enter_context(closing(ours))
        theirs.close()
        assert process.pid is not None
        return Started(process.pid, *ours.recv())


@contextmanager
def balanced(servers: list[Started], folder: Path) -> Iterator[str]:
    """HAProxy in front of these; its address."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    text = CONFIGURATION.read_text().replace("bind :29500", f"bind {address}")
    places = iter(servers)

    def place(found: re.Match[str]) -> str:
        server = next(places)
        port = server.admin.rpartition(":")[2]
        return f"{found[1]} {server.address} check port {port}"

    text, count = re.subn(r"(server \w+) +\S+ check port 9100", place, text)
    assert count == len(servers)
    (folder / "haproxy.cfg").write_text(text)
    process = subprocess.Popen(["haproxy", "-f", folder / "haproxy.cfg", "-db", "-q"])
    try:
        yield address
    finally:
        process.kill()
        process.wait()


@dataclass
class Load:
    """Clients that predict until they are told to stop, and what became of it."""

    address: str
    link: Link
    x: torch.Tensor
    expected: torch.Tensor
    answers: int = 0
    wrong: int = 0
    failures: list[str] = field(default_factory=list)
    plans: set[bytes] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._more = threading.Condition()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(CLIENTS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def after(self, answers: int) -> None:
        """Wait until there are so many more."""
        with self._more:
            wanted = self.answers + answers
            assert self._more.wait_for(lambda: self.answers >= wanted, 120)

    def _run(self) -> None:
        with connect(self.address, link=self.link) as client:
            while not self._stop.is_set():
                self._ask(client)

    def _ask(self, client: Client) -> None:
        try:
            logits = client.predict(self.x)
        except EspnError as error:  # it was in flight: asked for again
            with self._more:
                self.failures.append(f"{type(error).__name__}: {error}")
            return
        with self._more:
            self.answers += 1
            self.wrong += bool((logits - self.expected).abs().max() > 0.02)
            self.plans.add(client.plan.digest)
            self._more.notify_all()


@pytest.mark.timeout(600)
def test_clients_go_on_when_servers_and_dealers_are_killed_or_get_another_bundle(
    model: MaskedModel, tmp_path: Path
) -> None:
    network, inputs = residual()
    bundle, x = tmp_path / "bundle", inputs[:1]
    bundle.write_bytes(pickle.dumps(model))
    with ExitStack() as stack:
        processes = Processes(stack)
        dealers = [processes.start(_dealer) for _ in range(2)]
        trusted = [dealer.address for dealer in dealers]
        servers = [processes.start(_server, bundle, trusted) for _ in range(3)]
        address = stack.enter_context(balanced(servers, tmp_path))
        link = Link(trusted, timeout=60)
        load = Load(address, link, x, network(x))
        with load:
            load.after(20)
            # One of those that answer: no request fails but one a client, in flight.
            busy = next(s for s in servers if "inferences_total 0.0" not in _page(s))
            os.kill(busy.pid, signal.SIGKILL)
            load.after(40)
            killed = len(load.failures)
            assert killed <= CLIENTS
            # One of two dealers: sessions go on with the other.
            os.kill(dealers[0].pid, signal.SIGKILL)
            load.after(40)
            assert len(load.failures) <= killed + CLIENTS
            gone = len(load.failures)
            # Another bundle: nothing fails at all.
            other = planned(network, inputs, precision="high")
            bundle.write_bytes(pickle.dumps(other))
            for server in servers:
                if server is not busy:
                    os.kill(server.pid, signal.SIGHUP)
            load.after(40)
            with connect(address, link=link) as client:
                while client.plan.digest != other.plan.digest:
                    client = stack.enter_context(connect(address, link=link))
                assert (client.predict(x) - network(x)).abs().max() < 0.02
            assert len(load.failures) == gone, load.failures
        assert load.wrong == 0 and len(load.plans) >= 1


def _page(server: Started) -> str:
    return ask(server.admin, "/metrics")[1]
