"""Surgery: what is replaced, what is not, and what an activation computes."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from crypten_espn.errors import ConversionError
from crypten_espn.pillar.networks import mini_onn, resnet32
from crypten_espn.pillar.surgery import (
    PolynomialActivation,
    activations,
    changes,
    replace_activations,
    replace_pooling,
    restore_activations,
)
from crypten_espn.polynomial import Polynomial

RELU = Polynomial((322, 512, 160, 0, -3), 10, (-5.0, 5.0))
OTHER = Polynomial((1, 2, 3), 6, (-1.0, 2.0))


class Functional(nn.Module):
    """Calls its activations and its pool as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.act = nn.ReLU()
        self.tag = "kept"

    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        y = functional.relu(self.conv(x), inplace=True) * scale
        y = functional.max_pool2d(torch.relu(y), 2)
        return self.act(y.relu())


class Reused(nn.Module):
    """One ReLU at two places, as in torchvision's blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.body = nn.Sequential(nn.Linear(4, 4), self.relu, nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x))


class Branching(nn.Module):
    """Cannot be traced: its path depends on the data."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x) if x.sum() > 0 else x


class BranchingWithoutActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x) if x.sum() > 0 else x


class TwoModes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x) if self.training else x


def test_training_clips_and_evaluation_does_not() -> None:
    activation = PolynomialActivation(RELU)
    x = torch.tensor([-100.0, -5.0, -1.0, 0.0, 2.0, 5.0, 7.0])
    clipped = RELU(x.clamp(-5, 5))
    torch.testing.assert_close(activation.train()(x), clipped)
    torch.testing.assert_close(activation.eval()(x), RELU(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "polynomial",
    [RELU, OTHER, Polynomial((5,), 6, (-1, 1)), Polynomial((0, 3), 6, (-1, 1))],
)
def test_gradient_is_the_derivative(polynomial: Polynomial, training: bool) -> None:
    activation = PolynomialActivation(polynomial).train(training)
    x = torch.linspace(-7.03, 7.01, 50, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(activation, x)
    (gradient,) = torch.autograd.grad(activation(x).sum(), x)
    y = x.detach().requires_grad_()
    inside = y.clamp(*polynomial.interval) if training else y
    (expected,) = torch.autograd.grad(polynomial(inside).sum() + 0 * y.sum(), y)
    torch.testing.assert_close(gradient, expected)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(0, 7), min_size=1, max_size=4),
    last=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_and_memory_format(shape: list[int], last: bool, seed: int) -> None:
    x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if last and x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    x = x.transpose(0, -1)
    out = PolynomialActivation(RELU).eval()(x)
    assert out.shape == x.shape
    torch.testing.assert_close(out, RELU(x))


@pytest.mark.parametrize("layout", ["plain", "channels last", "every second"])
def test_large_inputs(layout: str) -> None:
    x = torch.randn(6, 16, 40, 54, generator=torch.Generator().manual_seed(1))
    if layout == "channels last":
        x = x.to(memory_format=torch.channels_last)
    if layout == "every second":
        x = x[:, ::2]
    x = x.mul_(4).requires_grad_()
    activation = PolynomialActivation(RELU).train()
    out = activation(x)
    weights = torch.randn_like(x, memory_format=torch.contiguous_format)
    (gradient,) = torch.autograd.grad((out * weights).sum(), x)
    y = x.detach().requires_grad_()
    plain = RELU(y.clamp(-5, 5))
    (expected,) = torch.autograd.grad((plain * weights).sum(), y)
    torch.testing.assert_close(out, plain)
    torch.testing.assert_close(gradient, expected)


def test_bfloat16_is_evaluated_in_float32() -> None:
    x = torch.linspace(-5, 5, 101).bfloat16()
    out = PolynomialActivation(RELU).eval()(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, RELU(x.float()).bfloat16(), rtol=0, atol=0)


def test_inputs_are_recorded_before_the_clip_and_forgotten_after_backward() -> None:
    activation = PolynomialActivation(RELU).train()
    x = torch.full((3,), 9.0, requires_grad=True)
    activation(x).sum().backward()
    assert activation.take_recorded() == []
    activation(x)
    (recorded,) = activation.take_recorded()
    assert recorded is x
    assert activation.take_recorded() == []
    activation.eval()(x)
    activation.train()(x.detach())
    with torch.no_grad():
        activation(x)
    assert activation.take_recorded() == []


def test_a_network_can_be_copied_between_forward_and_backward() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    replace_activations(model, {nn.ReLU: RELU})
    model(torch.ones(1, 2))
    twin = copy.deepcopy(model)
    assert activations(twin)["1"].take_recorded() == []
    assert len(activations(model)["1"].take_recorded()) == 1


def test_every_relu_of_a_network_is_replaced_and_restored() -> None:
    model = resnet32()
    before = {name for name, m in model.named_modules() if isinstance(m, nn.ReLU)}
    assert replace_activations(model, {nn.ReLU: RELU}) is model
    assert set(activations(model)) == before
    assert not any(isinstance(m, nn.ReLU) for m in model.modules())
    assert len(changes(model)) == 31
    assert str(changes(model)).splitlines()[0] == "31 replaced"
    restore_activations(model)
    assert {n for n, m in model.named_modules() if isinstance(m, nn.ReLU)} == before
    assert len(changes(model)) == 62


def test_state_dict_is_the_same_after_surgery() -> None:
    model = mini_onn()
    before = list(model.state_dict())
    replace_pooling(replace_activations(model, {nn.ReLU: RELU}))
    assert list(model.state_dict()) == before


def test_one_relu_at_two_places_stays_one() -> None:
    model = Reused()
    replace_activations(model, {nn.ReLU: RELU})
    assert model.relu is model.body[1]
    assert isinstance(model.relu, PolynomialActivation)
    model.train()(torch.ones(1, 4))
    assert len(model.relu.take_recorded()) == 2


def test_functions_are_found_by_tracing() -> None:
    plain = Functional().eval()
    x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(2))
    y = RELU(plain.conv(x)) * 3.0
    expected = RELU(RELU(functional.avg_pool2d(RELU(y), 2)))
    model = replace_pooling(replace_activations(plain, {nn.ReLU: RELU}))
    torch.testing.assert_close(model(x, 3.0), expected)
    assert model.tag == "kept"
    assert not model.training
    assert len(activations(model)) == 4
    assert "relu()" in str(changes(model)) and "max_pool2d()" in str(changes(model))


