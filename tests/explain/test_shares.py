"""`explain` against real parties: bit for bit, and within its declared rounding."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import crypten
import numpy as np
import pytest
import torch
from crypten.encoder import FixedPointEncoder
from torch import nn

import crypten_espn as espn
from crypten_espn import cli
from crypten_espn.convert import nearest
from crypten_espn.errors import (
    ConversionError,
    EspnError,
    ProtocolError,
    RangeError,
    ShapeError,
)
from crypten_espn.explain import Explanation, compare_precisions, explain
from crypten_espn.graph import export
from crypten_espn.launch import run_parties
from crypten_espn.pillar.data import fashion_sample
from crypten_espn.pillar.storage import load_network
from crypten_espn.polynomial import ChannelPolynomials, Polynomial

POLYNOMIAL = Polynomial.fit(torch.relu, degree=4)
CUBIC = Polynomial((3, 500, 60, 7), 10, (-4, 4))
# Units and degrees that differ, and a channel that is linear.
OF_CHANNELS = ChannelPolynomials(
    (
        *(Polynomial(CUBIC.numerators, 10, (-4, 4), exponent=e) for e in (-3, 0, 2)),
        POLYNOMIAL,
        Polynomial((100, 700), 10, (-4, 4)),
        CUBIC,
    )
)
DATA = Path(espn.__file__).parent / "data"
BUNDLED = sorted(
    path for path in DATA.glob("*.safetensors") if path.stem != "fashion_sample"
)


class Everything(nn.Module):
    """Every operation that `convert` makes, comparisons left out."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.act1 = espn.PolynomialActivation(POLYNOMIAL)
        self.depthwise = nn.Conv2d(6, 6, 3, stride=2, padding=(1, 0), groups=6)
        self.norm = nn.BatchNorm2d(6)
        self.act2 = espn.PolynomialActivation(OF_CHANNELS)
        self.line = espn.PolynomialActivation(Polynomial((100, 700), 10, (-4, 4)))
        self.pool = nn.AvgPool2d(2, stride=1, padding=1, count_include_pad=False)
        self.gate = nn.Conv2d(6, 6, 1)
        self.pad = nn.ZeroPad2d((1, 0, 0, 2))
        self.last = nn.Conv2d(12, 6, 2)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act1(self.first(x))
        x = self.act2(self.norm(self.depthwise(x)))
        y = self.pool(self.line(x))
        y = y * self.gate(y.mean((2, 3), keepdim=True)) + y * y.mean(1, keepdim=True)
        x = self.pad(torch.cat([y, y + y], 1))
        x = self.last(x)
        return self.fc(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))


def everything() -> tuple[Any, torch.Tensor]:
    torch.manual_seed(5)
    model = Everything().eval()
    return model, torch.randn(3, 2, 8, 8)


def recorded(network, x):
    """A real run that notes every share as it is drawn, in the order of use."""
    from crypten.mpc.primitives import beaver

    from crypten_espn.correlated import rescaling
    from crypten_espn.protocols import PROTOCOLS, truncation

    drawn = []

    def noting(function, share):
        def noted(*args, **options):
            result = function(*args, **options)
            drawn.append((share(result).clone(), function is rescaling))
            return result

        return noted

    network.encrypt(src=0)
    shared = crypten.cryptensor(x, src=1)
    for module in network._modules.values():
        if type(module).__name__ == "Parameter":
            drawn.append((module.data.share, False))
    drawn.append((shared.share, False))
    for name in ("conv2d", "matmul", "mul"):
        setattr(beaver, name, noting(getattr(beaver, name), lambda y: y.share))
    patched: Any = truncation
    patched.rescaling = noting(rescaling, lambda stack: stack[0])
    truncation.exact = noting(truncation.exact, lambda y: y)
    for name, protocol in PROTOCOLS.items():
        nonlinear = dataclasses.replace(
            protocol, evaluate=_noting_products(protocol.evaluate, drawn)
        )
        PROTOCOLS[name] = nonlinear
    y = network(shared)
    return drawn, y.reveal(), y.get_plain_text()


