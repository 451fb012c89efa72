"""Mutants tried in child processes: their numbers, limits, and what became of them.

A module of mutants calls `serve` when it is run, with how to try the mutant of a
number; `run` starts it, and again where a signal ended it.
"""

from __future__ import annotations

import base64
import copy
import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Of one mutant, in seconds of processor time: beyond it the child ends by SIGPROF.
PROCESSOR = 120.0

EDGES = (
    0, 1, 2, 3, 4, 7, 8, 16, 20, 31, 32, 33, 56, 62, 63, 64, 100, 1 << 12, 1 << 16,
    (1 << 16) + 1, 1 << 24, 1 << 26, 1 << 31, 1 << 32, 1 << 36, (1 << 62) - 1, 1 << 62,
    (1 << 63) - 1, 1 << 63, 1 << 64, 1 << 100, -1, -2, -(1 << 31), -(1 << 63),
    -(1 << 63) - 1,
)  # fmt: skip
OTHER: tuple[Any, ...] = (
    None,
    True,
    False,
    "",
    "7",
    "read",
    0.5,
    1.0,
    1e300,
    [],
    {},
    [1],
    [[0]],
)


# ---------------------------------------------------------------- mutations of JSON


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key below a value."""
    keys: Any = value if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def mutate(
    value: Any,
    toss: random.Random,
    further: dict[str, Callable[[Any, random.Random], None]] | None = None,
) -> None:
    """Change one place below a value of JSON.

    Args:
        value: a dictionary or list, changed in place.
        toss: what decides.
        further: by name, mutations besides those that fit every value; likely twice.
    """
    known = list(places(value))
    if not known:
        return
    numbers = [(c, k) for c, k in known if type(c[k]) in (int, float)]
    kind = toss.choice(
        ("near", "near", "near", "edge", "edge", "swap", "copy", "copy",
         *(further or ()), *(further or ()), "delete", "double", "other")
    )  # fmt: skip
    if further and kind in further:
        further[kind](value, toss)
        return
    if kind in ("near", "edge") and numbers:
        container, key = toss.choice(numbers)
        old = container[key]
        near = (old + 1, old - 1, old * 2, old // 2, -old, old + 2, old * 16)
        container[key] = toss.choice(near if kind == "near" else EDGES)
        return
    container, key = toss.choice(known)
    alike = [(c, k) for c, k in known if type(c[k]) is type(container[key])]
    if kind == "swap":
        other, there = toss.choice(alike)
        values = copy.deepcopy(container[key]), copy.deepcopy(other[there])
        other[there], container[key] = values
    elif kind == "copy":
        other, there = toss.choice(alike)
        container[key] = copy.deepcopy(other[there])
    elif kind == "delete":
        del container[key]
    elif kind == "double" and isinstance(container, list):
        container.insert(key, copy.deepcopy(container[key]))
    elif kind == "other":
        container[key] = copy.deepcopy(toss.choice(OTHER))


# ---------------------------------------------------------------- mutations of bytes


def damaged(data: bytes, toss: random.Random, *, within: int | None = None) -> bytes:
    """Bytes flipped, cut, repeated or put in, among the first `within` mostly."""
    if not data:
        return data
    changed = bytearray(data)
    for _ in range(toss.choice((1, 1, 2, 4))):
        top = len(data) if within is None or toss.random() < 0.2 else within
        at = toss.randrange(min(top, len(data)))
        kind = toss.randrange(6)
        if kind <= 2:
            changed[at : at + 1] = bytes([toss.randrange(256)])
        elif kind == 3:
            del changed[at : at + toss.randint(1, 40)]
        elif kind == 4:
            changed[at:at] = changed[at : at + toss.randint(1, 40)]
        else:
            del changed[at:]
    return bytes(changed)


# ---------------------------------------------------------------- trying them


def taken() -> tuple[list[bytes], int]:
    """In a child: the files that `run` gave, and its seed."""
    return [base64.b64decode(text) for text in json.load(sys.stdin)], int(sys.argv[1])


def serve(attempt: Callable[[int], str], *, memory: int) -> None:
    """In a child: try the mutants of a range, each one's number first, its result next.

    The range's first number and its length are the last arguments of the command.

    Args:
        attempt: tries a mutant; a word for what became of it. Exceptions are faults.
        memory: of address space, beyond what importing takes.
    """
    import torch

    import crypten_espn  # noqa: F401 - CrypTen cannot be imported before its patches

    torch.set_num_threads(1)
    first, count = map(int, sys.argv[-2:])
    used = int(Path("/proc/self/statm").read_text().split()[0])
    limit = memory + used * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for number in range(first, first + count):
        print(number, end=" ", flush=True)
        signal.setitimer(signal.ITIMER_PROF, PROCESSOR)
        try:
            print(attempt(number))
        except Exception:
            print(json.dumps(traceback.format_exc(limit=-6)))


@dataclass
class Outcome:
    """What became of the mutants.

    Args:
        counts: by result.
        faults: number and traceback, or the signal's number, of each that ended
            neither in a refusal by name nor in a result.
    """

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[tuple[int, str]] = field(default_factory=list)


def run(module: str, given: Sequence[bytes], *, seed: int, count: int) -> Outcome:
    """Try `count` mutants of a module in child processes, one after the other.

    Args:
        module: one that calls `serve`.
        given: the files that are mutated.
        seed: of the mutations.
        count: how many.
    """
    outcome, following = Outcome(), 0
    texts = json.dumps([base64.b64encode(data).decode() for data in given])
    while following < count:
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile() as errors:
            child = subprocess.run(
                [sys.executable, "-m", module, str(seed),
                 str(following), str(count - following)],
                input=texts, text=True, stdout=output, stderr=errors,
                cwd=Path(__file__).parents[1],
            )  # fmt: skip
            output.seek(0)
            errors.seek(0)
            tried = following
            for line in output:
                number, _, result = line.partition(" ")
                tried = int(number) + 1
                result = result.strip()
                if result and not result.startswith('"'):
                    outcome.counts[result] += 1
                else:
                    said = json.loads(result) if result else str(child.returncode)
                    outcome.faults.append((int(number), said))
            if child.returncode and tried == following:
                raise RuntimeError(errors.read().decode()[-2000:])
            following = tried
    return outcome
