"""Sessions as rows: measured, kept, shown, and divided by what linear growth gives."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from benchmarks import growth, link, offline, sessions
from benchmarks.rows import Spread, machine, write_rows
from benchmarks.sessions import Point, Session

BASE = Session(
    model="resnet18",
    size=32,
    batch=1,
    count=8,
    network="loopback",
    rtt_ms=0.0,
    mbit=None,
    threads=1,
    corrections="server",
    precision="fast",
    activations=1000,
    macs=50_000,
    one_s=Spread.of([0.02, 0.03, 0.04]),
    many_s=Spread.of([0.02]),
    online_s=Spread.of([0.01]),
    dealer_bytes=55_000_000,
    client_bytes=2_000_000,
    online_bytes=(3_000_000, 4_000_000),
    opened_bytes=44_000_000,
    idle_bytes=(430_000_000, 420_000_000, 410_000_000),
    peak_bytes=(530_000_000, 440_000_000, 490_000_000),
)


def linear(**changes: Any) -> Session:
    """The base at batch 8, grown as the work is but for what is changed."""
    grown = dataclasses.replace(
        BASE,
        batch=8,
        dealer_bytes=8 * BASE.dealer_bytes,
        client_bytes=8 * BASE.client_bytes,
        online_bytes=(8 * BASE.online_bytes[0], 8 * BASE.online_bytes[1]),
    )
    return dataclasses.replace(grown, **changes)


def test_points_prepare_as_many_inferences_as_fit() -> None:
    counts = [
        Point.of("resnet18", batch=batch, size=size).count
        for batch, size in ((1, 32), (8, 32), (32, 32), (1, 64), (1, 128), (1, 224))
    ]
    assert counts == [8, 8, 2, 8, 4, 2]
    assert Point.of("resnet50") == Point("resnet50", 224, 1, 2)
    assert Point.of("resnet18", count=32).count == 32


def test_rows_survive_their_file_and_show_bytes_for_an_image(tmp_path: Path) -> None:
    path = tmp_path / "offline.json"
    write_rows(path, machine(), [BASE, linear()])
    assert offline.read(path)[1] == [BASE, linear()]
    _, (first, second) = offline.lines_of(path)
    shown = dict(zip(offline.COLUMNS, first, strict=True))
    assert shown["prepare(1) ms"] == "30.0" and shown["online ms"] == "10.0"
    assert shown["dealer MB"] == "55.00" and shown["online MB"] == "7.00"
    assert shown["client mem MB"] == "420 to 440"
    assert second[offline.COLUMNS.index("dealer MB")] == "55.00"


def test_linear_growth_is_one_and_what_is_above_is_named() -> None:
    (point,) = growth.grown([BASE, linear()])
    assert set(point.shares.values()) == {1.0} and point.series == "batch"
    text = growth.table([BASE, linear()])
    assert "nothing is above 1.1 times linear growth" in text
    slow = linear(online_s=Spread.of([0.012]), one_s=Spread.of([0.0303]))
    text = growth.table([BASE, slow])
    assert "batch: online of resnet18 at 32 pixels, batch 8, is 1.20 times" in text
    assert "prepare(1) of" not in text
    assert "prepare(1) of" in growth.table([BASE, slow], tolerance=1.0)


def test_larger_images_are_measured_by_the_work_they_make() -> None:
    larger = dataclasses.replace(
        BASE,
        size=64,
        activations=4000,
        macs=200_000,
        one_s=Spread.of([0.12]),
        many_s=Spread.of([0.04]),
        online_s=Spread.of([0.04]),
        dealer_bytes=4 * BASE.dealer_bytes,
        client_bytes=5 * BASE.client_bytes,
    )
    (point,) = growth.grown([larger, BASE])
    assert point.series == "size"
    assert list(point.shares.values()) == pytest.approx([1, 0.5, 1, 1, 1.25, 0.25])


def test_points_of_another_path_or_without_their_base_are_not_compared() -> None:
    for other in ({"network": "wan"}, {"corrections": "client"}, {"precision": "high"}):
        assert list(growth.grown([BASE, linear(**other)])) == []
    assert list(growth.grown([linear()])) == []


@pytest.mark.slow
def test_a_session_is_measured_between_its_processes() -> None:
    point = Point.of("minionn", size=8, batch=2, count=3)
    row = sessions.measure(point, "loopback", repeat=2, threads=1, timeout_s=200)
    assert (row.model, row.size, row.batch, row.count) == ("minionn", 8, 2, 3)
    assert row.one_s.repeats == row.many_s.repeats == 2
    assert row.online_s.repeats == 2 * (1 + 3)
    assert row.dealer_bytes > row.client_bytes > 0 < row.opened_bytes
    pairs = zip(row.idle_bytes, row.peak_bytes, strict=True)
    assert all(10**7 < idle <= peak for idle, peak in pairs)
    assert row.macs > row.activations > 0


def test_lost_points_are_told_and_the_others_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(point: Point, network: str, **_: object) -> Session:
        if point.model == "minionn":
            raise link.PartyError("party 1 is gone")
        return BASE

    monkeypatch.setattr(sessions, "measure", measure)
    path = tmp_path / "rows.json"
    given = ["--models", "minionn", "resnet18", "--json", str(path)]
    assert offline.main(given) == 3
    assert offline.read(path)[1] == [BASE]
    seen = capsys.readouterr()
    assert "party 1 is gone" in seen.err and "prepare(n) ms" in seen.out


def test_growth_runs_every_point_of_its_series_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Point] = []

    def measure(point: Point, network: str, **_: object) -> Session:
        asked.append(point)
        row = linear() if point.batch > 1 else BASE
        return dataclasses.replace(row, **dataclasses.asdict(point))

    monkeypatch.setattr(sessions, "measure", measure)
    assert growth.main(["--series", "batch", "size", "--tolerance", "2"]) == 0
    assert [(point.batch, point.size) for point in asked] == [
        *((1, 32), (8, 32), (32, 32)),
        *((1, 64), (1, 128), (1, 224)),
    ]
    seen = capsys.readouterr().out
    assert "batch   resnet18" in seen and "size    resnet18" in seen
    assert "nothing is above 2 times linear growth" in seen
