"""Tables in the READMEs are made from the JSON files, and from nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from benchmarks import documents
from benchmarks.rows import Results, ResultsError, Spread

from .result_cases import LOOPBACK, WAN, write_results


def markdown(folder: Path, name: str) -> str:
    made = documents.markdown(folder, name)
    assert made is not None
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_results(tmp_path)
    return tmp_path


def test_readme_table_is_replaced_between_its_markers(folder: Path) -> None:
    readme = folder / "README.md"
    readme.write_text(
        "before\n<!-- begin benchmark inference -->\nold\n"
        "<!-- end benchmark inference -->\nbetween\n"
        "<!-- begin benchmark accuracy -->\n<!-- end benchmark accuracy -->\nafter\n"
    )
    assert documents.update(readme, folder) == (["inference", "accuracy"], [])
    text = readme.read_text()
    assert text.startswith("before\n<!-- begin benchmark inference -->\n| network |")
    assert "| wan | minionn | masked | 16 | 1.50 | 1 | 1.10 |" in text
    assert "| 62.50% | 87.50% |" in text and "old" not in text
    assert "`python -m benchmarks.inference`: commit " in text
    assert text.endswith("<!-- end benchmark accuracy -->\nafter\n")
    documents.update(readme, folder)
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
    seconds = markdown(folder, "networks-wan").splitlines()
    assert seconds[0] == "| network | masked | unfolded ReLU (gloo) |"
    assert seconds[2] == "| minionn | 0.100 + 1.10 | 0.100 + 1.10 |"
    assert seconds[3] == "| resnet50 | 0.100 + 1.10 | not run |"
    assert seconds[4] == "| vgg16 | not run | 0.100 + 20.2 |"
    assert seconds[6].startswith("`python -m benchmarks.inference`: commit")
    assert all(note.startswith("commit ") for note in seconds[7:9])  # none is known
    assert "| minionn | 16, 1.5 MB |" in markdown(folder, "networks-wire")


def test_marker_without_end_is_refused_and_missing_results_are_named(
    folder: Path,
) -> None:
    readme = folder / "README.md"
    readme.write_text("<!-- begin benchmark inference -->\n")
    with pytest.raises(ResultsError, match="inference begins and does not end"):
        documents.update(readme, folder)
    readme.write_text("<!-- begin benchmark moon -->\n<!-- end benchmark moon -->\n")
    assert documents.update(readme, folder) == ([], ["moon"])


def test_gains_are_those_of_the_rows_on_wan(folder: Path) -> None:
    results = Results.read(folder / "inference.json")
    for name, engine, seconds in (
        ("espn", "crypten+direct", 3.3),
        ("crypten-relu", "crypten+direct", 7.7),
        ("crypten-relu", "crypten+gloo", 16.5),
    ):
        online = Spread.of([seconds])
        results.add(
            dataclasses.replace(WAN, activation=name, engine=engine, online_s=online)
        )
    results.add(dataclasses.replace(WAN, model="vgg16"))  # not run over loopback
    lines = markdown(folder, "networks-gains").splitlines()
    parts = 16 * 0.05 + 1.5e6 * 8 / (100e6 * 1448 / 1500) + 0.03
    assert lines[2] == f"| minionn | 15.0 | 7.0 | 3.0 | 2.3 | {1.1 / parts:.2f} |"
    assert lines[3] == "| vgg16 |" + 5 * " not run |"


def test_one_layer_puts_the_paths_beside_one_another(folder: Path) -> None:
    results = Results(folder / "activations.json")
    near = dataclasses.replace(
        LOOPBACK,
        model="activation[7]",
        activation="espn",
        engine="crypten+gloo",
        rounds=2,
    )
    for network, rtt_ms, mbit, seconds in (
        ("loopback", 0.0, None, 0.01),
        ("25ms", 25.0, None, 0.12),
        ("100ms", 100.0, None, 0.451),
        ("wan", 100.0, 100.0, 0.9),
    ):
        results.add(
            dataclasses.replace(
                near,
                network=network,
                rtt_ms=rtt_ms,
                mbit=mbit,
                online_s=Spread.of([seconds]),
            )
        )
    head, _, row, *_ = markdown(folder, "activations").splitlines()
    assert head == (
        "| protocol | rounds | MB sent | loopback | 25ms | 100ms | wan "
        "| 100ms / its parts | offline |"
    )
    assert row == ("| espn (gloo) | 2 | 1.50 | 10.0 | 120 | 451 | 900 | 1.10 | 100 |")