def _noting_products(evaluate, drawn):
    def noted(x, p, form):
        before = len(drawn)
        result = evaluate(x, p, form)
        del drawn[before:]  # products within a polynomial
        if form.degree >= 2:
            drawn.append((result.clone(), False))
        return result

    return noted


class Replay:
    """Hands out what rank 0 drew in a real run; masks are both parties' sum."""

    def __init__(self, parties) -> None:
        self.left = [
            mine + theirs if is_mask else mine
            for (mine, is_mask), (theirs, _) in zip(*parties, strict=True)
        ]

    def ring(self, size):
        drawn = self.left.pop(0)
        assert tuple(drawn.shape) == tuple(size)
        return drawn


@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize(
    ("protocol", "truncation"),
    [
        ("espn", "local"),
        ("espn", "exact"),
        ("opened_mask", "local"),
        ("beaver", "exact"),
    ],
)
def test_given_the_draws_the_logits_are_the_parties_bit_for_bit(
    protocol, truncation, bits
):
    model, x = everything()
    private = espn.convert(model, x, protocol=protocol, truncation=truncation)
    with crypten.cfg.temp_override({"encoder.precision_bits": bits}):
        parties = run_parties(recorded, world_size=2, args=(private, x))
    replay = Replay([drawn for drawn, _, _ in parties])
    found = explain(private, x, precision_bits=bits, runs=1, draws=replay)
    assert not replay.left
    assert torch.equal(found.logits, parties[0][2])
    integers = (found.logits.double() * 2**bits).round().long()
    assert torch.equal(integers, parties[0][1])
    assert (found.clear - model(x)).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.stem)
def test_bundled_networks_within_the_declared_rounding(path, bits):
    sample = fashion_sample()
    # One image: a truncation fails once in 2**29 values, which a test should not see.
    images = sample.normalization(sample.images[:1])
    private = espn.convert(load_network(path), images, protocol="espn")
    # The parties first: where none may start, nothing is explained in vain.
    with crypten.cfg.temp_override({"encoder.precision_bits": bits}):
        logits, _ = espn.simulate(private, images, timeout=200)
    found = explain(private, images, precision_bits=bits)
    assert (logits - found.logits).abs().max() <= found.rounding
    # The declaration says something: it is small beside the logits.
    assert found.rounding < 0.1 * found.clear.abs().max()
    assert found.overflow is None and found.failure is None


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fast", "high"])
@pytest.mark.parametrize(
    "path", [p for p in BUNDLED if "relu" not in p.stem], ids=lambda path: path.stem
)
def test_the_masked_engine_has_the_same_door(path, precision):
    sample = fashion_sample()
    images = sample.normalization(sample.images[:2])
    private = espn.convert(load_network(path), images)
    found = explain(private, images, precision=precision)
    logits, _ = espn.simulate(private, images, precision=precision, timeout=110)
    assert (logits - found.logits).abs().max() <= found.rounding
    assert found.rounding < 0.1 * found.clear.abs().max()
    assert found.protocol.startswith("masked") and found.overflow is None
    assert len(found.layers) >= 2 and "verdict: fits the ring" in str(found)


