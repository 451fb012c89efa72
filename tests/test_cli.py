"""The command line as a user meets it: help, checks, errors, exit statuses."""

from __future__ import annotations

import importlib.metadata

import numpy as np
import pytest
import torch
from torch import nn

import crypten_espn as espn
from crypten_espn import cli
from crypten_espn.graph import export
from crypten_espn.pillar import networks
from crypten_espn.pillar.recipes import save_network
from crypten_espn.polynomial import Polynomial


def run(capsys, *arguments):
    status = cli.main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_every_command_has_help_with_examples(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    commands = ("demo", "doctor", "check", "explain", "train", "finetune")
    for command in commands:
        assert command in text
        with pytest.raises(SystemExit) as ended:
            cli.main([command, "--help"])
        assert ended.value.code == 0
        assert (
            f"crypten-espn {command}" in capsys.readouterr().out.split("examples:")[1]
        )


def test_no_command_and_wrong_command_are_usage_errors(capsys):
    for arguments in ([], ["nope"], ["check", "x.onnx", "--shape", "3,a"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 2
        assert capsys.readouterr().err


def test_check_accepts_what_converts(capsys, tmp_path):
    model: nn.Module = networks.convnet(in_channels=1, size=28)
    polynomial = Polynomial.fit(torch.relu, degree=4)
    model = espn.replace_activations(model, {nn.ReLU: polynomial})
    model = espn.replace_pooling(model).eval()
    file = tmp_path / "model.onnx"
    file.write_bytes(export(model, torch.zeros(1, 1, 28, 28)))
    status, out, _ = run(capsys, "check", str(file), "--shape", "1,28,28")
    assert status == 0 and "PolynomialActivation" in out and "can be converted" in out

    saved = tmp_path / "network.safetensors"
    save_network(model, saved)
    status, out, _ = run(capsys, "check", str(saved))
    assert status == 0 and "can be converted" in out


def test_bundled_networks_are_taken_by_name(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = run(capsys, "check", "fashion-minionn")
    assert status == 0 and "can be converted" in out
    inputs = images(tmp_path, 2, 1, 28, 28)
    status, out, _ = run(capsys, "plan", "fashion-minionn", "--calibration", inputs)
    assert status == 0 and out
    arguments = ("--macs", "40", "--engines", "espn")
    status, out, _ = run(capsys, "estimate", "fashion-minionn", *arguments)
    assert status == 0 and "espn" in out


def test_the_version_is_that_of_the_distribution(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"crypten-espn {espn.__version__}\n"
    assert importlib.metadata.version("crypten-espn") == espn.__version__


def test_check_names_what_does_not(capsys, tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sigmoid(), nn.Flatten()).eval()
    file = tmp_path / "model.onnx"
    file.write_bytes(export(model, torch.zeros(1, 1, 8, 8)))
    status, out, _ = run(capsys, "check", str(file), "--shape", "1,8,8")
    assert status == 1 and "Sigmoid" in out and "replace_activations" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("check", "missing.onnx", "--shape", "1,8,8"), "no file"),
        (("check", "missing.onnx"), "needs --shape"),
        (("check", "missing.safetensors"), "missing.safetensors"),
        (("check", "fashion-resnet18"), "fashion-resnet32"),
        (("estimate", "fashion-resnet18"), "fashion-resnet32"),
        (("train", "--recipe", "nope"), "nope"),
    ],
)
def test_expected_errors_are_one_line(
    capsys, arguments, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, *arguments)
    assert status == 2 and message in err
    assert err.startswith("crypten-espn: ") and "Traceback" not in err


@pytest.fixture
def network(tmp_path):
    """The path of a small network for 28x28 images of one channel."""
    model: nn.Module = networks.convnet(in_channels=1, size=28)
    polynomial = Polynomial.fit(torch.relu, degree=4)
    model = espn.replace_activations(model, {nn.ReLU: polynomial})
    path = tmp_path / "network.safetensors"
    save_network(espn.replace_pooling(model).eval(), path)
    return str(path)


def images(folder, *shape, name="images.npy"):
    path = folder / name
    np.save(path, np.random.default_rng(0).normal(0, 0.1, shape).astype(np.float32))
    return str(path)


@pytest.mark.parametrize("command", ["plan", "explain", "calibrate"])
def test_images_of_another_size_are_named_with_both_sizes(
    capsys, tmp_path, network, command
):
    wrong = images(tmp_path, 3, 1, 32, 32)
    right = images(tmp_path, 3, 1, 28, 28, name="right.npy")
    arguments = {
        "plan": ("plan", network, "--calibration", wrong),
        "explain": ("explain", network, "--input", wrong),
        "calibrate": ("explain", network, "--input", right, "--calibration", wrong),
    }[command]
    status, _, err = run(capsys, *arguments)
    assert status == 2 and "ShapeError" in err and "images.npy" in err
    assert "(3, 1, 32, 32)" in err and "28, 28" in err and "resize" in err


def test_one_calibration_image_is_told(capsys, tmp_path, network):
    one = images(tmp_path, 1, 1, 28, 28)
    status, out, err = run(capsys, "plan", network, "--calibration", one)
    assert status == 0 and out
    assert "one input, which bounds every layer" in err
    several = images(tmp_path, 3, 1, 28, 28)
    status, _, err = run(capsys, "plan", network, "--calibration", several)
    assert status == 0 and err == ""


def test_a_file_that_is_no_array_is_one_line(capsys, tmp_path, network):
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"\xff\xd8\xff\xe0 and so on")
    for arguments in (
        ("plan", network, "--calibration", str(path)),
        ("explain", network, "--input", str(path)),
        ("predict", "localhost:1", "--dealer", "localhost:2", "--input", str(path)),
    ):
        status, _, err = run(capsys, *arguments)
        assert status == 2 and "JPEG image" in err and "pickle" not in err
        assert err.count("\n") == 1


@pytest.mark.parametrize("bits", ["-3", "0", "31", "1000", "many"])
def test_fractional_bits_out_of_range_are_a_usage_error(capsys, bits):
    with pytest.raises(SystemExit) as ended:
        cli.main(["explain", "n", "--input", "x.npy", "--precision-bits", bits])
    assert ended.value.code == 2
    assert f"{bits!r} is no number of fractional bits" in capsys.readouterr().err
