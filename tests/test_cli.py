"""The command line as a user meets it: help, checks, errors, exit statuses."""

from __future__ import annotations

import importlib.metadata
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from torch import nn
from typer.core import TyperGroup

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


COMMANDS = (
    "demo", "doctor", "check", "estimate", "explain", "plan", "bundle", "serve",
    "predict", "prepare", "sidecar", "deal", "material", "keys", "train", "finetune",
    "calibrate",
)  # fmt: skip


def refused(capsys, *arguments):
    """What a wrong usage says, on one line without what every one says."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    captured = capsys.readouterr()
    assert ended.value.code == 2 and captured.out == ""
    line, hint = captured.err.splitlines()
    assert line.startswith("crypten-espn: ") and "--help" in hint
    return line


def parsed(command, *options):
    """A command's parameters; it does not run."""
    group = typer.main.get_command(cli.app())
    assert isinstance(group, TyperGroup)
    return group.commands[command].make_context(command, list(options)).params


def helped(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_lists_every_command(capsys):
    text = helped(capsys, "--help")
    listed = re.findall(r"^  (\w+)  +\S", text.split("Commands:")[1], re.M)
    assert tuple(listed) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples_that_parse(capsys, command):
    text = helped(capsys, command, "--help")
    assert text.isascii() and text == helped(capsys, command, "-h")
    examples = text.split("examples:")[1].replace("\\\n", "").strip().splitlines()
    for example in examples:
        program, name, *options = shlex.split(example, comments=True)
        assert (program, name) == ("crypten-espn", command)
        assert bool(parsed(name, *options)) == (command != "doctor")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["check", "x.onnx", "--shape", "3,,4"], ["--shape", "'3,,4'", "3,32,32"]),
        (["check", "x.onnx", "--shape", "3,-1"], ["--shape", "'3,-1'", "3,32,32"]),
        (["explain", "x", "--input", "i", "--protocol", "gmw"], ["gmw", "espn, op"]),
        (["explain", "x", "--input", "i", "--precision", "fast", "low"], ["low", "hi"]),
        (
            ["explain", "x", "--input", "i", "--truncation", "no"],
            ["no", "local, exact"],
        ),
        (["explain", "x"], ["--input"]),
        (["estimate", "minionn", "--engines", "espn", "mpc"], ["mpc", "opened_mask"]),
        (["estimate", "minionn", "--rtt", "-1"], ["--rtt", "'-1'", "0 on"]),
        (["estimate", "minionn", "--rtt", "nan"], ["--rtt", "'nan'", "0 on"]),
        (["estimate", "minionn", "--macs", "0"], ["--macs", "'0'", "above 0"]),
        (["estimate", "minionn", "--batch", "1.5"], ["--batch", "'1.5'", "1 on"]),
        (["estimate", "minionn", "--batch", "-2"], ["--batch", "'-2'", "1 on"]),
        (["estimate", "minionn", "--bacth", "2"], ["--bacth", "--batch"]),
        (
            ["plan", "x", "--calibration", "i", "--precision", "8"],
            ["'8'", "compact, fast, hi"],
        ),
        (["train", "--threads", "0"], ["--threads", "'0'", "1 on"]),
        (["train", "--penalty", "l2"], ["--penalty", "'l2'", "sum, mean, boundary"]),
        (["train", "--epochs", "many"], ["--epochs", "'many'", "1 on"]),
        (["finetune", "--start", "x", "--replace-epochs", "-1"], ["'-1'", "0 on"]),
        (["finetune"], ["--start"]),
        (["finetune", "--start", "x", "--activation", "relu"], ["--activation"]),
        (["predict", "a:1", "--dealer", "b:1"], ["--input"]),
        (["serve", "x"], ["ADDRESS"]),
        (["material", "a", "b"], ["b"]),
        (["chek", "x"], ["chek", "check"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_wrong_value_is_named_with_what_is_allowed(capsys, arguments, named):
    line = refused(capsys, *arguments)
    assert all(part in line for part in named), line


@pytest.mark.parametrize(
    "arguments",
    [
        [
            "predict",
            "a:1",
            "--dealer",
            "b:1",
            "--input",
            "x.npy",
            "--out",
            "--insecure",
        ],
        ["deal", "127.0.0.1:0", "--tls", "a.pem", "a.key", "--insecure"],
        ["keys", "folder", "--client", "--server", "host"],
        ["train", "--out"],
    ],
    ids=" ".join,
)
def test_an_option_is_never_the_value_of_another(
    capsys, tmp_path, monkeypatch, arguments
):
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, *arguments)
    assert re.search(r"--(out|tls|client) takes [13] value\(s\), [02] given", line)
    assert not list(tmp_path.iterdir())


def test_an_option_takes_several_values_or_is_repeated():
    for words in (
        ["n", "--precision-bits", "8", "12", "--input", "i"],
        ["--input", "i", "--precision-bits", "8", "12", "--", "n"],
        ["--precision-bits=8", "n", "--precision-bits", "12", "--input", "i"],
    ):
        params = parsed("explain", *words)
        assert params["precision_bits"] == [8, 12] and params["network"] == Path("n")
    params = parsed("deal", "--limit", "batch=2", "a:1", "--limit", "count=3")
    assert params["limit"] == ["batch=2", "count=3"] and params["address"] == "a:1"


def test_an_interrupt_ends_with_130(capsys, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("crypten_espn.doctor.report", interrupted)
    status, out, err = run(capsys, "doctor")
    assert (status, out, err) == (130, "", "crypten-espn: interrupted\n")


def test_the_package_runs_as_a_module(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["crypten-espn", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("crypten_espn.cli", run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"crypten-espn {espn.__version__}\n"


def test_no_command_and_wrong_command_are_usage_errors(capsys):
    for arguments in ([], ["nope"], ["check", "x.onnx", "--shape", "3,a"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 2
        assert capsys.readouterr().err


@pytest.mark.slow
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


@pytest.mark.slow
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
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten()).eval()
    file = tmp_path / "model.onnx"
    file.write_bytes(export(model, torch.zeros(1, 1, 8, 8)))
    status, out, _ = run(capsys, "check", str(file), "--shape", "1,8,8")
    assert status == 1 and "Tanh" in out and "replace_activations" in out


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
