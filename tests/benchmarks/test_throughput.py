"""The throughput benchmark: what it compares, its sums, and one small run."""

from __future__ import annotations

import pytest

from benchmarks import throughput

from ..masked.cases import planned, residual


def test_ways_leave_out_what_would_be_one_image():
    names = [way.name for way in throughput.ways(batch=32, in_flight=8)]
    assert names == ["one at a time", "8 in flight", "batch 32"]
    assert [w.name for w in throughput.ways(batch=1, in_flight=1)] == ["one at a time"]


def test_ratios_are_taken_within_a_round():
    ways = throughput.ways(batch=1, in_flight=2)
    samples = [
        [(0.4, 0.2, 0.1), (0.2, 0.2, 0.1), (0.6, 0.2, 0.1)],
        [(0.1, 0.1, 0.1), (0.1, 0.1, 0.1), (0.3, 0.1, 0.1)],
    ]
    alone, several = throughput.speeds("small", ways, samples)
    assert alone.ratio.median == 1.0
    assert several.ratio.median == pytest.approx(2.0)
    assert several.ratio.max == pytest.approx(4.0)
    assert several.busy == (0.1, 0.1)
    text = throughput.table([alone, several])
    assert "2 in flight" in text and "2.00 [2.00, 4.00]" in text


@pytest.mark.slow
def test_a_small_run():
    network, example = residual()
    model = planned(network, example)
    x = example[:1].repeat(8, 1, 1, 1)
    ways = throughput.ways(batch=8, in_flight=2)
    samples, trip, most = throughput.measure(model, x, ways, repeat=1)
    assert [len(column) for column in samples] == [1, 1, 1]
    assert all(seconds > 0 for column in samples for seconds, _, _ in column)
    assert 0 < trip < 5
    assert len(most) == 3 and min(most) > 10**7


def test_nothing_below_one_is_accepted(capsys):
    with pytest.raises(SystemExit):
        throughput.main(["--repeat", "0"])
    assert "start at 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        throughput.main(["--help"])
    assert "--in-flight" in capsys.readouterr().out
