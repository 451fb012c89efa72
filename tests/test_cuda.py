"""Training, calibration and stress on a device: what they make is as on the processor.

Skipped where there is none.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import crypten_espn as espn
from crypten_espn.pillar import data
from crypten_espn.pillar.recipes import accuracy, channel_tuning, load_network, train
from crypten_espn.pillar.surgery import activations
from crypten_espn.polynomial import ChannelPolynomials

from .test_recipes import TINY, toy_dataset

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch sees no CUDA device"
)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8 * 26 * 26, 10)).eval()


def images(count: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 1, 28, 28, generator=generator)


@pytest.fixture(autouse=True)
def _exact_convolutions():
    """Convolutions in float32 as on the processor, not in TensorFloat-32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def test_a_polynomial_and_its_gradient_are_those_of_the_processor():
    rows = [espn.Polynomial((0, 512, 2 + c), 10, (-3.0, 3.0)) for c in range(8)]
    fitted = espn.replace_activations(
        network(), {nn.ReLU: ChannelPolynomials(tuple(rows))}
    )
    x = images()
    results = []
    for device in ("cpu", "cuda"):
        fitted.to(device).train().zero_grad()
        y = fitted(x.to(device))
        (y.square().sum() + espn.range_penalty(fitted, reduction="mean")).backward()
        found = [y, *(p.grad for p in fitted.parameters())]
        # Copies: the network takes its gradients along to the next device.
        results.append([t.detach().cpu().clone() for t in found if t is not None])
    for here, there in zip(*results, strict=True):
        torch.testing.assert_close(there, here, rtol=2e-3, atol=2e-3)


def test_calibration_gives_the_intervals_of_the_processor():
    here = espn.calibrate(network(), images(), degree=4)
    there = espn.calibrate(network().cuda(), images(), degree=4)
    assert next(there.parameters()).is_cuda
    (one,), (other,) = (activations(m).values() for m in (here, there))
    for row, same in zip(one.polynomial.rows, other.polynomial.rows, strict=True):
        assert same.interval == pytest.approx(row.interval, rel=1e-3)
    assert espn.guard_of(there) == espn.guard_of(here)
    torch.testing.assert_close(
        there(images().cuda()).cpu(), here(images()), rtol=1e-2, atol=1e-2
    )


def test_stress_and_range_report_run_where_the_network_is():
    fitted = espn.calibrate(network(), images())
    here = espn.stress(fitted, images(8))
    there = espn.stress(fitted.cuda(), images(8))
    for row, same in zip(here.rows, there.rows, strict=True):
        assert same.reach == pytest.approx(row.reach, rel=1e-3)
    settled = espn.settle_intervals(fitted, images())
    assert next(settled.parameters()).is_cuda
    report = espn.range_report(fitted, [images(8)])
    assert len(report.layers) == 1


def test_a_network_trained_on_a_device_is_written_for_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(data.DATASETS, "toy", toy_dataset)
    recipe = replace(TINY, activation="relu", precision="bfloat16")
    start = train(recipe, out=tmp_path / "relu", device="cuda", progress=False).path
    result = train(
        replace(channel_tuning(recipe, steps=8), batch_size=32, replayed=4),
        out=tmp_path / "tuned",
        start=start,
        device="cuda",
        progress=False,
    )
    assert result.test_accuracy > 0.9
    loaded = load_network(result.path)
    assert not any(p.is_cuda for p in loaded.parameters())
    assert accuracy(loaded, toy_dataset(tmp_path, None).test()) == pytest.approx(
        result.test_accuracy, abs=0.03
    )
