"""Mutated plans: each is refused by name, or can be dealt, prepared and inferred.

`mutant` makes the plan of a number from a seed; `run` tries a range of numbers in a
child process with a memory limit, and starts another where a signal ends it.

    python -m tests.masked.fuzz_plans SEED FIRST COUNT < texts.json
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from typing import Any

from .. import fuzzing
from ..fuzzing import Outcome, mutate, places

MEMORY = 6 << 30  # of a child's address space, beyond what importing takes
MAX_WORK = 1 << 24  # larger plans are accepted or refused, not run
MAX_DEALER_MEMORY = 1 << 27
RUN, LARGE, REFUSED = "run", "too large to run", "refused"


# ---------------------------------------------------------------- mutations


def mutant(texts: Sequence[str], seed: int, number: int) -> str:
    """The text of mutant `number`, the same for the same seed."""
    toss = random.Random(f"{seed} {number}")
    plan = json.loads(toss.choice(texts))
    for _ in range(toss.choice((1, 1, 1, 2, 2, 3, 6))):
        mutate(plan, toss, {"wrap": _wrap, "channels": _channels})
    return json.dumps(plan)


def _wrap(plan: dict[str, Any], toss: random.Random) -> None:
    nodes = [
        (c, k) for c, k in places(plan) if isinstance(c[k], dict) and "type" in c[k]
    ]
    if nodes:
        container, key = toss.choice(nodes)
        container[key] = _wrapped(container[key], toss)


def _channels(plan: dict[str, Any], toss: random.Random) -> None:
    """Another number of channels, or of powers, at one place of a polynomial."""
    names = ("coeffs", "constant", "coefficient")
    known = [
        (c, k)
        for c, k in places(plan)
        if k in names and isinstance(c[k], list) and c[k]
    ]
    if not known:
        return
    container, key = toss.choice(known)
    columns = container[key]
    kind = toss.randrange(5)
    if kind == 0:
        columns.append(copy.deepcopy(columns[-1]))
    elif kind == 1:
        columns.pop(toss.randrange(len(columns)))
    elif kind == 2:
        container[key] = columns[:1] * toss.choice((1, 2, 8, 16, 1 << 12))
    elif isinstance(columns[0], list):
        row = toss.choice(columns)
        row[len(row) if kind == 3 else 0 :] = [toss.randrange(-9, 9)] * toss.randrange(
            3
        )


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
            {"type": "move", "parts": [node] * (1 + small(2)), "shape": window,
             "boxes": [[small(2), small(9), small(3), [[2, small(3) - 1, 1]]]]},
            {"type": "mix", "x": node, "rows": [[small(3), pads]],
             "columns": [[small(3), window]] * (1 + small(3))},
            {"type": "factors", "first": node, "second": copy.deepcopy(node)},
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
    weights = Weights(plan.weights, tuple(integers), tuple(biases))
    pair = Pair(MaskedModel(plan, weights, PlanReport((), (), 0.0, 0.0, 1)))
    import torch

    z, transcript = pair.infer(torch.zeros(1, *plan.input.shape))
    assert plan.decode(z).shape == (1, *plan.output_shape)
    assert len(transcript.messages) == plan.messages
    return RUN


def run(texts: Sequence[str], *, seed: int, count: int) -> Outcome:
    """Try `count` mutants in child processes, one after the other."""
    given = [text.encode() for text in texts]
    return fuzzing.run(__name__, given, seed=seed, count=count)


def main() -> None:
    """Try a range of mutants of the plans on standard input."""
    given, seed = fuzzing.taken()
    texts = [data.decode() for data in given]
    fuzzing.serve(lambda number: attempt(mutant(texts, seed, number)), memory=MEMORY)


if __name__ == "__main__":
    main()
