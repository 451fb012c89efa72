"""Bytes of one activation by its polynomial's degree, in every engine.

    python -m benchmarks.degrees                  # the table
    python -m benchmarks.degrees --json FILE.json

Nothing is measured: the masked engine's bytes are those of its plan for a small network
with one activation layer, CrypTen's protocols' those that they declare, which tests
hold to what is sent. ReLU is fitted once for all channels, and once for each channel.
In the masked engine bytes follow from how many truncations the planner makes of the
powers, and what each keeps; at high degrees powers share one.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import crypten_espn as espn
from crypten_espn.cost import RING_BYTES
from crypten_espn.masked.plan import Plan
from crypten_espn.masked.planning import masked_model
from crypten_espn.polynomial import AnyPolynomial
from crypten_espn.protocols import PROTOCOLS, settings
from crypten_espn.wire.packing import packed_bytes

from .rows import machine, read_rows, write_rows
from .tables import columns

DEGREES = (2, 4, 6, 8, 10)
SHARED, BY_CHANNEL = "one for all", "one a channel"
_CHANNELS, _SIZE, _INPUTS = 16, 8, 64


@dataclasses.dataclass(frozen=True)
class DegreeRow:
    """What one activation layer costs under one engine.

    Args:
        polynomial: SHARED or BY_CHANNEL.
        degree: of the polynomial.
        engine: masked or a protocol's name.
        elements: activations of the layer.
        truncations: of its powers; 0 where they are the protocol's own.
        online_bytes: of both parties, for all elements.
        dealer_bytes: from the dealer, likewise.
    """

    polynomial: str
    degree: int
    engine: str
    elements: int
    truncations: int
    online_bytes: int
    dealer_bytes: int


def network(polynomial: str, degree: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """A convolution, an activation and a linear layer, and inputs to plan it with.

    The filters' sizes span a factor of four, as those of trained layers do.
    """
    torch.manual_seed(0)
    filters = torch.nn.Conv2d(3, _CHANNELS, 3, padding=1).requires_grad_(False)
    made = torch.nn.Sequential(
        filters,
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(_CHANNELS * _SIZE**2, 10),
    )
    made = made.eval().requires_grad_(False)
    filters.weight *= 2.0 ** torch.linspace(-1, 1, _CHANNELS)[:, None, None, None]
    x = torch.randn(_INPUTS, 3, _SIZE, _SIZE)
    if polynomial == BY_CHANNEL:
        return espn.calibrate(made, x, degree=degree), x
    radius = 1.25 * float(filters(x).abs().max())
    shared = espn.Polynomial.fit(
        torch.relu, degree=degree, interval=(-radius, radius), frac_bits=20
    )
    made[1] = espn.PolynomialActivation(shared)
    return made, x


def planned(polynomial: str, degree: int) -> tuple[Plan, AnyPolynomial]:
    """The network's plan, and the polynomial that it computes."""
    made, x = network(polynomial, degree)
    found = next(m for m in made.modules() if isinstance(m, espn.PolynomialActivation))
    return masked_model(espn.convert(made, x), x).plan, found.polynomial


def rows() -> Iterator[DegreeRow]:
    """A row for each polynomial, degree and engine."""
    for kind in (SHARED, BY_CHANNEL):
        for degree in DEGREES:
            plan, polynomial = planned(kind, degree)
            yield masked_row(kind, degree, plan)
            yield from declared_rows(kind, degree, polynomial, plan.elements(0))


def declared_rows(
    kind: str, degree: int, polynomial: AnyPolynomial, elements: int
) -> Iterator[DegreeRow]:
    """What CrypTen's protocols declare, with local truncation."""
    for name in PROTOCOLS:
        with settings(protocol=name, truncation="local") as chosen:
            cost = chosen.cost(polynomial, elements)
        yield DegreeRow(
            *(kind, degree, name, elements, 0),
            2 * cost.bytes_sent,
            RING_BYTES * cost.offline_elements,
        )


def masked_row(kind: str, degree: int, plan: Plan) -> DegreeRow:
    """What the plan's one step sends and is dealt."""
    (step,) = plan.steps
    act, count = step.activation, plan.elements(0)
    online = sum(packed_bytes(count, b) for b in (*step.opened_bits, act.sent_bits))
    logits = packed_bytes(plan.elements(1), plan.output.ring)
    dealt = plan.dealer_bytes() - logits
    return DegreeRow(kind, degree, "masked", count, len(act.groups), online, dealt)


def write(path: Path, found: Sequence[DegreeRow]) -> None:
    """Write the rows to a JSON file, in one step."""
    write_rows(path, machine(), found)


def read(path: Path) -> tuple[dict[str, Any], list[DegreeRow]]:
    """The machine and the rows of a JSON file; see `read_rows`."""
    return read_rows(path, DegreeRow)


COLUMNS = ("polynomial", "degree", "engine", "truncations", "online", "dealer")


def cells(row: DegreeRow) -> tuple[str, ...]:
    """A row as text, one piece per entry of COLUMNS; bytes of one activation."""
    return (
        row.polynomial,
        str(row.degree),
        row.engine,
        str(row.truncations or ""),
        f"{row.online_bytes / row.elements:g}",
        f"{row.dealer_bytes / row.elements:g}",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.degrees",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    found = list(rows())
    print(columns([COLUMNS, *map(cells, found)], left=3))
    if options.json:
        write(options.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
