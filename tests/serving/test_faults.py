"""Real processes over mutual TLS with a fault among them, a small benchmarks/faults."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.faults.ledger import Ledger
from benchmarks.faults.run import Run


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_killed_server_costs_no_answer_and_no_mask_is_used_twice(
    tmp_path: Path,
) -> None:
    run = Run(tmp_path, inferences=12, timeout=30.0, link=None)
    report = run.go(1, lambda _: None)
    assert report.problems == []
    assert (report.answers, report.wrong) == (12, 0)
    assert [what for _, what in report.faults_done] == ["kill -9 serve"]
    assert report.used >= 12 and report.sessions >= 2


def test_the_ledger_finds_what_was_used_or_dealt_twice(tmp_path: Path) -> None:
    def log(name: str, *events: dict[str, object]) -> list[Path]:
        path = tmp_path / name
        lines = [json.dumps({"level": "INFO", **event}) for event in events]
        path.write_text("\n".join(lines))
        return [path]

    begun = {"event": "inference_begun", "session": "ab"}
    answered = {"event": "inference", "session": "ab"}
    dealt = {"event": "dealt", "session": "ab", "start": 0, "count": 2}
    serve = log("serve", {**begun, "index": 0}, {**begun, "index": 1})
    deal = log("deal", dealt)
    client = log("client", {**begun, "index": 1}, {**answered, "index": 1})
    well = {"serve": serve, "deal": deal, "client": client}
    assert Ledger(well).faults == []
    twice = Ledger({**well, "serve": serve + serve, "deal": deal + deal})
    assert len(twice.faults) == 4 and "serve used ('ab', 0) twice" in twice.faults
    other = log("other", {**answered, "index": 7})
    assert Ledger({**well, "client": other}).faults == [
        "the server never used ('ab', 7)"
    ]
    (tmp_path / "torn").write_text("Traceback (most recent call last):\n")
    torn = Ledger({**well, "serve": [*serve, tmp_path / "torn"]})
    assert torn.faults == ["in a log: serve: Traceback (most recent call last):"]
