"""The report is made from the results files alone."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import activations, costmodel, inference, page, report, tls
from benchmarks.accuracy import command as accuracy
from benchmarks.documents import SHOWN
from benchmarks.figures import command as figures
from benchmarks.page import RUNS, render
from benchmarks.rows import Results, ResultsError, machine, write_rows
from crypten_espn.estimate.processor import REFERENCE

from .result_cases import LOOPBACK, WAN, write_results
from .test_sessions import BASE


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_results(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_page_holds_every_cell_and_needs_no_other_file(folder: Path) -> None:
    files = {file.name for file in render(folder, folder)}
    assert {"inference.csv", "accuracy.csv", "index.html"} <= files
    assert {"inference-wan.png", "inference-wan.svg", "accuracy.png"} <= files
    text = (folder / "index.html").read_text()
    assert "data:image/svg+xml;base64," in text and "&lt;too long&gt;" in text
    assert "http://" not in text and "https://" not in text and "<script" not in text
    assert "python -m benchmarks.inference" in text
    with open(folder / "inference.csv", newline="") as handle:
        lines = list(csv.DictReader(handle))
    assert [line["network"] for line in lines] == ["loopback", "wan"]
    assert all(line["commit"] and line["date"] for line in lines)


def test_document_is_made_whole_and_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the cost model's table, which takes long: its lines are given."""
    line = ("7 cells", "from shapes", "15%", "1%", "`python -m`")
    monkeypatch.setattr(page.costmodel, "validated", lambda folder: [line])
    text = page.document(report.RESULTS)
    assert "| 7 cells | from shapes | 15% | 1% | `python -m` |\n\nFrom shapes" in text
    kept = report.WHOLE.read_text()

    def tables(text: str) -> list[str]:
        return [one for one in text.splitlines() if one.startswith("|")]

    assert set(tables(text)) - {f"| {' | '.join(line)} |"} <= set(tables(kept))
    assert "{" + "{" not in text and "{" + "%" not in text
    with pytest.raises(ResultsError, match="no results of networks-wan"):
        page.document(tmp_path)


def test_a_section_without_results_is_left_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = tmp_path / "pages"
    pages.mkdir()
    (pages / "benchmarks.md").write_text(
        "before\n{% if known('offline') %}## Offline\n{{ table('offline') }}\n"
        "{% endif %}after\n"
    )
    monkeypatch.setattr(page, "PAGES", pages)
    monkeypatch.setattr(page.costmodel, "validated", lambda folder: [])
    assert page.document(folder) == "before\nafter\n"
    write_rows(folder / "offline.json", machine(), [BASE])
    assert "## Offline\n| network |" in page.document(folder)


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="no results there"):
        render(tmp_path, tmp_path)


def test_commands_are_those_that_wrote_the_results(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(arguments: Sequence[str]) -> int:
        Path(arguments[-1]).write_text("{}")
        return 130

    def refused(arguments: Sequence[str]) -> int:
        raise ResultsError("no path")

    activation, network, warm = report.steps(full=False)[:3]
    layer = dataclasses.replace(activation, name="layer")
    monkeypatch.setattr(report, "PROFILES", ())
    benches = {"activations": interrupted, "inference": refused}
    monkeypatch.setattr(report, "MAINS", benches)
    problems = report.run([network], folder)
    assert problems == ["inference: ResultsError: no path"]
    with pytest.raises(KeyboardInterrupt):
        report.run([layer, warm], folder)
    benches["activations"] = lambda arguments: 3
    problems = report.run([activation], folder)
    assert problems == ["activations ended with status 3"]
    assert json.loads((folder / "commands.json").read_text()) == {
        "inference": "python -m benchmarks.inference",
        "layer": layer.command,
    }


def test_comparison_of_folders_fails_on_a_change(folder: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    results = Results(old / "inference.json")
    results.add(dataclasses.replace(WAN, rounds=17))
    assert report.compare(old, folder) == 1
    assert report.compare(folder, folder) == 0
    assert report.main(["--only", "render", "--out", str(tmp_path / "none")]) == 2


def test_prediction_adds_delays_bytes_and_computation() -> None:
    (check,) = costmodel.checks([LOOPBACK, WAN])
    wire = 8 * 1_500_000 / (100e6 * costmodel.PAYLOAD)
    assert check.predicted_s == pytest.approx(16 * 0.05 + wire + 0.03)
    assert check.error == pytest.approx(1.1 / check.predicted_s - 1)
    gloo, direct = (
        [
            dataclasses.replace(row, engine=f"crypten+{channel}")
            for row in (LOOPBACK, WAN)
        ]
        for channel in ("gloo", "direct")
    )
    slow, fast = costmodel.checks([*gloo, *direct])
    assert slow.predicted_s - fast.predicted_s == pytest.approx(3 * 16 * 0.05)
    assert fast.predicted_s == pytest.approx(16 * 0.05 + wire / 1.5 + 0.03)


def test_networks_of_the_benchmarks_own_are_not_derived_from_shapes() -> None:
    rows = [
        dataclasses.replace(LOOPBACK, model=model, activation=activation)
        for model, activation in (
            ("seresnet18", "masked"),
            ("activation[7]", "masked"),
            ("minionn", "plain"),
        )
    ]
    assert list(costmodel.from_shapes(rows, REFERENCE)) == []
    named = dataclasses.replace(LOOPBACK, activation="espn", engine="crypten+direct")
    (check,) = costmodel.from_shapes([named, *rows], REFERENCE)
    assert check.row == named and check.exact is False


def test_steps_are_chosen_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def run(chosen: Sequence[report.Step], out: Path) -> list[str]:
        ran.extend(step.name for step in chosen)
        return []

    monkeypatch.setattr(report, "run", run)
    only = ["--only", "run", "--out", str(tmp_path), "--steps"]
    assert report.main(["--full", *only, "large", "unfolded"]) == 0
    assert ran == ["large", "unfolded"]
    assert report.main([*only, "warm", "large"]) == 2
    assert "--steps large: not without --full" in capsys.readouterr().err
    assert len(ran) == 2


@pytest.mark.parametrize("full", [False, True])
def test_every_step_is_a_command_its_benchmark_accepts(full: bool) -> None:
    steps = report.steps(full=full)
    names = {step.name for step in steps}
    assert names <= {*RUNS, *SHOWN, "degrees", "accuracy", "figures"}
    assert names >= {*RUNS, *SHOWN, "accuracy"} if full else names >= {"inference"}
    parsers = {
        **{"activations": activations, "inference": inference, "figures": figures},
        **{**SHOWN, "tls": tls},
    }
    for step in steps:
        benchmark = parsers.get(step.module, accuracy)
        benchmark.make_parser().parse_args(step.arguments)
        assert step.module in report.MAINS
        assert step.command.split(" --")[0] == f"python -m benchmarks.{step.module}"
