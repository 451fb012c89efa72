"""Runs over seeds: each once, resumed, compared; a table from what is there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import training
from benchmarks.rows import ResultsError
from crypten_espn.pillar import data
from crypten_espn.pillar.recipes import RECIPES

from ..test_recipes import TINY, toy_dataset


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(data.DATASETS, "toy", toy_dataset)
    monkeypatch.setitem(RECIPES, "tiny", replace(TINY, epochs=5))


def options(folder: Path, *more: str) -> list[str]:
    places = ["--runs", str(folder / "runs"), "--out", str(folder / "results/training")]
    return ["--recipes", "tiny", "--quiet", *places, *more]


@pytest.mark.slow
def test_runs_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = ("--kinds", "finetuned", "polynomial", "relu")
    assert training.main(options(tmp_path, *kinds, "--seeds", "1", "2")) == 0
    table = training.summary(tmp_path / "results/training")
    rows = {line["activation"]: line for line in table.to_dict("records")}
    assert list(rows) == ["degree 2", "ReLU", "degree 2, fine-tuned"]
    assert {line["seeds"] for line in rows.values()} == {"1 2"}
    results = {}
    for path in (tmp_path / "results/training").glob("*.json"):
        results[path.stem] = 100 * json.loads(path.read_text())["test_accuracy"]
        assert path.with_suffix(".csv").read_text().startswith("epoch,")
    assert len(results) == 6
    mean = (results["tiny-polynomial-1"] + results["tiny-polynomial-2"]) / 2
    relu = (results["tiny-relu-1"] + results["tiny-relu-2"]) / 2
    assert float(rows["degree 2"]["test accuracy"]) == pytest.approx(mean, abs=0.01)
    gap, error = map(float, rows["degree 2"]["against ReLU"].split(" ± "))
    assert gap == pytest.approx(mean - relu, abs=0.01)
    gaps = [results[f"tiny-polynomial-{s}"] - results[f"tiny-relu-{s}"] for s in (1, 2)]
    # Of two, the standard error is half of what lies between them.
    assert error == pytest.approx(abs(gaps[0] - gaps[1]) / 2, abs=0.01)
    assert rows["ReLU"]["against ReLU"] == ""
    assert rows["degree 2, fine-tuned"]["epochs"] == "1"
    assert "tiny-relu-2: test accuracy" in capsys.readouterr().out


def test_an_ended_run_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert training.main(options(tmp_path, "--kinds", "relu")) == 0

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(training, "train", forbidden)
    assert training.main(options(tmp_path, "--kinds", "relu")) == 0
    with pytest.raises(AssertionError, match="trained again"):
        training.main(options(tmp_path, "--kinds", "relu", "--seeds", "2"))


def test_fields_that_a_result_lacks_are_as_they_were_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert training.main(options(tmp_path, "--kinds", "relu")) == 0
    path = tmp_path / "runs/tiny-relu-1/result.json"
    result = json.loads(path.read_text())
    del result["recipe"]["replayed"], result["recipe"]["epoch_steps"]
    path.write_text(json.dumps(result))
    monkeypatch.setattr(training, "train", None)
    assert training.main(options(tmp_path, "--kinds", "relu")) == 0


@pytest.mark.slow
def test_calibrated_networks_have_their_rows(tmp_path: Path) -> None:
    kinds = ("--kinds", "quadratic", "calibrated", "relu")
    assert training.main(options(tmp_path, *kinds)) == 0
    rows = training.summary(tmp_path / "results/training").to_dict("records")
    assert {line["activation"]: line["epochs"] for line in rows} == {
        "ReLU": "5",
        "degree 4 a channel, tuned": "200 steps",
        "degree 2 a channel, tuned": "1",
    }


def test_what_cannot_be_done_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in ("finetuned", "calibrated", "quadratic"):
        assert training.main(options(tmp_path, "--kinds", kind)) == 2
        assert f"run with --kinds relu {kind}" in capsys.readouterr().err
    assert training.main(options(tmp_path, "--table")) == 2
    assert "no results there" in capsys.readouterr().err
    place = tmp_path / "results/training"
    place.mkdir(parents=True)
    (place / "x.json").write_text("{}")
    with pytest.raises(ResultsError, match="not a training result"):
        training.summary(place)
