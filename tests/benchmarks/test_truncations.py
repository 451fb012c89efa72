"""A sample of the truncation benchmark, and that it would notice an error."""

from __future__ import annotations

import json

import pytest

from benchmarks import truncations
from crypten_espn.masked import kernels


@pytest.mark.parametrize(
    ("bits", "drop", "count"), [(64, 32, 10**6), (64, 24, 10**5), (40, 17, 10**5)]
)
def test_no_truncation_errs_by_more_than_one_unit(bits, drop, count):
    stream = truncations.Truncations(bits=bits, drop=drop, seed=1)
    stream.run(count)
    assert stream.tally.count == count
    assert stream.tally.wrong == 0
    assert 0.4 * count < stream.tally.up < 0.6 * count
    assert stream.tally.local_wrong > 0


def test_a_wrong_kernel_is_counted(monkeypatch):
    original = kernels.truncate

    def wrong(mine, theirs, *, bits, drop, step, out):
        original(mine, theirs, bits=bits, drop=drop, step=step, out=out)
        out[5] += 2

    monkeypatch.setattr(kernels, "truncate", wrong)
    stream = truncations.Truncations()
    stream.run(1000)
    assert stream.tally.wrong == 1


def test_command_counts_and_writes(tmp_path, capsys):
    file = tmp_path / "counts.json"
    code = truncations.main(["--count", "3000", "--json", str(file)])
    assert code == 0
    found = json.loads(file.read_text())
    assert (found["count"], found["wrong"]) == (3000, 0)
    assert "3,000 truncations" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--count", "0"], ["--drop", "63"]])
def test_command_refuses_what_cannot_be(wrong):
    with pytest.raises(SystemExit):
        truncations.main(wrong)
