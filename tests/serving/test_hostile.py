"""Real processes under attack, a small version of benchmarks/hostile."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.hostile.attack import run


@pytest.mark.slow
def test_two_hundred_hostile_connections_change_nothing(tmp_path: Path) -> None:
    report = run(tmp_path, connections=198, concurrent=16, seed=3, limit_s=120.0)
    assert report.faults == []
    assert report.connections == 198 and report.served > 0
    assert all(sum(found.values()) == 22 for found in report.outcomes.values())
    answered = report.outcomes["mutated message"]
    assert answered.get("reason", 0) > 10
