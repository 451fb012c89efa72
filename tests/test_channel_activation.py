"""PolynomialActivation with a polynomial a channel: torch, ONNX, conversion."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import crypten_espn as espn
from crypten_espn.errors import CheckpointError, ConversionError, PolynomialError
from crypten_espn.estimate.engines import engine_costs
from crypten_espn.estimate.workload import workload
from crypten_espn.graph import export, read
from crypten_espn.nn import PolynomialActivation as EncryptedActivation
from crypten_espn.pillar import elementwise
from crypten_espn.pillar.networks import mini_onn
from crypten_espn.pillar.storage import load_network, save_network
from crypten_espn.pillar.surgery import (
    PolynomialActivation,
    activations,
    replace_activations,
)
from crypten_espn.polynomial import ChannelPolynomials, Polynomial

QUARTIC = Polynomial((322, 512, 160, 0, -3), 10, (-5.0, 5.0))


def of(channels: int) -> ChannelPolynomials:
    """Degrees, units and intervals that differ by channel."""
    kinds = (
        QUARTIC,
        Polynomial(QUARTIC.numerators, 10, (-0.6, 0.3), exponent=-3),
        Polynomial((3, 7), 6, (-1.7, 9.1)),
        Polynomial((5,), 3, (-2.0, 2.0)),
    )
    return ChannelPolynomials(tuple(kinds[c % 4] for c in range(channels)))


def by_channel(polynomials: ChannelPolynomials, x: Tensor, *, clip: bool) -> Tensor:
    """Each channel by the module of its own polynomial."""
    y = torch.empty_like(x)
    for c, row in enumerate(polynomials.rows[:4]):
        module = PolynomialActivation(row).train(clip)
        y[:, c::4] = module(x[:, c::4])
    return y


SHAPES = [
    (3, 4),
    (5, 3, 7),
    (2, 5, 3, 2),
    (2, 4, 16, 9),
    (1, 600, 2, 2),
    (2, 1, 4, 4),
    (3, 1100),
    (0, 4, 5, 5),
    (2, 3, 0),
    (2, 2, 3, 4, 2),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_channel_is_what_its_own_module_gives(
    shape: tuple[int, ...], last: bool, training: bool, dtype: torch.dtype
) -> None:
    x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    x = x.to(dtype)
    if last and x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    polynomials = of(shape[1])
    module = PolynomialActivation(polynomials).train(training)
    here, there = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = module(here), by_channel(polynomials, there, clip=training)
    assert y.dtype == dtype
    # The order of operations is the same; only a fused product may differ.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float64: 0.0}[dtype]
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    (got,) = torch.autograd.grad(y.sum(), here)
    (wanted,) = torch.autograd.grad(expected.sum(), there)
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("training", [True, False])
def test_gradient_by_differences(training: bool) -> None:
    module = PolynomialActivation(of(4)).train(training)
    x = torch.linspace(-7.03, 7.01, 48, dtype=torch.float64).view(2, 4, 6)
    assert torch.autograd.gradcheck(module, x.requires_grad_())


def test_layouts_that_loops_cannot_read_give_the_same() -> None:
    x = torch.randn(3, 4, 20, 18)
    module = PolynomialActivation(of(4)).eval()
    whole = module(x)
    for part in (x[:, :, ::2], x.transpose(2, 3), x[1:]):
        torch.testing.assert_close(module(part.clone()), module(part))
    torch.testing.assert_close(module(x[:, :, ::2]), whole[:, :, ::2])
    assert module(x.to("meta")).shape == x.shape


@pytest.mark.parametrize("training", [True, False])
def test_in_place_overwrites_the_input(training: bool) -> None:
    x = torch.randn(2, 4, 3, 3)
    expected = PolynomialActivation(of(4)).train(training)(x)
    module = PolynomialActivation(of(4), inplace=True).train(training)
    y = x.clone().requires_grad_() * 1
    assert module(y) is y
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(module(z := x.clone()), expected)
    torch.testing.assert_close(z, expected)


@pytest.mark.parametrize("shape", [(2, 3), (2, 5, 4, 4), (4,), ()])
def test_another_number_of_channels_is_refused(shape: tuple[int, ...]) -> None:
    module = PolynomialActivation(of(4))
    for mode in (True, False):
        with pytest.raises(PolynomialError, match="polynomials of 4 channels"):
            module.train(mode)(torch.zeros(shape))


def test_what_is_printed_copied_and_pickled() -> None:
    module = PolynomialActivation(of(4), inplace=True)
    assert "4 channels on radii 0.6 to 9.1, degree 4, inplace=True" in repr(module)
    assert copy.deepcopy(module).polynomial == of(4)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=False).polynomial == of(4)


@pytest.mark.parametrize("reentrant", [False])
def test_a_checkpoint_records_what_the_module_does(reentrant: bool) -> None:
    module = PolynomialActivation(of(3)).train()
    x = torch.randn(2, 3, 4, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=reentrant)
    assert len(module.take_recorded()) == 1
    (got,) = torch.autograd.grad(y.sum(), x)
    (wanted,) = torch.autograd.grad(by_channel(of(3), x, clip=True).sum(), x)
    torch.testing.assert_close(got, wanted)


# -- ONNX and conversion


def network(polynomials: espn.Polynomial | ChannelPolynomials) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        PolynomialActivation(polynomials),
        nn.Flatten(),
        nn.Linear(4 * 9, 3),
        PolynomialActivation(of(3)),
        nn.Linear(3, 2),
    ).eval()


X = torch.randn(2, 2, 5, 5, generator=torch.Generator().manual_seed(0))


def polynomials_in(source: nn.Module | bytes) -> list[object]:
    nodes = [n for n in read(source, X).nodes if n.op == "PolynomialActivation"]
    return [EncryptedActivation.from_onnx(n.attributes).polynomial for n in nodes]


@pytest.mark.parametrize("exponent", [0, -2])
def test_an_export_keeps_polynomials_to_the_last_bit(exponent: int) -> None:
    thirds = Polynomial((1, 2, 3), 10, (-1 / 3, 2 / 3), exponent=3)
    rows = ChannelPolynomials((QUARTIC, thirds, *of(2).rows))
    assert polynomials_in(export(network(rows), X)) == [rows, of(3)]
    one = Polynomial((1, 2, 3), 10, (-1.5, 2.0), 3, exponent=exponent)
    assert polynomials_in(export(network(one), X)) == [one, of(3)]


def test_a_file_with_one_polynomials_fields_still_reads() -> None:
    model = onnx.load_model_from_string(export(network(QUARTIC), X))
    node = next(n for n in model.graph.node if n.op_type == "PolynomialActivation")
    names = {a.name for a in node.attribute}
    assert names == {"numerators", "frac_bits", "interval", "requested_degree"}
    assert polynomials_in(model.SerializeToString())[0] == QUARTIC


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"polynomial": b"{}"}, "not a stored polynomial"),
        ({"polynomial": b"\xff"}, "no text"),
        ({"polynomial": 3}, "not a stored polynomial"),
        ({"polynomial": of(2).to_json().encode(), "frac_bits": 3}, "also frac_bits"),
        ({"polynomial": b'{"channels": []}'}, "0 polynomials"),
        ({"numerators": 3, "frac_bits": 3, "interval": [0.0, 1.0]}, "no list"),
        ({"numerators": [3], "frac_bits": [3], "interval": [0.0, 1.0]}, "two whole"),
        ({"numerators": [3], "frac_bits": 3.5, "interval": [0.0, 1.0]}, "two whole"),
        ({"numerators": [3], "frac_bits": 3, "interval": [b"x"]}, "finite numbers"),
        ({"numerators": [0.5], "frac_bits": 3, "interval": [0.0, 1.0]}, "Python int"),
    ],
)
def test_attributes_that_are_no_polynomial_are_refused(
    attributes: dict[str, object], message: str
) -> None:
    with pytest.raises(PolynomialError, match=message):
        EncryptedActivation.from_onnx(attributes)


def test_channels_of_a_value_of_unknown_shape_are_not_guessed() -> None:
    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.activation = PolynomialActivation(of(2))

        def forward(self, x: Tensor) -> Tensor:
            # No operation of ONNX, so its shape is not known there.
            return self.activation(nn.functional.adaptive_max_pool2d(x, (2, 3)))

    report = espn.check(Unknown(), X)
    words = {f.operation: f.cure for f in report.findings}
    assert words["PolynomialActivation"] == "the shape of its input is not known"


def test_two_parties_compute_what_torch_does() -> None:
    model = network(of(4))
    private = espn.convert(model, X, protocol="espn", truncation="exact")
    y, _ = espn.simulate(private, X)
    torch.testing.assert_close(y, model(X), rtol=0, atol=0.02)


def test_other_channels_in_a_file_are_named_by_check_and_convert() -> None:
    model = onnx.load_model_from_string(export(network(of(4)), X))
    node = next(n for n in model.graph.node if n.op_type == "PolynomialActivation")
    node.attribute[0].s = of(5).to_json().encode()
    wrong = model.SerializeToString()
    report = espn.check(wrong, X)
    assert not report.ok
    (finding,) = (f for f in report.findings if f.blocking)
    assert "polynomials of 5 channels" in finding.cure
    assert "(2, 4, 3, 3)" in finding.cure
    with pytest.raises(ConversionError, match="polynomials of 5 channels"):
        espn.convert(wrong, X, protocol="espn")


# -- files and surgery


def test_a_network_file_keeps_them(tmp_path: Path) -> None:
    model = replace_activations(
        mini_onn(classes=3, in_channels=1, size=8),
        {"*": QUARTIC},
    )
    first, *_, last = activations(model)
    replace_activations(model, {first: of(64), last: of(16)})
    save_network(model, tmp_path / "n.safetensors")
    loaded = load_network(tmp_path / "n.safetensors")
    found = activations(loaded)
    assert found[first].polynomial == of(64) and found[last].polynomial == of(16)
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(loaded(x), model.eval()(x))


def test_a_network_file_with_other_channels_is_refused(tmp_path: Path) -> None:
    model = replace_activations(
        mini_onn(classes=3, in_channels=1, size=8), {nn.ReLU: of(64)}
    )
    save_network(model, tmp_path / "n.safetensors")
    with pytest.raises(CheckpointError, match="polynomials of 64 channels"):
        load_network(tmp_path / "n.safetensors")


def test_an_estimate_counts_the_largest_degree(tmp_path: Path) -> None:
    rows = (Polynomial((0, 3), 6, (-1.0, 1.0)),) * 63
    mixed = ChannelPolynomials((*rows, QUARTIC))
    model = replace_activations(
        mini_onn(classes=3, in_channels=1, size=8), {nn.ReLU: QUARTIC}
    )
    costs = []
    for name, polynomial in (("one", QUARTIC), ("mixed", mixed)):
        replace_activations(model, {next(iter(activations(model))): polynomial})
        save_network(model, tmp_path / f"{name}.safetensors")
        work = workload(str(tmp_path / f"{name}.safetensors"))
        # Conversion may scale channels; it keeps their degrees.
        found = work.nonlinear[0].polynomial
        assert found is not None and found.degree == polynomial.degree
        assert [r.degree for r in found.rows] == [r.degree for r in polynomial.rows]
        costs.append({c.engine: c for c in engine_costs(work)}["espn"])
    assert costs[0].traffic == costs[1].traffic
    assert costs[0].stored == costs[1].stored


def test_numbers_of_channels_in_tables() -> None:
    x = torch.randn(2, 3, 5)
    with pytest.raises(ValueError, match="broadcast"):
        elementwise.polynomial(x, [np.ones(3), np.ones(2)], None)
