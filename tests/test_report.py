"""The report is made from the results files alone, and READMEs from the CSV."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import (
    accuracy,
    activations,
    costmodel,
    figures,
    harness,
    inference,
    report,
)
from benchmarks.harness import Results, ResultsError, Row, Spread

LOOPBACK = Row(
    model="minionn",
    activation="masked",
    engine="masked",
    network="loopback",
    rtt_ms=0.0,
    mbit=None,
    batch=1,
    threads=1,
    rounds=16,
    bytes_sent=(1_000_000, 500_000),
    online_s=Spread.of([0.02, 0.03, 0.04]),
    offline_s=Spread.of([0.1]),
    total_s=Spread.of([0.13]),
    offline_bytes=5000,
    max_abs_error=0.01,
    argmax_agreement=1.0,
)
WAN = dataclasses.replace(
    LOOPBACK, network="wan", rtt_ms=100.0, mbit=100.0, online_s=Spread.of([1.1])
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    results = Results(tmp_path / "inference.json")
    results.add(LOOPBACK)
    results.add(WAN)
    results.skip(harness.Skipped("vgg16", "espn", "crypten+gloo", "wan", "<too long>"))
    row = accuracy.Accuracy(
        *("net", "relu", "masked", 8, 4, 0.5, 0.5, 0.625, 0.875, 0.01, 0.2, 0.3)
    )
    accuracy.write(tmp_path / "accuracy.json", results.machine, [row])
    commands = {"inference": "python -m benchmarks.inference"}
    (tmp_path / "commands.json").write_text(json.dumps(commands))
    return tmp_path


def test_page_holds_every_cell_and_needs_no_other_file(folder: Path) -> None:
    files = {file.name for file in report.render(folder)}
    assert {"inference.csv", "accuracy.csv", "index.html"} <= files
    assert {"inference-wan.png", "inference-wan.svg", "accuracy.png"} <= files
    page = (folder / "index.html").read_text()
    assert "data:image/svg+xml;base64," in page and "&lt;too long&gt;" in page
    assert "http://" not in page and "https://" not in page and "<script" not in page
    assert "python -m benchmarks.inference" in page
    with open(folder / "inference.csv", newline="") as handle:
        lines = list(csv.DictReader(handle))
    assert [line["network"] for line in lines] == ["loopback", "wan"]
    assert all(line["commit"] and line["date"] for line in lines)


def test_readme_table_is_replaced_between_its_markers(folder: Path) -> None:
    report.render(folder)
    readme = folder / "README.md"
    readme.write_text(
        "before\n<!-- begin benchmark inference -->\nold\n"
        "<!-- end benchmark inference -->\nbetween\n"
        "<!-- begin benchmark accuracy -->\n<!-- end benchmark accuracy -->\nafter\n"
    )
    assert report.update_readme(readme, folder) == (["inference", "accuracy"], [])
    text = readme.read_text()
    assert text.startswith("before\n<!-- begin benchmark inference -->\n| network |")
    assert "| wan | minionn | masked | 16 | 1.50 | 1 | 1.10 |" in text
    assert "| 62.50% | 87.50% |" in text and "old" not in text
    assert "`python -m benchmarks.inference`: commit " in text
    assert text.endswith("<!-- end benchmark accuracy -->\nafter\n")
    report.update_readme(readme, folder)
    assert readme.read_text() == text


def test_systems_side_by_side_are_made_from_every_file(folder: Path) -> None:
    relu = dataclasses.replace(
        WAN, activation="crypten-relu-unfolded", engine="crypten+gloo", rounds=99
    )
    results = Results(folder / "unfolded.json")
    results.add(relu)
    results.add(dataclasses.replace(relu, model="vgg16", online_s=Spread.of([20.25])))
    large = Results(folder / "large.json")
    large.add(dataclasses.replace(WAN, model="resnet50"))
    report.render(folder)
    seconds = report.markdown(folder, "networks-wan").splitlines()
    assert seconds[0] == "| network | masked | unfolded ReLU (gloo) |"
    assert seconds[2] == "| minionn | 0.100 + 1.10 | 0.100 + 1.10 |"
    assert seconds[3] == "| resnet50 | 0.100 + 1.10 | not run |"
    assert seconds[4] == "| vgg16 | not run | 0.100 + 20.2 |"
    assert seconds[6].startswith("`python -m benchmarks.inference`: commit")
    assert all(note.startswith("commit ") for note in seconds[7:9])  # none is known
    assert "| minionn | 16, 1.5 MB |" in report.markdown(folder, "networks-wire")


def test_marker_without_end_is_refused_and_missing_results_are_named(
    folder: Path,
) -> None:
    readme = folder / "README.md"
    readme.write_text("<!-- begin benchmark inference -->\n")
    with pytest.raises(ResultsError, match="inference begins and does not end"):
        report.update_readme(readme, folder)
    readme.write_text("<!-- begin benchmark moon -->\n<!-- end benchmark moon -->\n")
    assert report.update_readme(readme, folder) == ([], ["moon"])
    with pytest.raises(ResultsError, match="no results there"):
        report.render(folder / "empty")


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
    problems = report.run([network], folder, fallback=False)
    assert problems == ["inference: ResultsError: no path"]
    with pytest.raises(KeyboardInterrupt):
        report.run([layer, warm], folder, fallback=False)
    benches["activations"] = lambda arguments: 3
    problems = report.run([activation], folder, fallback=False)
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


def test_steps_are_chosen_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def run(chosen: Sequence[report.Step], out: Path, *, fallback: bool) -> list[str]:
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
    assert names <= {*report.RUNS, "accuracy", "figures"}
    assert names >= {*report.RUNS, "accuracy"} if full else names >= {"inference"}
    parsers = {"activations": activations, "inference": inference, "figures": figures}
    for step in steps:
        benchmark = parsers.get(step.module, accuracy)
        benchmark.make_parser().parse_args(step.arguments)
        assert step.module in report.MAINS
        assert step.command.startswith(f"python -m benchmarks.{step.module} --")
