"""A change on the wire is flagged and fails; a change in time is neither."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from benchmarks import harness
from benchmarks.compare import compare
from benchmarks.rows import Results, ResultsError, Row, Spread

ROW = Row(
    model="resnet18",
    activation="espn",
    engine="crypten+direct",
    network="wan",
    rtt_ms=100.0,
    mbit=100.0,
    batch=1,
    threads=1,
    rounds=40,
    bytes_sent=(1000, 900),
    online_s=Spread.of([1.0]),
    offline_s=Spread.of([1.0]),
    total_s=Spread.of([2.0]),
    offline_bytes=5000,
    max_abs_error=0.01,
    argmax_agreement=1.0,
)


def write(path: Path, *rows: Row) -> str:
    results = Results(path)
    for row in rows:
        results.add(row)
    return str(path)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"rounds": 41}, "rounds was 40, is 41"),
        ({"bytes_sent": (1000, 901)}, "bytes_sent was (1000, 900), is (1000, 901)"),
        ({"offline_bytes": 0}, "offline_bytes was 5000, is 0"),
    ],
)
def test_change_on_the_wire_is_flagged_and_fails(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    flag: str,
) -> None:
    old = write(tmp_path / "old.json", ROW)
    new = write(tmp_path / "new.json", dataclasses.replace(ROW, **changes))
    assert harness.main(["--compare", old, new]) == 1
    assert f"CHANGED resnet18 espn crypten+direct wan 1: {flag}" in (
        capsys.readouterr().out
    )


def test_time_alone_may_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slower = dataclasses.replace(ROW, online_s=Spread.of([9.0]), max_abs_error=0.02)
    extra = dataclasses.replace(ROW, batch=8)
    old = write(tmp_path / "old.json", ROW)
    new = write(tmp_path / "new.json", slower, extra)
    assert harness.main(["--compare", old, new]) == 0
    out = capsys.readouterr().out
    assert "rounds and bytes are those of" in out
    assert "slower or faster: resnet18 espn crypten+direct wan 1: +800%" in out
    assert "online medians: 0 of 1 within 15%" in out
    assert (
        "only in the new run: ('resnet18', 'espn', 'crypten+direct', 'wan', 8)" in out
    )


def test_nothing_in_common_is_an_error_not_a_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = write(tmp_path / "old.json", ROW)
    new = write(tmp_path / "new.json", dataclasses.replace(ROW, model="vgg16"))
    with pytest.raises(ResultsError, match="no cell in common"):
        compare(Results.read(old), Results.read(new))
    assert harness.main(["--compare", old, new]) == 2
    assert harness.main(["--compare", str(tmp_path / "absent.json"), new]) == 2
    assert "absent.json: not a results file" in capsys.readouterr().err
