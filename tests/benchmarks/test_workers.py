"""Server processes behind one port: what they answered, and the bytes of their line."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from benchmarks import networks, workers
from benchmarks.rows import Spread, machine, write_rows
from crypten_espn.masked.messages import CLIENT
from crypten_espn.masked.model import MaskedModel

ONE = workers.Served(
    "resnet18",
    *(1, 2, 1, 16, "server", "fast"),
    Spread.of([0.02]),
    Spread.of([0.04]),
    1,
    60_000_000,
    3_000_000,
    True,
)


def test_speeds_stand_beside_that_of_one_process(tmp_path: Path) -> None:
    two = dataclasses.replace(
        ONE, workers=2, answering=2, seconds=Spread.of([0.0125]), exact=False
    )
    path = tmp_path / "workers.json"
    write_rows(path, machine(), [ONE, two])
    assert workers.read(path)[1] == [ONE, two]
    _, lines = workers.lines_of(path)
    shown = [dict(zip(workers.COLUMNS, line, strict=True)) for line in lines]
    assert [line["images/s"] for line in shown] == ["50.0", "80.0"]
    assert [line["of one"] for line in shown] == ["1.00", "1.60"]
    assert [line["as estimated"] for line in shown] == ["exactly", "NO"]
    assert ONE.line_images == pytest.approx(10e9 * 1448 / 1500 / 8 / 60e6)


@pytest.mark.slow
def test_two_processes_answer_two_clients_with_the_bytes_of_the_estimate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def small(name: str, *, precision: str) -> MaskedModel:
        return networks.planned(name, 8, precision=precision)

    monkeypatch.setattr(workers, "planned", small)
    row = workers.measure(
        "minionn",
        workers=2,
        clients=2,
        batch=1,
        inferences=2,
        repeat=1,
        corrections=CLIENT,
    )
    assert row.exact and row.answering == 2
    assert row.received > row.sent > 0
