"""Systems measured in turn: both phases from a common start, a sample a run."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from .control import Control

MARK = "SAMPLE "
LONG_RUN_S = 10.0  # a run this long needs no warm-up
MANY = 41  # runs of a short system are enough


@dataclasses.dataclass(frozen=True)
class Result:
    """What one online run gives, apart from its time.

    Args:
        rounds: sequential messages.
        bytes_sent: by this party.
        max_abs_error, argmax_agreement: against the clear; rank 0's are reported,
            rank 1's where rank 0 does not see the result.
    """

    rounds: int
    bytes_sent: int
    max_abs_error: float | None
    argmax_agreement: float | None


class System(Protocol):
    """One way to compute the same thing, measured beside others."""

    activation: str
    engine: str

    def prepare(self) -> float:
        """Whatever happens once per model; seconds one run takes at least, as known."""

    def offline(self) -> int:
        """The offline phase of one run; bytes it sends, all parties together."""

    def online(self) -> Callable[[], Result]:
        """The online phase; the result is looked at after the clock has stopped."""

    def close(self) -> None:
        """Give back what prepare took."""


def measure(
    systems: Sequence[System],
    control: Control,
    *,
    model: str,
    batch: int,
    repeat: int,
    fill_s: float,
    limit_s: float,
    emit: Callable[[Mapping[str, Any]], None],
) -> None:
    """Run the systems in turn, `repeat` times; rank 0 emits each sample.

    1. A first run of each is not counted: it traces, and warms caches. One that takes
       longer than `LONG_RUN_S` has warmed them by itself, and counts.
    2. Every turn runs each system: a short one several times, so that its median rests
       on `fill_s` seconds or `MANY` runs; a long one only while its runs together stay
       below `limit_s`.
    3. Every online phase begins after `Control.silence_s`, so that it does not depend
       on what the connection carried before.
    4. A system of which one run takes longer than that is left out; that is emitted
       too. The last thing emitted says that the model is done, with the round trip
       that the control connection saw.
    5. Before whatever takes time, rank 0 emits what it is, how many runs are done and
       how many there will be.
    """
    cell = {"model": model, "batch": batch}
    silence_s = max(control.swap(control.silence_s()), control.silence_s())
    spent: dict[int, float] = {}
    wanted: dict[int, int] = {}
    done, total = 0, len(systems) * (1 + repeat)

    def announce(index: int) -> None:
        if control.rank == 0:
            emit({**cell, **_name(systems[index]), "progress": [done, total]})

    def run(index: int, *, counted: bool) -> float:
        nonlocal done
        announce(index)
        sample, seconds = _sample(systems[index], control, silence_s)
        done += 1
        if counted or seconds >= LONG_RUN_S:
            spent[index] = spent.get(index, 0.0) + seconds
            if control.rank == 0:
                emit({**cell, **sample})
        return seconds

    for index, system in enumerate(systems):
        announce(index)
        estimate = system.prepare()
        estimate = max(estimate, control.swap(estimate))
        if estimate < LONG_RUN_S:
            estimate = run(index, counted=False)
        if estimate <= limit_s:
            wanted[index] = max(
                repeat, min(MANY, round(fill_s / (silence_s + estimate)))
            )
        elif control.rank == 0:
            reason = f"one run of {estimate:.3g} s is over the limit of {limit_s:g} s"
            emit({**cell, **_name(system), "skipped": reason})
    longest = {index: spent.get(index, 0.0) for index in wanted}
    total = done + sum(wanted.values()) - len(wanted.keys() & spent.keys())
    for turn in range(repeat):
        for index, count in wanted.items():
            first = index in spent and turn == 0  # a long first run was this turn's
            for _ in range(_share(count, turn, repeat) - first):
                if spent.get(index, 0.0) + longest[index] <= limit_s:
                    longest[index] = max(longest[index], run(index, counted=True))
    if control.rank == 0:
        names = [[system.activation, system.engine] for system in systems]
        emit({**cell, "done": names, "rtt_ms": round(control.rtt_s * 1e3, 3)})


def _share(count: int, turn: int, turns: int) -> int:
    """How many of `count` runs fall into one of the turns."""
    return count * (turn + 1) // turns - count * turn // turns


def _name(system: System) -> dict[str, str]:
    return {"activation": system.activation, "engine": system.engine}


def emit_line(sample: Mapping[str, Any]) -> None:
    """Print a sample as a line that the parent's Collector reads."""
    sys.stdout.write(MARK + json.dumps(sample) + "\n")
    sys.stdout.flush()


def _sample(
    system: System, control: Control, silence_s: float
) -> tuple[dict[str, Any], float]:
    """One run of both phases; the sample, and the seconds both agree it took."""
    start = control.start_together()
    offline_bytes = system.offline()
    offline_s = time.monotonic() - start
    time.sleep(silence_s)
    start = control.start_together()
    finish = system.online()
    online_s = time.monotonic() - start
    result = finish()
    mine = {
        "offline_s": offline_s,
        "online_s": online_s,
        "offline_bytes": offline_bytes,
        **dataclasses.asdict(result),
    }
    theirs = control.swap(mine)
    first, second = (mine, theirs) if control.rank == 0 else (theirs, mine)
    sample = {
        **_name(system),
        "online_s": max(first["online_s"], second["online_s"]),
        "offline_s": max(first["offline_s"], second["offline_s"]),
        "offline_bytes": max(first["offline_bytes"], second["offline_bytes"]),
        "rounds": max(first["rounds"], second["rounds"]),
        "bytes_sent": [first["bytes_sent"], second["bytes_sent"]],
    }
    for name in ("max_abs_error", "argmax_agreement"):
        sample[name] = second[name] if first[name] is None else first[name]
    return sample, sample["online_s"] + sample["offline_s"]
