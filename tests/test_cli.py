"""The command line as a user meets it: help, checks, errors, exit statuses."""

from __future__ import annotations

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