def test_each_line_is_what_it_says():
    model, x = everything()
    private = espn.convert(model, x, protocol="espn", truncation="local")
    found = explain(private, x)
    by_name = {layer.layer: layer for layer in found.layers}
    assert set(by_name) >= {"first", "act1", "act2", "line", "last", "output"}
    # The first product is off by its own truncation and the roundings of its operands.
    weight = model.first.weight.detach().abs().sum((1, 2, 3)).max()
    bound = 1 + float(weight) + 0.5 * 18 * float(x.abs().max())
    first = by_name["first"]
    assert 0.5 < first.max_error_units <= bound
    product = first.largest * 2.0**32
    assert abs(first.headroom_bits - (63 - math.log2(product))) < 0.1
    # A polynomial adds at most its form's bound and its truncation's unit.
    form = POLYNOMIAL.ring_form(frac_bits=16, out_bits=35)
    act = by_name["act1"]
    assert 0 < act.added <= form.error_bound + 2.0**-16
    assert act.rounding >= 2 * act.unit
    assert found.failures == pytest.approx(
        sum(layer.failures for layer in found.layers)
    )
    assert 0 < found.failures < 1e-4
    assert found.max_error == found.layers[-1].max_error
    assert found.agreement == 1.0 and found.cure == "none needed"


def test_more_bits_help_until_the_ring_ends():
    model, x = everything()
    local = espn.convert(model, x, protocol="espn", truncation="exact")
    table = compare_precisions(local, x, precision_bits=(8, 12, 16, 30))
    eight, twelve, sixteen, thirty = (found for _, found in table.results)
    assert eight.max_error > 4 * twelve.max_error > 16 * sixteen.max_error
    assert sixteen.failures < 1e-4 < 1 < thirty.failures
    text = str(table)
    assert "first overflow" in text and len(text.splitlines()) == 5
    masked = str(compare_precisions(_plain(x), x))
    assert "fast" in masked and "high" in masked


def _plain(x: torch.Tensor) -> espn.PrivateNetwork:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), espn.PolynomialActivation(POLYNOMIAL), nn.Flatten()
    )
    return espn.convert(model.eval(), x)


def overflowing() -> tuple[Any, torch.Tensor]:
    torch.manual_seed(1)
    model: Any = nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.Conv2d(2, 1, 1, bias=False), nn.Flatten()
    ).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1000.0, 1.0]).view(2, 1, 1, 1))
        model[0].bias.zero_()
        model[1].weight.copy_(torch.tensor([70000.0, 1.0]).view(1, 2, 1, 1))
    x = torch.ones(3, 1, 2, 2)
    x[1, 0, 1, 0] = 40.0
    return model, x


def test_the_first_overflow_is_named_with_layer_element_and_magnitude():
    model, x = overflowing()
    private = espn.convert(model, x, protocol="espn")
    found = explain(private, x)
    fault = found.overflow
    assert fault is not None and fault.kind == "wraps"
    assert fault.layer == "1" and fault.element == (1, 0, 1, 0)
    # 40 * 1000 * 70000 + 40, at twice 16 bits.
    assert fault.value == pytest.approx(2.8e9, rel=1e-4)
    assert fault.headroom_bits == pytest.approx(
        63 - math.log2(2.8e9 * 2.0**32), abs=0.01
    )
    assert "verdict: overflow: 1: wraps at element (1, 0, 1, 0)" in str(found)
    assert "precision_bits" in found.cure
    assert explain(private, x, precision_bits=12).overflow is None
    assert found.max_error > 1e5


def test_an_input_beyond_the_calibration_overflows_the_masked_engine():
    torch.manual_seed(3)
    x = 0.3 * torch.randn(4, 2, 8, 8)
    private = _plain(x)
    near = explain(private, x)
    assert near.overflow is None and near.least_headroom.headroom_bits > 2
    far = x.clone()
    far[2, :, 3, 3] = 3.9 * x.abs().max()
    assert explain(private, far).least_headroom.headroom_bits < 2
    with pytest.raises(RangeError, match="calibrate"):
        explain(private, 12 * far)


