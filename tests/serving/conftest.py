"""A small planned network, and servers that end with their test."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import pytest
import torch

from crypten_espn.masked.model import MaskedModel
from crypten_espn.serving.dealer import DealerServer
from crypten_espn.serving.events import Event
from crypten_espn.serving.host import Host
from crypten_espn.serving.link import Limits, Link
from crypten_espn.serving.server import ModelServer

from ..masked.cases import Pair, planned, residual

E = TypeVar("E", bound=Event)
H = TypeVar("H", bound=Host)
Run = Callable[[H], H]


@dataclass(frozen=True)
class Served:
    """A running server and its dealer, and what the network answers in the clear."""

    server: ModelServer
    dealer: DealerServer
    network: torch.nn.Module
    inputs: torch.Tensor

    @property
    def link(self) -> Link:
        """How a client reaches both."""
        return Link(self.dealer.address, timeout=20)

    def is_right(self, x: torch.Tensor, logits: torch.Tensor) -> bool:
        """Whether these are the network's logits."""
        return float((logits - self.network(x)).abs().max()) < 0.02


@pytest.fixture(scope="session")
def model() -> MaskedModel:
    """The network, with every kernel compiled: no time-out waits for a compiler."""
    network, inputs = residual()
    model = planned(network, inputs)
    Pair(model).infer(inputs[:1])
    return model


@pytest.fixture
def run() -> Iterator[Run]:
    """Start hosts; end them, and their threads, when the test ends."""
    started: list[tuple[Host, threading.Thread]] = []

    def start(host: H) -> H:
        thread = threading.Thread(target=host.run, daemon=True)
        thread.start()
        started.append((host, thread))
        return host

    yield start
    for host, thread in started:
        host.close()
        thread.join(10)
        assert not thread.is_alive()


class Heard(logging.Handler):
    """The events that parties of this process report, as they come."""

    def __init__(self) -> None:
        super().__init__()
        self._events: list[tuple[str, Event]] = []
        self._more = threading.Condition(threading.RLock())

    def emit(self, record: logging.LogRecord) -> None:
        event = getattr(record, "event", None)
        if isinstance(event, Event):
            with self._more:
                self._events.append((record.name.rpartition(".")[2], event))
                self._more.notify_all()

    def of(self, who: str, kind: type[E]) -> list[E]:
        """What a client, server or dealer has reported of one kind."""
        with self._more:
            events = list(self._events)
        return [event for name, event in events if name == who and type(event) is kind]

    def wait(self, who: str, kind: type[E], count: int = 1) -> list[E]:
        """The same, once there are so many."""
        with self._more:
            assert self._more.wait_for(lambda: len(self.of(who, kind)) >= count, 60)
        return self.of(who, kind)


@pytest.fixture
def heard() -> Iterator[Heard]:
    handler, logger = Heard(), logging.getLogger("crypten_espn")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.setLevel(level)
    logger.removeHandler(handler)


@pytest.fixture
def served(model: MaskedModel, run: Run) -> Served:
    return serving(model, run)


def serving(
    model: MaskedModel, run: Run, *, limits: Limits | None = None, **options: object
) -> Served:
    """A dealer and a server of `model`, both running with these limits."""
    dealer = run(DealerServer("127.0.0.1:0", timeout=20, limits=limits))
    link = Link(dealer.address, timeout=20, **options)  # type: ignore[arg-type]
    server = run(ModelServer(model, "127.0.0.1:0", link=link, limits=limits))
    network, inputs = residual()
    return Served(server, dealer, network, inputs)
