"""Degrees and margins compared, and the command that uses it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from crypten_espn import cli
from crypten_espn.errors import DataError, RangeError, ShapeError
from crypten_espn.pillar.data import fashion_sample
from crypten_espn.pillar.storage import bundled, load_network
from crypten_espn.pillar.surgery import activations
from crypten_espn.sweep import Sweep, SweepRow, sweep


def images(count=64):
    return torch.randn(count, 2, 5, 5, generator=torch.Generator().manual_seed(1))


def small(outputs=3):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, outputs)
    )


def test_a_row_for_each_degree_and_margin_on_images_kept_apart():
    model, x = small(), images()
    with torch.no_grad():
        labels = model(x).argmax(1)
    table = sweep(model, x, labels=labels, degrees=(2, 8), margins=(1.0, 2.0))
    assert [(r.degree, r.margin) for r in table.rows] == [
        (2, 1.0), (2, 2.0), (8, 1.0), (8, 2.0)
    ]  # fmt: skip
    assert (table.calibrated, table.measured, table.original) == (48, 16, 1.0)
    assert all(row.accuracy == row.agreement for row in table.rows)
    assert table.rows[3].distance < table.rows[1].distance < 0.5
    assert table.rows[2].escaping >= table.rows[3].escaping == 0
    text = str(table)
    assert "recommended: degree" in text and "original 100.00%" in text
    assert model.training and not activations(model)


def row(degree, score, escaping=0, not_finite=0):
    return SweepRow(
        degree, 2.0, score, None, 0.1, escaping, not_finite, None, None, "no plan"
    )


def test_what_the_masked_engine_computes_is_recommended_before_what_it_does_not():
    planned = SweepRow(4, 2.0, 0.7, None, 0.3, 9, 0, 10, 10)
    assert Sweep((row(8, 0.99), planned), 75, 25, None).recommended is planned


def test_the_safest_then_the_best_then_the_cheapest_is_recommended():
    def recommended(*rows):
        return Sweep(rows, 75, 25, None).recommended.degree

    assert recommended(row(4, 0.8), row(8, 0.929), row(10, 0.93)) == 8
    assert recommended(row(4, 0.8), row(8, 0.92), row(10, 0.93)) == 10
    assert recommended(row(4, 0.8), row(8, 0.95, 1), row(10, 0.99, 0, 1)) == 4
    assert recommended(row(8, 0.9, 2), row(10, 0.95, 3)) == 8


def test_outputs_that_are_no_classes_are_compared_by_distance():
    table = sweep(small(1), images(), degrees=(2, 6), margins=(2.0,))
    assert [r.agreement for r in table.rows] == [None, None]
    assert table.recommended.degree == 6 and "-" in str(table)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(DataError, match="at least 8"):
        sweep(small(), images(7))
    with pytest.raises(RangeError, match="at least one of each"):
        sweep(small(), images(), degrees=())
    for labels in (torch.zeros(3), [0] * 63, [0.5] * 64):
        with pytest.raises(ShapeError, match="one integer for each"):
            sweep(small(), images(), labels=labels)
    with pytest.raises(RangeError, match="3 classes"):
        sweep(small(), images(), labels=[3] * 64)
    with pytest.raises(ShapeError, match="classes"):
        sweep(small(1), images(), labels=[0] * 64)


def saved(folder, count=24):
    given, labels = next(fashion_sample().batches(count))
    np.save(folder / "images.npy", given.numpy())
    np.save(folder / "labels.npy", labels.numpy())
    return given


def test_the_command_writes_a_network_that_answers_alike(tmp_path, capsys):
    given = saved(tmp_path)
    out = tmp_path / "calibrated.safetensors"
    options = ["calibrate", "fashion-resnet-relu", "--images"]
    options += [str(tmp_path / "images.npy"), "--out", str(out), "--degree", "8"]
    assert cli.main(options) == 0
    text = capsys.readouterr().out
    assert "stages.2.0.relu2" in text and "degree 8, margin 1.5, 24 images" in text
    found, relu = load_network(out), bundled("fashion-resnet-relu")
    assert found.normalization == relu.normalization
    assert found.notes and found.notes["calibrated"] == {"degree": 8, "margin": 1.5}
    with torch.no_grad():
        same = found(given).argmax(1) == relu(given).argmax(1)
    assert int(same.sum()) >= 22


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--degree", "11"], "1 to 10"),
        (["--margin", "0.5"], "1 to 16"),
        (["--labels", "labels.npy"], "--sweep"),
        (["--sweep", "--degree", "4"], "--sweep chooses"),
        (["--out", "."], "is a folder"),
    ],
)
def test_the_command_names_what_is_wrong(tmp_path, capsys, options, said):
    saved(tmp_path, 8)
    command = ["calibrate", "fashion-resnet-relu", "--images"]
    command += [str(tmp_path / "images.npy"), "--out", str(tmp_path / "x.safetensors")]
    assert cli.main([*command, *options]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()


def test_the_command_refuses_an_onnx_file(tmp_path, capsys):
    saved(tmp_path, 8)
    command = ["calibrate", "net.onnx", "--images", str(tmp_path / "images.npy")]
    assert cli.main([*command, "--out", str(tmp_path / "x.safetensors")]) == 2
    assert "espn.calibrate" in capsys.readouterr().err
