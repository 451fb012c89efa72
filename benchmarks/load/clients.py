"""The clients: a process whose threads use the service until the time is over."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from crypten_espn.errors import EspnError
from crypten_espn.serving.client import connect
from crypten_espn.serving.link import Link
from crypten_espn.wire.tls import TLS

PREPARED = 4  # inferences a session


class Clients:
    """What all of them met."""

    def __init__(self, server: str, link: Link, x: torch.Tensor, right: torch.Tensor):
        self._server, self._link, self._x, self._right = server, link, x, right
        self._lock = threading.Lock()
        self.seconds: dict[str, list[float]] = {}
        self.failures: dict[str, int] = {}
        self.wrong = 0

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        with self._lock:
            took = time.perf_counter() - began
            self.seconds.setdefault(what, []).append(took)

    def session(self) -> None:
        """Connect, prepare, predict and leave."""
        try:
            with self._timed("connect"):
                client = connect(self._server, link=self._link)
            with client:
                with self._timed("prepare"):
                    client.prepare(PREPARED)
                for _ in range(PREPARED):
                    with self._timed("predict"):
                        logits = client.predict(self._x)
                    if (logits - self._right).abs().max() > 0.05:
                        self.wrong += 1
        except EspnError as error:
            with self._lock:
                text = f"{type(error).__name__}: {error}"[:200]
                self.failures[text] = self.failures.get(text, 0) + 1

    def run(self, clients: int, seconds: float) -> None:
        """So many at once, for so long."""
        end = time.monotonic() + seconds

        def one() -> None:
            while time.monotonic() < end:
                self.session()

        threads = [threading.Thread(target=one) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def main() -> None:
    """Told what to do by one JSON object as its argument; tells what came of it."""
    told = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    tls = TLS(*told["tls"])
    link = Link(told["dealer"], tls=tls, timeout=told["timeout"])
    x, right = torch.tensor(told["x"]), torch.tensor(told["right"])
    clients = Clients(told["server"], link, x, right)
    clients.session()  # everything is loaded and compiled
    clients.seconds.clear()
    print("ready", flush=True)
    sys.stdin.readline()
    clients.run(told["clients"], told["seconds"])
    found = {
        "seconds": clients.seconds,
        "failures": clients.failures,
        "wrong": clients.wrong,
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
