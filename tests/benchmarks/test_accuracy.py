"""The accuracy benchmark: what it finds, what it runs, what its rows say."""

from __future__ import annotations

import dataclasses
import json

import pytest

from benchmarks.accuracy import command, rows
from crypten_espn import launch
from crypten_espn.pillar.data import FASHION_SYSTEM_FOLDER
from crypten_espn.pillar.storage import load_network
from crypten_espn.pillar.surgery import activations


def test_every_bundled_network_is_found():
    names = {path.stem for path in command.bundled_networks()}
    assert {"fashion_resnet_poly", "fashion_resnet_relu"} <= names
    assert "fashion_sample" not in names
    on_disk = {path.stem for path in command.BUNDLED.glob("fashion_*.safetensors")}
    assert names == on_disk - {"fashion_sample"}


@pytest.mark.slow
def test_a_network_at_two_precisions_over_both_engines(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(launch, "timeout_s", 280)
    path = command.BUNDLED / "fashion_resnet_poly.safetensors"
    assert activations(load_network(path))
    file = tmp_path / "rows.json"
    options = ["--networks", str(path), "--images", "3", "--batch", "2"]
    options += ["--systems", "masked", "espn", "--precision-bits", "16", "12"]
    assert command.main([*options, "--json", str(file)]) == 0
    assert "4 of 4 rows agree in at least 99.5%" in capsys.readouterr().out
    found = [rows.Accuracy(**row) for row in json.loads(file.read_text())["rows"]]
    assert [(row.system, row.precision_bits) for row in found] == [
        ("masked", 16),
        ("masked", 12),
        ("espn", 16),
        ("espn", 12),
    ]
    for row in found:
        assert row.images == 3 and row.agreement == 1.0 and row.holds
        assert 0 < row.max_abs_error < 0.3 and row.wan_s > row.total_s > 0
        assert (row.quantised is None) == (row.system == "espn")
        assert row.truncation == ("local" if row.system == "espn" else None)
    # Finer encodings, smaller errors.
    assert found[0].max_abs_error < found[1].max_abs_error


@pytest.mark.parametrize(
    ("agreement", "private", "holds"),
    [(0.995, 0.902, True), (0.994, 0.9, False), (1.0, 0.897, False)],
)
def test_what_holds(agreement, private, holds):
    row = rows.Accuracy(
        *("net", "relu", "masked", 1000, 4, 0.9, None, private, agreement),
        *(0.01, 0.2, 0.3),
    )
    assert row.holds == holds
    exact = dataclasses.replace(row, system="espn", truncation="exact")
    assert rows.cells(exact)[2] == "espn (exact)"
    assert len(rows.cells(row)) == len(rows.COLUMNS)


@pytest.mark.skipif(not FASHION_SYSTEM_FOLDER.exists(), reason="no whole test set")
def test_more_images_than_are_bundled_come_from_the_whole_test_set():
    images, labels = command._images(None, "fashion-mnist", 600)
    sample, truth = command._images(None, "fashion-mnist", 8)
    assert len(images) == len(labels) == 600 and len(sample) == len(truth) == 8
    assert images.shape[1:] == sample.shape[1:] == (1, 28, 28)
