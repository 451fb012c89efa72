"""Mutated plans: each is refused by name, or can be dealt, prepared and inferred.

`mutant` makes the plan of a number from a seed; `run` tries a range of numbers in a
child process with a memory limit, and starts another where a signal ends it.

    python -m tests.masked.fuzz_plans SEED FIRST COUNT < texts.json
"""

from __future__ import annotations

import copy
import json
import random
import resource
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MEMORY = 6 << 30  # of a child's address space, beyond what importing takes
MAX_WORK = 1 << 24  # larger plans are accepted or refused, not run
MAX_DEALER_MEMORY = 1 << 27
RUN, LARGE, REFUSED = "run", "too large to run", "refused"

_EDGES = (
    0, 1, 2, 3, 4, 7, 8, 16, 20, 31, 32, 33, 56, 62, 63, 64, 100, 1 << 12, 1 << 16,
    (1 << 16) + 1, 1 << 24, 1 << 26, 1 << 31, 1 << 32, 1 << 36, (1 << 62) - 1, 1 << 62,
    (1 << 63) - 1, 1 << 63, 1 << 64, 1 << 100, -1, -2, -(1 << 31), -(1 << 63),
    -(1 << 63) - 1,
)  # fmt: skip
_OTHER: tuple[Any, ...] = (
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


# ---------------------------------------------------------------- mutations


def mutant(texts: Sequence[str], seed: int, number: int) -> str:
    """The text of mutant `number`, the same for the same seed."""
    toss = random.Random(f"{seed} {number}")
    plan = json.loads(toss.choice(texts))
    for _ in range(toss.choice((1, 1, 1, 2, 2, 3, 6))):
        _mutate(plan, toss)
    return json.dumps(plan)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key below a value."""
    keys: Any = value if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def _mutate(plan: dict[str, Any], toss: random.Random) -> None:
    places = list(_places(plan))
    if not places:
        return
    numbers = [(c, k) for c, k in places if type(c[k]) in (int, float)]
    kind = toss.choice(
        ("near", "near", "near", "edge", "edge", "swap", "copy", "copy", "wrap", "wrap",
         "delete", "double", "other")
    )  # fmt: skip
    if kind in ("near", "edge") and numbers:
        container, key = toss.choice(numbers)
        old = container[key]
        near = (old + 1, old - 1, old * 2, old // 2, -old, old + 2, old * 16)
        container[key] = toss.choice(near if kind == "near" else _EDGES)
        return
    container, key = toss.choice(places)
    if kind == "swap":
        alike = [(c, k) for c, k in places if type(c[k]) is type(container[key])]
        other, there = toss.choice(alike)
        values = copy.deepcopy(container[key]), copy.deepcopy(other[there])
        other[there], container[key] = values
    elif kind == "copy":
        alike = [(c, k) for c, k in places if type(c[k]) is type(container[key])]
        other, there = toss.choice(alike)
        container[key] = copy.deepcopy(other[there])
    elif kind == "wrap":
        nodes = [(c, k) for c, k in places if isinstance(c[k], dict) and "type" in c[k]]
        if nodes:
            container, key = toss.choice(nodes)
            container[key] = _wrapped(container[key], toss)
    elif kind == "delete":
        del container[key]
    elif kind == "double" and isinstance(container, list):
        container.insert(key, copy.deepcopy(container[key]))
    elif kind == "other":
        container[key] = copy.deepcopy(toss.choice(_OTHER))


def _wrapped(node: Any, toss: random.Random) -> dict[str, Any]:
    def small(top: int) -> int:
        return toss.randrange(top)

    pads = [small(3) for _ in range(4)]
    window = [1 + small(3), 1 + small(3)]
    return toss.choice(
        (
            {"type": "pad", "x": node, "pads": pads},
            {"type": "pool", "x": node, "kernel": window, "stride": [1 + small(2), 1],
             "pads": pads},
            {"type": "flatten", "x": node},
            {"type": "add", "terms": [node, copy.deepcopy(node)]},
            {"type": "concat", "parts": [node] * (1 + small(3))},
            {"type": "read", "source": small(4), "multiplier": 1 + small(5)},
        )
    )  # fmt: skip


# ---------------------------------------------------------------- trying one


def attempt(text: str) -> str:
    """Read a plan; deal, prepare and infer with it where it is accepted.

    Returns: RUN, LARGE or REFUSED; any exception but a PlanError on reading is a fault.
    """
    import numpy as np

    from crypten_espn.errors import PlanError
    from crypten_espn.masked import kernels
    from crypten_espn.masked.model import MaskedModel, PlanReport
    from crypten_espn.masked.plan import Plan
    from crypten_espn.masked.weights import Weights

    from .cases import Pair

    try:
        plan = Plan.from_json(text)
    except PlanError:
        return REFUSED
    assert Plan.from_json(plan.to_json()).digest == plan.digest
    if plan.work > MAX_WORK or plan.dealer_memory() > MAX_DEALER_MEMORY:
        return LARGE
    rng = np.random.default_rng(0)
    integers, biases = [], []
    for shape in plan.weights:
        dtype = kernels.ring_dtype(shape.ring)
        integers.append(rng.integers(-9, 9, shape.kernel_layout).astype(dtype))
        biases.append(rng.integers(-9, 9, shape.shape[0]).astype(dtype))
    weights = Weights(tuple(integers), tuple(biases))
    pair = Pair(MaskedModel(plan, weights, PlanReport((), (), 0.0, 0.0, 1)))
    import torch

    z, transcript = pair.infer(torch.zeros(1, *plan.input.shape))
    assert plan.decode(z).shape == (1, *plan.output_shape)
    assert len(transcript.messages) == plan.messages
    return RUN


def main() -> None:
    """Try a range of mutants; print each one's number first, then its result."""
    seed, first, count = map(int, sys.argv[1:])
    texts = json.load(sys.stdin)
    import torch

    import crypten_espn  # noqa: F401 - CrypTen cannot be imported before its patches

    torch.set_num_threads(1)
    taken = int(Path("/proc/self/statm").read_text().split()[0])
    limit = MEMORY + taken * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for number in range(first, first + count):
        print(number, end=" ", flush=True)
        try:
            print(attempt(mutant(texts, seed, number)))
        except Exception:
            print(json.dumps(traceback.format_exc(limit=-6)))


# ---------------------------------------------------------------- trying many


@dataclass
class Outcome:
    """What became of the mutants.

    Args:
        counts: by result.
        faults: number and traceback, or the signal's number, of each that was neither
            refused by name nor run.
    """

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[tuple[int, str]] = field(default_factory=list)


def run(texts: Sequence[str], *, seed: int, count: int) -> Outcome:
    """Try `count` mutants in child processes, one after the other."""
    outcome, following = Outcome(), 0
    while following < count:
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile() as errors:
            arguments = (seed, following, count - following)
            child = subprocess.run(
                [sys.executable, "-m", "tests.masked.fuzz_plans",
                 *map(str, arguments)],
                input=json.dumps(list(texts)), text=True, stdout=output, stderr=errors,
                cwd=Path(__file__).parents[2],
            )  # fmt: skip
            output.seek(0)
            errors.seek(0)
            tried = following
            for line in output:
                number, _, result = line.partition(" ")
                tried = int(number) + 1
                result = result.strip()
                if result in (RUN, LARGE, REFUSED):
                    outcome.counts[result] += 1
                else:
                    said = json.loads(result) if result else str(child.returncode)
                    outcome.faults.append((int(number), said))
            if child.returncode and tried == following:
                raise RuntimeError(errors.read().decode()[-2000:])
            following = tried
    return outcome


if __name__ == "__main__":
    main()
