"""Networks as files: what is written is read, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from crypten_espn.errors import CheckpointError, EspnError
from crypten_espn.pillar.data import Normalization, fashion_sample
from crypten_espn.pillar.guard import InputGuard, attach_guard, guard_of
from crypten_espn.pillar.networks import Architecture, fashion_resnet
from crypten_espn.pillar.ranges import range_report
from crypten_espn.pillar.recipes import RECIPES, Recipe, accuracy
from crypten_espn.pillar.storage import (
    BUNDLED,
    bundled,
    load_network,
    load_weights,
    network_file,
    save_network,
)
from crypten_espn.pillar.surgery import Key, activations, replace_activations
from crypten_espn.polynomial import Polynomial

RELU = Polynomial((322, 512, 160, 0, -3), 10, (-5.0, 5.0))


def network_with_polynomials() -> nn.Module:
    torch.manual_seed(1)
    network = fashion_resnet(classes=3, in_channels=2, size=9)
    first = Polynomial((1, 2), 6, (-1.0, 2.0))
    mapping: dict[Key, Polynomial] = {"relu": first, nn.ReLU: RELU}
    return replace_activations(network, mapping).eval()


def test_a_network_survives_its_file(tmp_path: Path) -> None:
    network = network_with_polynomials()
    path = tmp_path / "deep" / "network.safetensors"
    normalization = Normalization((0.1, 0.2), (0.3, 0.4))
    save_network(network, path, normalization=normalization, notes={"seed": 3})
    loaded = load_network(path)
    assert loaded.architecture == Architecture("fashion_resnet", 3, 2, 9)
    assert loaded.normalization == normalization
    assert loaded.notes == {"seed": 3}
    assert not loaded.training
    assert {n: a.polynomial for n, a in activations(loaded).items()} == {
        n: a.polynomial for n, a in activations(network).items()
    }
    x = torch.randn(4, 2, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), network(x), rtol=0, atol=0)


def test_a_guard_survives_its_networks_file(tmp_path: Path) -> None:
    network, path = network_with_polynomials(), tmp_path / "x.safetensors"
    save_network(network, path)
    assert guard_of(load_network(path)) is None
    with safe_open(path, framework="pt") as file:
        assert "guard" not in file.metadata()
    guard = InputGuard.fit(torch.rand(5, 2, 9, 9))
    attach_guard(network, guard)
    save_network(network, path)
    assert guard_of(load_network(path)) == guard
    attach_guard(network, InputGuard.fit(torch.rand(5, 3, 9, 9)))
    with pytest.raises(CheckpointError, match="guard of 3 channels and takes 2"):
        save_network(network, path)


def test_files_that_are_not_ours_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read as a network"):
        load_network(tmp_path / "missing.safetensors")
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(CheckpointError, match="cannot be read as a network"):
        load_network(path)
    save_file({"w": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="without a network's description"):
        load_network(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("architecture", '{"name": "lenet", "classes": 1}', "damaged description"),
        (
            "architecture",
            '{"name": "lenet", "classes": 1, "in_channels": 1, "size": 9}',
            "unknown network 'lenet'",
        ),
        (
            "architecture",
            '{"name": "convnet", "classes": 3, "in_channels": 2, "size": 9}',
            "no activation is called|does not hold the tensors",
        ),
        ("polynomials", "[", "damaged description"),
        ("polynomials", '{"relu": {"numerators": []}}', "damaged description"),
        ("guard", "null", "not a stored guard"),
        ("guard", '{"depth": [1.0]}', "not a stored guard"),
        ("guard", InputGuard.fit(torch.ones(2, 3)).to_json(), "guard of 3 channels"),
    ],
)
def test_damaged_descriptions_are_named(
    tmp_path: Path, key: str, value: str, message: str
) -> None:
    path = tmp_path / "x.safetensors"
    save_network(network_with_polynomials(), path)
    with safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), key: value}
    save_file(load_file(path), path, metadata=metadata)
    with pytest.raises(EspnError, match=message):
        load_network(path)


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    network = network_with_polynomials()
    path = tmp_path / "x.safetensors"
    save_network(network, path)
    with torch.no_grad():
        next(network.parameters()).view(-1)[3] = float("nan")
    with pytest.raises(CheckpointError, match=r"conv1\.weight holds values"):
        save_network(network, path)
    load_network(path)
    with pytest.raises(CheckpointError, match="a Linear cannot be saved"):
        save_network(nn.Linear(1, 1), path)


def test_weights_of_another_network_or_class_count_are_named(tmp_path: Path) -> None:
    network = fashion_resnet(classes=4)
    path = tmp_path / "weights.pth"
    torch.save(fashion_resnet(classes=10).state_dict(), path)
    with pytest.raises(CheckpointError, match=r"fc\.bias is \(10,\), not \(4,\)"):
        load_weights(network, path)
    torch.save(nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(CheckpointError, match=r"bn1.*missing.* more"):
        load_weights(network, path)
    torch.save({"model": Path("x")}, path)
    with pytest.raises(CheckpointError, match="cannot be read as a state_dict"):
        load_weights(network, path)
    with pytest.raises(CheckpointError, match="cannot be read as a state_dict"):
        load_weights(network, tmp_path / "none.safetensors")


RESULTS = sorted(
    (Path(__file__).parent.parent / "crypten_espn" / "data").glob("*_*.json")
)


@pytest.mark.slow
@pytest.mark.parametrize("results", RESULTS, ids=lambda path: path.stem)
def test_bundled_networks_are_what_their_results_say(results: Path) -> None:
    stated = json.loads(results.read_text())
    path = results.with_suffix(".safetensors")
    assert path.stat().st_size <= 2_000_000
    network = load_network(path)
    recipe = Recipe(**stated["recipe"])
    assert network.architecture.name == recipe.network
    assert network.notes is not None
    for key in ("recipe", "epoch", "test_accuracy", "selection_rule"):
        assert network.notes[key] == stated[key]
    rows = results.with_suffix(".csv").read_text().splitlines()
    assert len(rows) == 1 + recipe.epochs
    assert recipe.name in RECIPES and recipe.name in stated["command"]
    polynomial = recipe.activation == "polynomial"
    assert bool(activations(network)) == polynomial
    sample = fashion_sample()
    # 256 images: three standard deviations around the accuracy over all 10,000.
    spread = 3 * (stated["test_accuracy"] * (1 - stated["test_accuracy"]) / 256) ** 0.5
    assert abs(accuracy(network, sample) - stated["test_accuracy"]) < spread
    if polynomial:
        assert range_report(network, sample.batches(64)).unsafe is None


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_networks_are_there_by_name(name: str) -> None:
    network = bundled(name)
    assert not network.training
    assert bool(activations(network)) is not name.endswith("relu")
    assert network.input_shape == (1, 28, 28) and network.normalization is not None
    weights = load_network(network_file(name)).state_dict()
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, weights[key])


def test_every_bundled_network_has_a_name() -> None:
    named = {network_file(name).stem for name in BUNDLED}
    assert named == {path.stem for path in RESULTS}


def test_an_unknown_bundled_network_is_refused_with_the_names_there_are(
    tmp_path: Path,
) -> None:
    for name in ("fashion-resnet18", "fashion_resnet_poly", "", "../fashion-resnet"):
        with pytest.raises(CheckpointError, match="choose one of fashion-resnet, "):
            bundled(name)
    missing = network_file(tmp_path / "fashion-resnet18")
    with pytest.raises(CheckpointError, match=r"no such file.*fashion-resnet32"):
        load_network(missing)


def test_a_file_comes_before_a_bundled_network_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    inside = network_file("fashion-resnet")
    assert inside.is_absolute() and inside.is_file()
    Path("fashion-resnet-relu").mkdir()
    assert network_file("fashion-resnet-relu").is_file()
    save_network(network_with_polynomials(), "fashion-resnet")
    assert network_file("fashion-resnet") == Path("fashion-resnet")
    assert network_file("other.onnx") == Path("other.onnx")
