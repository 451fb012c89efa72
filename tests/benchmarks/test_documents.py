"""Tables in the READMEs are made from the JSON files, and from nothing else."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks import documents, offline
from benchmarks.rows import (
    COMPACT,
    OFFLINE,
    PLAIN,
    Results,
    ResultsError,
    Spread,
    machine,
    write_rows,
)

from .result_cases import LOOPBACK, WAN, write_results
from .test_sessions import BASE, linear


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


def test_the_limit_stands_beside_the_masked_engine_of_the_same_run(
    folder: Path,
) -> None:
    results = Results(folder / "masked.json")
    results.add(dataclasses.replace(LOOPBACK, online_s=Spread.of([0.015])))
    for form, seconds in (("eager", 0.01), ("folded", 0.012), ("frozen", 0.006)):
        row = dataclasses.replace(
            LOOPBACK,
            activation=PLAIN,
            engine=f"torch+{form}",
            online_s=Spread.of([seconds]),
        )
        results.add(row)
    results.add(dataclasses.replace(LOOPBACK, model="vgg16"))  # without its limit
    results.add(dataclasses.replace(LOOPBACK, activation=COMPACT))
    lines = markdown(folder, "networks-plain").splitlines()
    assert lines[2] == "| minionn | fast | 15.0 | 10.0 | 1.50 | 6.00 | frozen | 2.50 |"
    assert lines[3].startswith("| minionn | compact | 30.0 | 10.0 | 3.00 |")
    assert lines[4] == ""
    near = markdown(folder, "networks-loopback").splitlines()
    assert near[0] == "| network | plain torch | masked | masked compact |"
    assert near[2] == "| minionn | 0.0100 | 0.100 + 0.0150 | 0.100 + 0.0300 |"
    assert "| minionn | none | 16, 1.5 MB | 16, 1.5 MB |" in markdown(
        folder, "networks-wire"
    )


def test_an_offline_time_that_is_not_known_is_left_out(folder: Path) -> None:
    path = folder / "inference.json"
    content = json.loads(path.read_text())
    del content["machine"][OFFLINE]
    path.write_text(json.dumps(content))
    assert "| minionn | 1.10 |" in markdown(folder, "networks-wan")
    assert "| 0.0200 to 0.0400 |  |  |" in markdown(folder, "inference")


def test_a_path_without_rows_has_no_table(folder: Path) -> None:
    results = Results(folder / "masked.json")
    results.add(WAN)
    assert documents.markdown(folder, "networks-cheetah") is None
    assert documents.markdown(folder, "networks-plain") is None
    results.add(dataclasses.replace(WAN, network="cheetah"))
    assert "| minionn | 0.100 + 1.10 |" in markdown(folder, "networks-cheetah")


def test_tls_is_compared_on_its_path(folder: Path) -> None:
    results = Results(folder / "tls.json")
    for engine, seconds in (("tcp", 2.0), ("tcp+TLS", 2.05)):
        row = dataclasses.replace(
            WAN, activation="messages", engine=engine, online_s=Spread.of([seconds])
        )
        results.add(row)
    assert "| wan | minionn | 16 | 1.50 | 2.00 | 2.05 | +2.5% |" in markdown(
        folder, "tls"
    )


def test_results_of_sessions_are_shown_as_their_command_prints_them(
    folder: Path,
) -> None:
    assert documents.markdown(folder, "offline") is None
    rows = [BASE, linear()]
    for name in ("offline", "growth"):
        write_rows(folder / f"{name}.json", machine(), rows)
    table = markdown(folder, "offline").splitlines()
    assert table[0] == f"| {' | '.join(offline.COLUMNS)} |"
    assert "| loopback | resnet18 | 32 | 8 |" in table[3]
    assert "| batch | resnet18 | 32 | 8 | 1.00 |" in markdown(folder, "growth")
