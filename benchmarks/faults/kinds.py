"""Everything that can go wrong in a run."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .run import Run

Fault = tuple[str, Callable[[], None]]


def faults_of(run: Run) -> list[Fault]:
    """Faults, in an order that mixes the parties.

    Each brings its party back at the end: what fails must fail, and then go on. While
    one acts, clients ask for the answers up to the next one.
    """
    longer = run.timeout * 1.5
    found: list[Fault] = [
        ("kill -9 serve", partial(_killed, run, "serve")),
        ("SIGSTOP client1", partial(_stopped, run, "client1", longer)),
        ("dealer gone before preparation", partial(_gone_before, run)),
        ("kill -9 client0", partial(_killed, run, "client0")),
        ("dealer gone during preparation", partial(_gone_during, run)),
        ("restart serve between prepare and predict", partial(_restarted, run)),
        ("SIGSTOP serve", partial(_stopped, run, "serve", longer)),
        ("dealer gone after preparation", partial(_gone_after, run, longer)),
        ("SIGSTOP deal", partial(_stopped, run, "deal", longer)),
        ("restart deal", partial(run.restart, "deal")),
        ("kill -9 client1", partial(_killed, run, "client1")),
    ]
    if run.link is not None:
        found.insert(2, ("link down", partial(_cut, run, longer)))
    return found


def _killed(run: Run, name: str) -> None:
    run.kill(name)
    run.parties[name].start()


def _stopped(run: Run, name: str, seconds: float) -> None:
    run.parties[name].signal(signal.SIGSTOP)
    time.sleep(seconds)
    run.parties[name].signal(signal.SIGCONT)


def _cut(run: Run, seconds: float) -> None:
    assert run.link is not None
    run.link.set("down")
    time.sleep(seconds)
    run.link.set("up")


def _gone_before(run: Run) -> None:
    """Clients want to prepare, and there is no dealer."""
    run.kill("deal")
    run.heard("prepare")
    run.parties["deal"].start()


def _gone_during(run: Run) -> None:
    """It holds still, so that a client is in the middle of preparing when it goes."""
    run.parties["deal"].signal(signal.SIGSTOP)
    run.heard("prepare")
    _killed(run, "deal")


def _gone_after(run: Run, seconds: float) -> None:
    """It is absent online: what is prepared is answered without it."""
    run.heard("prepared")
    run.kill("deal")
    time.sleep(seconds)
    run.parties["deal"].start()


def _restarted(run: Run) -> None:
    run.heard("prepared")
    run.restart("serve")
