"""On a device training, calibration, stress and protocols do as on the processor.

Skipped where there is none. Two parties, or three processes with a dealer, share one.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import crypten
import crypten.communicator as comm
import pytest
import torch
from crypten.cuda import CUDALongTensor
from torch import Tensor, nn

import crypten_espn as espn
from crypten_espn.convert import PrivateNetwork
from crypten_espn.cost import measure
from crypten_espn.launch import run_parties
from crypten_espn.pillar import data
from crypten_espn.pillar.recipes import accuracy, channel_tuning, load_network, train
from crypten_espn.pillar.surgery import activations
from crypten_espn.polynomial import ChannelPolynomials
from crypten_espn.protocols import PROTOCOLS

from .patches.cases import without
from .patches.test_device_convolution import CASES, words
from .test_convert import private_form, small_residual
from .test_protocols import polyval_everything
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


@pytest.mark.parametrize("name", CASES)
def test_every_bit_of_a_convolution_is_that_of_the_processor(name: str) -> None:
    op, size, kernel, options = CASES[name]
    convolve = getattr(torch, op)
    for x, weight in (
        (words(size), words(kernel)),
        (torch.full(size, -1), torch.full(kernel, -1)),
    ):
        there = convolve(
            CUDALongTensor(x.cuda()), CUDALongTensor(weight.cuda()), **options
        )
        assert torch.equal(there.cpu(), convolve(x, weight, **options))


def test_many_channels_are_wrong_without_the_patch() -> None:
    _, size, kernel, options = CASES["wide"]
    x, weight = words(size), words(kernel)
    expected = torch.conv2d(x, weight, **options)
    with without("device_convolution"):
        y = torch.conv2d(
            CUDALongTensor(x.cuda()), CUDALongTensor(weight.cuda()), **options
        )
    assert not torch.equal(y.cpu(), expected)


@pytest.mark.parametrize("terms", [255, 256, 5000])
def test_every_bit_of_a_matrix_product_is_that_of_the_processor(terms: int) -> None:
    for x, y in (
        (words((7, terms)), words((terms, 5))),
        (torch.full((7, terms), -1), torch.full((terms, 5), -1)),
    ):
        there = torch.matmul(CUDALongTensor(x.cuda()), CUDALongTensor(y.cuda()))
        assert torch.equal(there.cpu(), torch.matmul(x, y))


def test_torch_takes_lists_of_a_devices_integers() -> None:
    x, y = words((2, 3)), words((2, 3))
    there = [CUDALongTensor(x.cuda()), CUDALongTensor(y.cuda())]
    for function in (torch.stack, torch.cat):
        assert torch.equal(function(there).cpu(), function([x, y]))


class Mixed(nn.Module):
    """Two activations, and what else a party computes on its shares."""

    def __init__(self, *kinds: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Conv2d(3, 8, 3, padding=(1, 0))
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.kinds = nn.ModuleList(kinds)
        self.resize = nn.Upsample(scale_factor=2, mode="bilinear")
        self.pool = nn.AdaptiveAvgPool2d(3)
        self.last = nn.Linear(16 * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.kinds[0](self.first(x))
        x = torch.cat([x, self.kinds[1](self.depthwise(x))], 1)
        return self.last(self.pool(self.resize(x).flip(3)).flatten(1))


def infer_on_both(
    networks: list[PrivateNetwork], x: Tensor, *, direct: bool = False
) -> list[list[tuple[Tensor, int, int]]]:
    """Of each network, on the processor and on the device: logits, rounds, bytes."""
    found = []
    channel = espn.use_direct_channel() if direct else contextlib.nullcontext()
    with channel:
        for network in networks:
            network.encrypt(src=0)
            rows = []
            for device in ("cpu", "cuda"):
                network.to(device)
                shared = crypten.cryptensor(x.to(device), src=1)
                with measure() as measured:
                    logits = network(shared)
                assert logits.device.type == device
                cost = measured.cost
                to_one, plain = logits.get_plain_text(dst=1), logits.get_plain_text()
                if comm.get().get_rank() == 1:
                    assert torch.equal(to_one, plain)
                rows.append((plain.cpu(), cost.rounds, cost.bytes_sent))
            found.append(rows)
    return found


# How far private logits may be off: as on the processor, in tests/test_convert.py.
BOUNDS = {"local": 0.02, "exact": 0.003}


@pytest.mark.parametrize("provider", ["TFP", "TTP"])
def test_values_and_cost_of_every_protocol(provider: str) -> None:
    model = private_form(small_residual())
    x = torch.randn(5, 3, 8, 8)
    expected = model(x).detach()
    cells = [(protocol, how) for protocol in PROTOCOLS for how in BOUNDS]
    networks = [
        espn.convert(model, x[:1], protocol=protocol, truncation=how)
        for protocol, how in cells
    ]
    with crypten.cfg.temp_override({"mpc.provider": provider}):
        for party in run_parties(infer_on_both, world_size=2, args=(networks, x)):
            for (_, how), (here, there) in zip(cells, party, strict=True):
                assert (there[0] - expected).abs().max() < BOUNDS[how]
                assert (there[0] - here[0]).abs().max() < BOUNDS[how]
                assert there[1:] == here[1:]


@pytest.mark.parametrize("direct", [False, True], ids=["gloo", "direct"])
def test_other_layers_and_comparisons(direct: bool) -> None:
    x = torch.randn(3, 3, 8, 8)
    one = espn.Polynomial.fit(torch.relu, degree=4)
    rows = ChannelPolynomials(
        (one, *[espn.Polynomial((1, 2, c), 3, (-1.0, 2.0)) for c in range(7)])
    )
    models = [
        Mixed(espn.PolynomialActivation(one), espn.PolynomialActivation(rows)),
        Mixed(nn.ReLU(), nn.ReLU()),
    ]
    networks = [espn.convert(model.eval(), x[:1]) for model in models]
    for party in run_parties(
        infer_on_both, world_size=2, args=(networks, x), kwargs={"direct": direct}
    ):
        for model, (here, there) in zip(models, party, strict=True):
            assert (there[0] - model(x)).abs().max() < BOUNDS["local"]
            assert there[1:] == here[1:]


def polyval_on_device(
    x: Tensor, polynomial: espn.Polynomial
) -> list[tuple[float, float, float]]:
    """As `polyval_everything`: of each the largest error, its bound, the scale."""
    results = []
    for got, bound, measured, declared, scale in polyval_everything(
        x.cuda(), polynomial
    ):
        assert got.is_cuda
        assert (measured.rounds, measured.bytes_sent) == (
            declared.rounds,
            declared.bytes_sent,
        )
        results.append(((got.cpu() - polynomial(x)).abs().max().item(), bound, scale))
    return results


def test_error_of_every_protocol_stays_within_its_bound() -> None:
    polynomial = espn.Polynomial.fit(torch.relu, degree=4)
    x = torch.linspace(-5, 5, 12_000).reshape(3, 40, 100)
    for results in run_parties(polyval_on_device, world_size=2, args=(x, polynomial)):
        assert len(results) == 6
        for error, bound, scale in results:
            assert error <= bound + 2**-16 + 2**-16 * 4
            assert scale == 2**16