def test_failed_truncations_are_counted_and_cured():
    torch.manual_seed(2)
    model: Any = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten()).eval()
    with torch.no_grad():
        model[0].weight.mul_(40)
    x = torch.randn(64, 1, 20, 20)
    private = espn.convert(model, x, protocol="espn")
    found = explain(private, x, precision_bits=26, runs=1)
    layer = found.layers[0]
    assert found.overflow is None and layer.failures > 1
    wrong = (found.logits.double() - found.clear).abs() > 1.0
    # As many as expected, within five standard deviations.
    expected = layer.failures * len(x)
    assert abs(int(wrong.sum()) - expected) < 5 * math.sqrt(expected)
    assert math.isnan(found.rounding) and "two private runs" not in str(found)
    assert found.failure is not None and found.failure.layer == layer.layer
    assert bool(wrong[found.failure.element[0]].any())
    assert "truncations fail per input" in found.verdict
    assert "precision_bits" in found.cure and "seen:" in str(found)


def test_what_is_wrong_is_named():
    model, x = everything()
    private = espn.convert(model, x, protocol="espn")
    with pytest.raises(ShapeError, match="takes"):
        explain(private, x[:, :1])
    with pytest.raises(RangeError, match=r"the input holds .* NaN"):
        explain(private, x * math.nan)
    with pytest.raises(ProtocolError, match="runs=0"):
        explain(private, x, runs=0)
    with pytest.raises(ProtocolError, match="masked engine chooses"):
        explain(_plain(x), x, precision_bits=12)
    with pytest.raises(ConversionError, match="what convert"):
        explain(model, x)
    with torch.no_grad():
        model.last.weight[1, 2, 0, 0] = math.nan
    for protocol in ("espn", None):
        with pytest.raises(ConversionError, match=r"last .*not finite"):
            espn.convert(model, x, protocol=protocol)


def test_a_call_can_be_repeated():
    model, x = everything()
    private = espn.convert(model, x, protocol="espn")
    first, second = explain(private, x), explain(private, x)
    assert torch.equal(first.logits, second.logits) and str(first) == str(second)
    chunked = explain(private, x.repeat(15, 1, 1, 1), runs=2)
    assert isinstance(chunked, Explanation) and len(chunked.logits) == 45
    assert (chunked.clear[3:6] - first.clear).abs().max() < 1e-12


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_weights_are_rounded_to_nearest(bits):
    torch.manual_seed(4)
    weight = torch.randn(1000, requires_grad=True)
    rounded = nearest(weight, frac_bits=bits)
    assert (rounded - weight).abs().max() <= 2.0 ** -(bits + 1)
    encoder = FixedPointEncoder(precision_bits=bits)
    assert torch.equal(encoder.decode(encoder.encode(rounded)), rounded.detach())
    assert rounded.requires_grad and rounded.is_leaf


@pytest.mark.slow
def test_the_command_explains_and_compares(capsys, tmp_path):
    path = DATA / "fashion_resnet_poly.safetensors"
    sample = fashion_sample()
    images = sample.normalization(sample.images[:2]).numpy()
    file = tmp_path / "images.npy"
    np.save(file, images)

    def run(*options):
        status = cli.main(["explain", str(path), "--input", str(file), *options])
        return status, capsys.readouterr()

    status, text = run()
    assert status == 0 and text.out.startswith("masked, activations of")
    status, text = run("--precision-bits", "12")
    assert status == 0 and text.out.startswith("espn, local truncation, 12 bits")
    status, text = run("--protocol", "opened_mask", "--precision-bits", "12", "16")
    assert status == 0 and len(text.out.splitlines()) == 3
    status, text = run("--precision", "fast", "high")
    assert status == 0 and text.out.count("fast") == 1 == text.out.count("high")
    status, text = run("--protocol", "masked", "--precision-bits", "12")
    assert status == 2 and "--precision-bits" in text.err

    model, x = overflowing()
    onnx = tmp_path / "model.onnx"
    onnx.write_bytes(export(model, x))
    np.save(file, x.numpy())
    options = ["explain", str(onnx), "--input", str(file), "--protocol", "espn"]
    assert cli.main(options) == 1
    assert "overflow" in capsys.readouterr().out
    assert issubclass(RangeError, EspnError)
