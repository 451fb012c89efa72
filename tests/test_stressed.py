"""Stress where it is reported: range_report, and the commands check and calibrate."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import crypten_espn as espn
from crypten_espn import cli
from crypten_espn.graph import export
from crypten_espn.pillar.data import fashion_sample
from crypten_espn.pillar.guarding import in_words
from crypten_espn.pillar.networks import Architecture
from crypten_espn.pillar.ranges import STRESSED
from crypten_espn.pillar.storage import load_network, save_network
from crypten_espn.pillar.stress import BEYOND, CLEAN

SQUARE = espn.Polynomial((0, 0, 1), 0, (-1.0, 1.0))


def network(polynomial=SQUARE):
    return torch.nn.Sequential(espn.PolynomialActivation(polynomial))


def batches(count=3, size=10):
    toss = torch.Generator().manual_seed(5)
    x = torch.rand(count * size, 1, 8, 8, generator=toss) * 2 - 1
    return [(part, torch.zeros(len(part))) for part in x.split(size)]


def test_a_report_of_ranges_has_stress_beside_its_verdict():
    plain = espn.range_report(network(), batches())
    report = espn.range_report(network(), batches(), stress=True)
    assert plain.stressed is None and report.stressed is not None
    assert report.layers == plain.layers and report.verdict == plain.verdict
    assert report.images == 30
    rows = {row.corruption: row for row in report.stressed.report.rows}
    assert rows[CLEAN].images == STRESSED and rows[CLEAN].escaping == 0
    assert rows[BEYOND + "contrast x3"].escaping == STRESSED
    assert report.stressed.layers[0].largest > 2 > report.layers[0].largest
    lines = str(report).splitlines()
    assert lines[-1] == report.verdict and lines[-3].startswith("stress: ")
    assert "fits the ring" in lines[-2] and "no input guard" in lines[-2]


def test_what_the_guard_refuses_of_it_is_counted():
    guarded = network()
    x = torch.cat([x for x, _ in batches()])
    espn.attach_guard(guarded, espn.InputGuard.fit(x))
    stressed = espn.range_report(guarded, batches(), stress=True).stressed
    assert stressed is not None
    escaping = sum(row.escaping for row in stressed.report.rows)
    assert stressed.refused == escaping > STRESSED
    assert f"refuses {escaping} of the {escaping}" in str(stressed)


def test_what_overflows_under_stress_is_named():
    steep = espn.Polynomial((0,) * 10 + (1,), 0, (-1.0, 1.0))
    model = torch.nn.Sequential(*[espn.PolynomialActivation(steep)] * 3)
    report = espn.range_report(model, batches(), stress=True)
    assert "overflows the ring, with -inf bits" in str(report.stressed)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A small trained-like ReLU network and images, as files."""
    folder = tmp_path_factory.mktemp("stored")
    torch.manual_seed(0)
    model = Architecture("fashion_resnet", 10, 1, 12).build().eval()
    sample = fashion_sample()
    save_network(model, folder / "relu.safetensors", normalization=sample.normalization)
    np.save(folder / "images.npy", next(sample.batches(16))[0][..., 8:20, 8:20].numpy())
    return folder


def run(capsys, *arguments):
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_calibrate_prints_the_stress_and_the_guard_that_it_stores(
    stored, capsys, recwarn
):
    out = stored / "calibrated.safetensors"
    status, said, _ = run(
        capsys, "calibrate", stored / "relu.safetensors",
        "--images", stored / "images.npy", "--out", out, "--degree", 2,
    )  # fmt: skip
    assert status == 0
    assert "\nstress: " in said
    assert in_words(espn.guard_of(load_network(out))) in said.splitlines()


def test_check_takes_images_to_corrupt_and_a_guard_in_a_file(stored, capsys):
    torch.manual_seed(1)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 3, 2), espn.PolynomialActivation(SQUARE)
    ).requires_grad_(False)
    images = torch.from_numpy(np.load(stored / "images.npy"))
    (stored / "one.onnx").write_bytes(export(model.eval(), images[:1]))
    (stored / "guard.json").write_text(espn.InputGuard.fit(images).to_json())
    command = ("check", stored / "one.onnx", "--images", stored / "images.npy")
    status, said, _ = run(capsys, *command)
    assert status == 0 and "stress: 16 images in " in said
    assert "input guard: none" in said
    status, said, _ = run(capsys, *command, "--guard", stored / "guard.json")
    assert status == 0 and "input guard: refuses" in said and "tails: safe" in said
    status, said, _ = run(capsys, "check", stored / "one.onnx", "--shape", "1,12,12")
    assert status == 0 and "stress: not run" in said
