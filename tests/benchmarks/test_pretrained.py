"""A torchvision network's file: weights in, a private answer out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import pretrained
from crypten_espn.errors import EspnError
from crypten_espn.pillar import data

from ..test_recipes import toy_dataset


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(data.DATASETS, "toy", toy_dataset)
    monkeypatch.setitem(pretrained.DATASETS, "toy", toy_dataset)


def small(name: str, *, weights: None, num_classes: int) -> nn.Module:
    """In the place of a torchvision network, whose millions of weights take minutes."""
    assert name == "resnet18" and weights is None
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, num_classes),
    )


@pytest.mark.slow
def test_a_file_of_weights_ends_in_private_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pretrained.torchvision.models, "get_model", small)
    file = tmp_path / "weights.pth"
    given = ["--dataset", "toy", "--weights", str(file), "--stand-in", "12"]
    sizes = ["--images", "24", "--asked", "8", "--degrees", "4"]
    steps = ["--adapt", "2", "--finetune", "2"]
    assert pretrained.main([*given, *sizes, *steps]) == 0
    assert "4.weight" in torch.load(file, weights_only=True)
    text = capsys.readouterr().out
    for said in (
        "resnet18 trained for 12 steps as a stand-in",
        "average pools in the place of max pools, 2 steps",
        "recommended: degree 4, margin 2",
        "degree 4 fine-tuned, 2 steps",
        "8 validation images in private",
    ):
        assert said in text


def test_a_file_that_is_not_of_the_network_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "weights.pth"
    torch.save({"fc.weight": torch.zeros(4, 512)}, file)
    assert pretrained.main(["--dataset", "toy", "--weights", str(file)]) == 2
    said = capsys.readouterr().err
    assert "does not fit torchvision's resnet18 of 4 classes" in said
    with pytest.raises(EspnError, match=r"none\.pth"):
        pretrained.load("resnet18", tmp_path / "none.pth", 4)
