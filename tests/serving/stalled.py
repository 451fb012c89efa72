"""A client that stops in the middle of an inference until it is told to go on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from crypten_espn.masked.inference import client as inference
from crypten_espn.serving.client import Client


class Stalled:
    """A prediction that has sent its input, and nothing after it yet."""

    def __init__(self, predict: Callable[[], object], go: threading.Event) -> None:
        self._go = go
        self.result: object = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(predict,))
        self._thread.start()

    def _run(self, predict: Callable[[], object]) -> None:
        try:
            self.result = predict()
        except BaseException as error:
            self.error = error

    def go_on(self) -> None:
        """Let it go on, and wait for its end."""
        self._go.set()
        self._thread.join(60)
        assert not self._thread.is_alive()


@contextmanager
def stalled(
    monkeypatch: pytest.MonkeyPatch, client: Client, x: object
) -> Iterator[Stalled]:
    """`client.predict(x)` in a thread, held after its first message."""
    go = threading.Event()

    def stalling(*args):
        part = inference(*args)
        answer = yield next(part)
        assert go.wait(60)
        try:
            while True:
                answer = yield part.send(answer)
        except StopIteration as end:
            return end.value

    with monkeypatch.context() as patch:
        patch.setattr("crypten_espn.serving.client.inference", stalling)
        held = Stalled(lambda: client.predict(x), go)
        try:
            yield held
        finally:
            held.go_on()
