"""`crypten-espn bundle`: from a network's file and some images to a bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import crypten_espn as espn
from crypten_espn import cli
from crypten_espn.bundle import Description, Preprocessing
from crypten_espn.graph import export
from crypten_espn.pillar.data import Normalization
from crypten_espn.pillar.networks import convnet
from crypten_espn.pillar.storage import save_network

from ..masked.cases import QUARTIC

RGB = "--mean", "0.5", "0.4", "0.3", "--std", "0.2", "0.2", "0.2"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with images, labels, and an ONNX file of any size."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, stride=2),
        espn.PolynomialActivation(QUARTIC),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(4, 2),
    ).eval()
    Path("model.onnx").write_bytes(export(network, torch.zeros(1, 3, 9, 12)))
    Path("photos").mkdir()
    draws = np.random.default_rng(0)
    for i in range(4):
        pixels = draws.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"photos/{i}.jpg")
    Path("labels.txt").write_text("\ufeffcat\r\n dog \r\n\r\n", encoding="utf-8")
    return tmp_path


def bundle(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(["bundle", *arguments, "--out", "net.espn"])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_bundle_of_an_onnx_file_and_a_folder_of_images(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = "model.onnx", "--calibration", "photos", "--labels", "labels.txt"
    status, out, err = bundle(capsys, *given, *RGB, "--resize", "16")
    assert (status, err) == (0, "") and out.endswith("wrote net.espn\n")
    made = espn.load("net.espn")
    images = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.2, 0.2), 16)
    assert made.description == Description(images, ("cat", "dog"))
    assert made.model.plan.input.shape == (3, 9, 12)
    assert made.model.plan.digest.hex() in out and made.model.report.inputs == 4


def test_a_networks_own_normalisation_is_taken(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network: torch.nn.Module = convnet(in_channels=1, size=28)
    network = espn.replace_activations(network, {torch.nn.ReLU: QUARTIC})
    save_network(
        espn.replace_pooling(network).eval(),
        "network.safetensors",
        normalization=Normalization((0.25,), (0.5,)),
    )
    given = "network.safetensors", "--calibration", "photos"
    assert bundle(capsys, *given)[0] == 0
    assert espn.load("net.espn").description.images == Preprocessing((0.25,), (0.5,))


def test_inputs_of_a_file_may_stand_for_images(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save("images.npy", np.random.default_rng(0).random((4, 3, 9, 12)))
    given = "model.onnx", "--calibration", "images.npy"
    status, _, err = bundle(capsys, *given)
    assert status == 0 and "clients cannot send image files" in err
    assert espn.load("net.espn").description == Description()
    assert bundle(capsys, *given, *RGB, "--stretch", "--size", "9x12")[0] == 0
    described = espn.load("net.espn").description.images
    assert described is not None and described.fit == "stretch"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--calibration", "photos"), "does not say how they are normalised"),
        (("--calibration", "photos", *RGB[:4]), "--mean and --std belong together"),
        (("--calibration", "photos", *RGB, "--size", "9x9"), "(3, 9, 12)"),
        (
            ("--calibration", "photos", "--mean", "0.5", "--std", "0.5"),
            "1 means and no --size",
        ),
        (("--calibration", "photos", *RGB, "--resize", "5"), "resize to 12 at least"),
        (("--calibration", "nothing.npy", "--resize", "5"), "give --mean and --std"),
        (("--calibration", "."), "does not say how they are normalised"),
        (
            ("--calibration", "photos", *RGB, "--labels", "photos/0.jpg"),
            "give UTF-8 text",
        ),
        (
            ("--calibration", "photos", *RGB, "--labels", "three.txt"),
            "3 class names were given",
        ),
    ],
)
def test_what_does_not_belong_together_is_named(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    named: str,
) -> None:
    Path("three.txt").write_text("a\nb\nc\n")
    status, out, err = bundle(capsys, "model.onnx", *arguments)
    assert status == 2 and out == "" and named in err and err.count("\n") == 1
    assert not Path("net.espn").exists()


@pytest.mark.parametrize("size", ["0x9", "9x", "x9", "9x9x9", "a", "-1", "99999"])
def test_a_size_that_is_none_is_a_usage_error(
    capsys: pytest.CaptureFixture[str], size: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        bundle(capsys, "m.onnx", "--calibration", "x.npy", "--size", size)
    assert ended.value.code == 2
    assert "is no size" in capsys.readouterr().err


def test_serve_says_what_a_bundle_does_not_need_and_others_do(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    addresses = "127.0.0.1:0", "--dealer", "127.0.0.1:1"
    assert cli.main(["serve", "model.onnx", *addresses]) == 2
    assert "is no bundle and needs --calibration" in capsys.readouterr().err
    assert bundle(capsys, "model.onnx", "--calibration", "photos", *RGB)[0] == 0
    given = "serve", "net.espn", *addresses
    assert cli.main([*given, "--calibration", "x.npy"]) == 2
    assert "leave out --calibration" in capsys.readouterr().err
    data = bytearray(Path("net.espn").read_bytes())
    data[-1] ^= 1
    Path("net.espn").write_bytes(data)
    assert cli.main(list(given)) == 2
    assert "net.espn was changed or is damaged" in capsys.readouterr().err