def test_functions_inside_a_block_leave_the_network_its_class() -> None:
    model = nn.Sequential(Functional(), nn.Flatten())
    assert replace_activations(model, {nn.ReLU: RELU}) is model
    assert "0.relu" in {change.name for change in changes(model)}


@pytest.mark.parametrize("module", [Branching(), TwoModes()])
def test_a_function_that_cannot_be_traced_is_an_error(module: nn.Module) -> None:
    name = type(module).__name__
    with pytest.raises(ConversionError, match=f"1 \\({name}\\).*call a module instead"):
        replace_activations(nn.Sequential(nn.ReLU(), module), {nn.ReLU: RELU})


def test_an_untraceable_forward_without_functions_is_fine() -> None:
    model = replace_activations(BranchingWithoutActivation(), {nn.ReLU: RELU})
    assert isinstance(model.act, PolynomialActivation)


def test_names_are_preferred_over_types_and_select_narrows() -> None:
    model = nn.Sequential(nn.ReLU(), nn.ReLU(), nn.Tanh(), nn.ReLU())
    replace_activations(
        model, {nn.ReLU: RELU, "[12]": OTHER}, select=lambda name: name != "3"
    )
    assert [type(m).__name__ for m in model] == [
        "PolynomialActivation",
        "PolynomialActivation",
        "PolynomialActivation",
        "ReLU",
    ]
    assert model[0].polynomial == RELU
    assert model[1].polynomial == model[2].polynomial == OTHER
    # A second time: another polynomial for what is polynomial already.
    replace_activations(model, {"0": OTHER})
    assert model[0].polynomial == OTHER
    restore_activations(model)
    assert [type(m).__name__ for m in model] == ["ReLU", "ReLU", "Tanh", "ReLU"]


def test_a_function_is_a_key() -> None:
    class Swish(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return functional.silu(x) + functional.relu(x)

    model = replace_activations(Swish(), {functional.silu: OTHER})
    x = torch.linspace(-1, 1, 5)
    torch.testing.assert_close(model.eval()(x), OTHER(x) + x.relu())


@pytest.mark.parametrize(
    ("mapping", "named"),
    [
        ({nn.ReLU: 3}, "int for"),
        ({3: RELU}, "key 3"),
        ({"layer9.*": RELU}, "layer9"),
    ],
)
def test_bad_mappings_are_named(mapping: dict, named: str) -> None:
    with pytest.raises(ConversionError, match=named):
        replace_activations(nn.Sequential(nn.ReLU()), mapping)


def test_pools_keep_their_geometry() -> None:
    model = nn.Sequential(
        nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True),
        nn.MaxPool2d(2),
        nn.AdaptiveMaxPool2d((3, 2)),
    )
    shape = model(torch.zeros(1, 2, 30, 31)).shape
    replace_pooling(model)
    assert model(torch.zeros(1, 2, 30, 31)).shape == shape
    assert [type(m).__name__ for m in model] == [
        "AvgPool2d",
        "AvgPool2d",
        "AdaptiveAvgPool2d",
    ]


@pytest.mark.parametrize(
    "pool", [nn.MaxPool2d(2, dilation=2), nn.MaxPool2d(2, return_indices=True)]
)
def test_pools_without_an_average_twin_are_an_error(pool: nn.Module) -> None:
    with pytest.raises(ConversionError, match="no average twin"):
        replace_pooling(nn.Sequential(pool))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["resnet18", "googlenet", "inception_v3", "densenet121"]
)
def test_torchvision_networks_lose_every_relu_and_max_pool(name: str) -> None:
    import torchvision

    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = getattr(torchvision.models, name)(**options).eval()
    model = replace_pooling(replace_activations(model, {nn.ReLU: RELU}))
    size = 299 if name == "inception_v3" else 64
    kinds: set[str] = set()

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            kinds.add(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    with Spy(), torch.no_grad():
        model(torch.zeros(1, 3, size, size))
    assert "_Evaluate" not in kinds
    assert not {k for k in kinds if "relu" in k or "max_pool" in k}


@pytest.mark.parametrize("training", [True, False])
def test_onnx_keeps_the_polynomial_whole(training: bool, tmp_path: Path) -> None:
    model = replace_activations(
        nn.Sequential(nn.Linear(3, 4), nn.ReLU()), {nn.ReLU: RELU}
    ).train(training)
    mode = torch.onnx.TrainingMode.PRESERVE
    path = tmp_path / "network.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (torch.zeros(2, 3),),
            path,
            dynamo=False,
            training=mode,
            custom_opsets={"crypten_espn": 1},
        )
    graph = onnx.load(path).graph
    (node,) = [n for n in graph.node if n.op_type == "PolynomialActivation"]
    assert node.domain == "crypten_espn"
    fields = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert fields == {
        "numerators": list(RELU.numerators),
        "frac_bits": 10,
        "interval": [-5.0, 5.0],
        "requested_degree": 4,
    }
    assert "Clip" not in {n.op_type for n in graph.node}
