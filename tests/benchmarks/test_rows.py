"""Rows survive the file, the file survives interruption, and spreads are right."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks import rows, tables
from benchmarks.plots import plot_lines
from benchmarks.rows import Results, ResultsError, Row, Skipped, Spread


def make_row(**changes: Any) -> Row:
    values: dict[str, Any] = {
        "model": "resnet18",
        "activation": "espn",
        "engine": "crypten+direct",
        "network": "wan",
        "rtt_ms": 100.0,
        "mbit": 100.0,
        "batch": 1,
        "threads": 1,
        "rounds": 40,
        "bytes_sent": (1000, 900),
        "online_s": Spread.of([2.0, 1.0, 3.0]),
        "offline_s": Spread.of([0.5]),
        "total_s": Spread.of([2.5, 1.5, 3.5]),
        "offline_bytes": 5000,
        "max_abs_error": 0.01,
        "argmax_agreement": None,
    }
    return Row(**{**values, **changes})


def coverage(count: int, low: int) -> float:
    """Chance that the median lies between order statistics low and count - 1 - low."""
    outside = sum(math.comb(count, below) for below in range(low + 1))
    return 1 - 2 * outside / 2**count


@pytest.mark.parametrize("count", [6, 7, 8, 9, 12, 20, 51])
def test_interval_is_the_narrowest_that_covers_95_percent(count: int) -> None:
    spread = Spread.of(float(value) for value in reversed(range(count)))
    low, high = spread.ci95
    assert high == count - 1 - low
    assert coverage(count, int(low)) >= 0.95 > coverage(count, int(low) + 1)


def test_few_samples_give_the_whole_range() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, (1.0, 3.0), 3)
    with pytest.raises(ValueError, match="at least one"):
        Spread.of([])


def test_rows_survive_the_file_and_it_is_written_after_each(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    results = Results(path)
    for rounds in (1, 2):
        results.add(make_row(rounds=rounds))
        assert [row.rounds for row in Results.read(path).rows][-1] == rounds
    results.skip(Skipped("vgg16", "masked", "masked", "wan", "takes too long"))
    again = Results.read(path)
    assert (again.rows, again.skipped) == (results.rows, results.skipped)
    assert again.machine == results.machine
    assert os.listdir(path.parent) == ["results.json"]
    assert set(json.loads(path.read_text())["rows"][0]) == {
        *("model", "activation", "engine", "network", "rtt_ms", "mbit", "batch"),
        *("threads", "rounds", "bytes_sent", "online_s", "offline_s", "total_s"),
        *("offline_bytes", "max_abs_error", "argmax_agreement"),
    }


def test_a_failed_write_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    rows.write_atomically(path, "old")

    def full(*_: object) -> None:
        raise OSError(28, "no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        rows.write_atomically(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["results.json"]


def test_machine_header_names_what_the_seconds_depend_on() -> None:
    header = rows.machine()
    assert header["cores"] >= 1 and header["processor"] and header["torch"]
    line = tables.machine_line(header)
    assert header["commit"] in line and header["date"] in line


@pytest.mark.parametrize("text", ["", "{}", '{"machine": {}, "rows": [{"model": 1}]}'])
def test_other_files_are_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ResultsError, match=r"other\.json: not a results file"):
        Results.read(path)
    with pytest.raises(ResultsError, match="absent"):
        Results.read(tmp_path / "absent.json")


def test_table_and_csv_show_every_row_and_every_skipped_cell() -> None:
    results = Results()
    results.add(make_row())
    results.add(make_row(activation="masked", engine="masked", mbit=None))
    results.skip(Skipped("vgg16", "espn", "crypten+gloo", "wan", "over the limit"))
    text = tables.table(results)
    assert "espn (direct)" in text and "masked" in text
    assert "skipped: wan  vgg16  espn  crypten+gloo: over the limit" in text
    first, second = csv.DictReader(
        io.StringIO(tables.frame(results).to_csv(index=False, float_format="%.6g"))
    )
    assert first["online_s"] == "2" and first["online_s_max"] == "3"
    assert (first["bytes_sent_0"], first["bytes_sent_1"]) == ("1000", "900")
    assert first["commit"] == results.machine["commit"] and first["date"]
    assert second["mbit"] == "" and second["argmax_agreement"] == ""


@pytest.mark.slow
def test_plots_are_written_as_png_and_svg(tmp_path: Path) -> None:
    points = [(float(x), Spread.of([x + 1.0, x + 2.0])) for x in (0, 50, 100)]
    files = plot_lines(
        tmp_path / "figure",
        {"espn": points, "relu": points},
        title="one layer",
        x_label="round trip, ms",
        y_label="seconds",
    )
    assert [file.suffix for file in files] == [".png", ".svg"]
    assert files[0].read_bytes()[:4] == b"\x89PNG" and "<svg" in files[1].read_text()


def test_row_field_order_is_the_documented_one() -> None:
    assert dataclasses.fields(Row)[0].name == "model"
    assert make_row().system == "espn (direct)"
    assert make_row(activation="masked", engine="masked").system == "masked"


def test_an_offline_time_that_no_session_took_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    results = Results(path)
    masked = make_row(activation="masked", engine="masked")
    results.add(masked)
    results.add(make_row())
    assert Results.read(path).rows == [masked, make_row()]
    content = json.loads(path.read_text())
    assert content["machine"].pop(rows.OFFLINE) == rows.SESSION
    path.write_text(json.dumps(content))
    old, other = Results.read(path).rows
    assert math.isnan(old.offline_s.median) and math.isnan(old.total_s.median)
    assert old.online_s == masked.online_s and other == make_row()


def test_a_table_ends_with_the_masked_engine_beside_plaintext() -> None:
    near = {"network": "loopback", "online_s": Spread.of([0.015])}
    results = Results()
    results.add(make_row(activation="masked", engine="masked", **near))
    assert tables.limits(results.rows) == []
    for form, seconds in (("eager", 0.01), ("folded", 0.012), ("frozen", 0.006)):
        plain = {**near, "online_s": Spread.of([seconds])}
        results.add(make_row(activation="plain", engine=f"torch+{form}", **plain))
    results.add(make_row(activation="masked", engine="masked"))  # over wan
    last = tables.table(results).splitlines()[-1]
    assert last == (
        "resnet18: masked online is 1.50 times torch+eager and 2.50 times torch+frozen"
    )
