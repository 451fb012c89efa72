"""A client that predicts until it is killed; one JSON line for whatever happens."""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import Any

import torch

from crypten_espn.errors import EspnError
from crypten_espn.serving.client import Client, connect
from crypten_espn.serving.events import log_to_stderr
from crypten_espn.serving.link import Link
from crypten_espn.wire.tls import TLS

from ..processes import SHAPE

PREPARED = 5  # at a time


def drawn(number: int) -> torch.Tensor:
    """Input `number`, the same for whoever asks."""
    return torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(number))


def say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


class Allowed:
    """The first number that may not be asked for yet; standard input says more."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._more = threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for text in sys.stdin:
            with self._more:
                self._limit = int(text)
                self._more.notify_all()

    def wait(self, number: int) -> None:
        """Until it may be asked for."""
        with self._more:
            self._more.wait_for(lambda: number < self._limit)


def session(server: str, link: Link, numbers: range, allowed: Allowed) -> int:
    """Predict until something fails; the first number that has no answer."""
    number = numbers.start
    began = time.monotonic()
    doing = "connect"
    client: Client | None = None
    try:
        client = connect(server, link=link)
        while number in numbers:
            allowed.wait(number)
            if client.remaining == 0:
                say(doing="prepare")
                doing, began = "prepare", time.monotonic()
                client.prepare(PREPARED)
                say(doing="prepared")
            doing, began = "predict", time.monotonic()
            logits = client.predict(drawn(number))
            seconds = time.monotonic() - began
            say(number=number, logits=logits.flatten().tolist(), seconds=seconds)
            number += 1
    except EspnError as error:
        seconds = time.monotonic() - began
        say(
            failed=doing,
            kind=type(error).__name__,
            text=str(error),
            seconds=seconds,
        )
    except Exception as error:
        say(failed=doing, kind=f"foreign {type(error).__name__}", seconds=0.0)
        raise
    finally:
        if client is not None:
            client.close()
    return number


def main() -> None:
    """Told what to do by one JSON object as its argument."""
    told = json.loads(sys.argv[1])
    log_to_stderr(verbose=True, as_json=True)
    link = Link(
        told["dealer"], told["folder"], TLS(*told["tls"]), timeout=told["timeout"]
    )
    number, stop = told["start"], told["stop"]
    allowed = Allowed(told["limit"])
    say(ready=True)
    while number < stop:
        number = session(told["server"], link, range(number, stop), allowed)
        time.sleep(0.2)


if __name__ == "__main__":
    main()
