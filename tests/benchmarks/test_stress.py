"""The stress benchmark: what it counts, on few images of one network."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import stress
from benchmarks.stress import Counts, measured
from benchmarks.unseen import UNSEEN, unseen
from crypten_espn.pillar.data import FASHION_NORMALIZATION, fashion_sample
from crypten_espn.pillar.guard import InputGuard, attach_guard
from crypten_espn.pillar.storage import bundled, save_network
from crypten_espn.pillar.stress import CLEAN, corruptions
from crypten_espn.pillar.surgery import PolynomialActivation, activations
from crypten_espn.polynomial import Polynomial


def images() -> torch.Tensor:
    return next(fashion_sample().batches(256))[0]


def bounded(radius: float) -> nn.Module:
    act = PolynomialActivation(Polynomial((0, 1), 0, (-radius, radius)))
    return nn.Sequential(act, nn.Flatten())


def test_counts_tell_escapes_refusals_and_what_is_both() -> None:
    network = bounded(1.0)
    x = torch.tensor([0.5, 2.0, 3.0, 0.6]).view(4, 1, 1, 1)
    # The energy of 0.6 is 0.36, beyond 0.25, and that of 2 is 4.
    guard = InputGuard((0.0,), (2.0,), (4.0,), (0.0,), (0.0,), (1.0,))
    counts = Counts.of(network, guard, x)
    assert counts == Counts(4, 2, 1, 1, 0, 2.0)
    assert Counts.of(network, None, x) == Counts(4, 2, 2, 0, 0, 3.0)
    low = InputGuard((0.0,), (4.0,), (0.25,), (0.0,), (0.0,), (1.0,))
    counts += Counts.of(network, low, x)
    assert counts == Counts(8, 4, 1, 4, 1, 2.0)
    assert counts.false_refusals == 0.25


def test_every_kind_is_measured_on_as_many_images_as_asked_for() -> None:
    network = bounded(2.1)
    attach_guard(network, InputGuard.fit(images()))
    found = measured(network, FASHION_NORMALIZATION, images()[:12], 480)
    assert found[CLEAN][CLEAN].images == 12 and found[CLEAN][CLEAN].refused == 0
    standard = corruptions(images()[:2]).keys() - {CLEAN}
    assert found["seen"].keys() == standard and found["unseen"].keys() == UNSEEN.keys()
    for counts in (found["seen"], found["unseen"]):
        assert len({each.images for each in counts.values()}) == 1
        assert 240 <= sum(each.images for each in counts.values()) < 270
    bright = found["seen"]["beyond, brightness +50 %"]
    assert bright.escaping > 0
    assert sum(each.escaping for each in found["unseen"].values()) == 0


def test_unseen_corruptions_keep_shape_and_levels_and_change_something() -> None:
    x = (images()[:6] * 0.353 + 0.286).clamp(0, 1)
    for name in UNSEEN:
        made = unseen(x, name, seed=1)
        assert made.shape == x.shape and float(made.min()) >= 0, name
        assert float(made.max()) <= 1 and not torch.equal(made, x), name
        assert torch.equal(made, unseen(x, name, seed=1))


@pytest.mark.parametrize("settle", [False, True])
def test_the_command_prints_and_writes_what_it_counted(
    settle: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sample = fashion_sample()
    given = SimpleNamespace(
        normalization=FASHION_NORMALIZATION, validation=sample, test=lambda: sample
    )
    monkeypatch.setattr(stress, "load_dataset", lambda name: given)
    monkeypatch.setattr(stress, "_CALIBRATION", 32)
    path = tmp_path / "deep" / "stress.json"
    network = bundled("fashion-resnet")
    for module in activations(network).values():
        (row,) = module.polynomial.rows
        module.polynomial = replace(row, interval=(-5.0, 5.0))
    wide = (1024.0,)
    attach_guard(network, InputGuard(wide, wide, wide, wide, (0.0,), (1.0,)))
    file = tmp_path / "unsettled.safetensors"
    save_network(network, file, normalization=network.normalization)
    arguments = ["--networks", str(file), "--images", "8", "--corrupted", "60"]
    code = stress.main([*arguments, "--json", str(path)] + ["--settle"] * settle)
    (name,) = (found := json.loads(path.read_text())["networks"])
    assert name == str(file) + ", settled" * settle
    every = [each for group in found[name].values() for each in group.values()]
    passing = sum(each["passing"] for each in every)
    # Its guard lets all through; settled, at least what it was fitted to is held.
    assert code == (passing > 0)
    if settle:
        assert passing <= 2
    else:
        assert passing > 5 and all(each["refused"] == 0 for each in every)
    assert "escaping" in capsys.readouterr().out


def test_an_unknown_network_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = fashion_sample()
    given = SimpleNamespace(
        normalization=FASHION_NORMALIZATION, validation=sample, test=lambda: sample
    )
    monkeypatch.setattr(stress, "load_dataset", lambda name: given)
    assert stress.main(["--networks", "none", "--images", "4"]) == 2
    assert "none cannot be read" in capsys.readouterr().err
