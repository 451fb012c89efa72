"""Surgery keeps the network: what a module was, it still is, or it is refused."""

# torch.nn.Module types every attribute as Tensor | Module.
# mypy: disable-error-code="operator,index,union-attr,assignment,method-assign"

from __future__ import annotations

import copy
import functools
import pickle
import types
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from crypten_espn.errors import ConversionError
from crypten_espn.graph import export
from crypten_espn.pillar.surgery import (
    Key,
    activations,
    changes,
    replace_activations,
    replace_pooling,
    restore_activations,
)
from crypten_espn.polynomial import Polynomial

P = Polynomial((322, 512, 160, 0, -3), 10, (-5.0, 5.0))
RELU: dict[Key, Polynomial] = {nn.ReLU: P}


def inputs() -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(3))


class Base(nn.Module):
    """Two layers, and much that a tracer does not see."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 7)
        self.register_buffer("shift", torch.ones(4))
        self._private = {"kept": 1}
        self.scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.b(functional.relu(self.a(x)) * self.scale + self.shift * 2)

    def logits(self, x: Tensor) -> Tensor:
        return self.head(self(x))


class Features(Base):
    def features(self, x: Tensor) -> Tensor:
        return functional.relu(self.a(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.features(x))


class Statement(Base):
    """Changes h in place, in one of many ways, and goes on with h."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.how == "function":
            functional.relu(h, inplace=True)
        elif self.how == "by position":
            functional.relu(h, True)
        elif self.how == "underscore":
            functional.relu_(h)
        elif self.how == "torch":
            torch.relu_(h)
        elif self.how == "method":
            h.relu_()
        elif self.how == "module":
            self.act(h)
        elif self.how == "part":
            functional.relu(h[:, :2], inplace=True)
            functional.relu(h[:, 2:], inplace=True)
        elif self.how == "result and input":
            h = (functional.relu(h, inplace=True) + h) / 2
        elif self.how == "child":
            h = self.b(h) * 0 + h if self.act(h) is None else h
        return self.b(h)


WAYS = (
    "function",
    "by position",
    "underscore",
    "torch",
    "method",
    "module",
    "part",
    "result and input",
    "child",
)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("how", WAYS)
def test_an_activation_in_place_stays_in_place(how, training):
    model = Statement(how).train(training)
    x = inputs()
    h = model.a(x)
    expected = model.b(P(h.clamp(-5, 5) if training else h))
    gradients = torch.autograd.grad(expected.sum(), list(model.a.parameters()))
    assert replace_activations(model, RELU) is model
    out = model(x)
    torch.testing.assert_close(out, expected)
    got = torch.autograd.grad(out.sum(), list(model.a.parameters()))
    torch.testing.assert_close(got, gradients)


def test_an_activation_in_place_that_mutates_a_residual_still_does():
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            y = x * 1
            return self.block(y) + y

    model = replace_activations(Residual().eval(), RELU)
    x = inputs()
    torch.testing.assert_close(model(x), model.block[1](P(x)) + P(x))


def test_inputs_changed_in_place_are_recorded_as_they_were():
    model = replace_activations(Statement("function").train(), RELU)
    x = inputs()
    out = model(x)
    (recorded,) = activations(model)["relu_module"].take_recorded()
    torch.testing.assert_close(recorded, model.a(x))
    out.sum().backward()
    model(x).sum().backward()
    assert activations(model)["relu_module"].take_recorded() == []


def test_the_module_keeps_class_state_hooks_and_methods():
    model = Base().eval()
    keys, x = list(model.state_dict()), inputs()
    calls: list[str] = []
    model.register_forward_pre_hook(lambda *_: calls.append("before"))
    handle = model.register_forward_hook(lambda *_: calls.append("after"))
    model.register_full_backward_hook(lambda *_: calls.append("back"))
    assert replace_activations(model, RELU) is model
    assert type(model) is Base and list(model.state_dict()) == keys
    assert model._private == {"kept": 1} and model.head.out_features == 7
    h = P(model.a(x)) * 2 + 2
    torch.testing.assert_close(model(x), model.b(h))
    torch.testing.assert_close(model.logits(x), model.head(model.b(h)))
    model(x.requires_grad_()).sum().backward()
    handle.remove()
    model(x)
    assert calls.count("after") == 3 and calls.count("before") == 4
    assert calls.count("back") == 1
    model.shift.fill_(0)
    torch.testing.assert_close(model(x), model.b(P(model.a(x)) * 2))
    model.load_state_dict(Base().state_dict())
    torch.testing.assert_close(model(x), model.b(h))


def test_a_copy_and_a_pickle_are_networks_of_their_own():
    model = replace_pooling(replace_activations(Base().eval(), RELU))
    x = inputs()
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x), expected)
        twin.b.weight.data.zero_()
        assert not torch.allclose(twin(x), expected)
        torch.testing.assert_close(model(x), expected)


def test_hooks_and_attributes_of_what_is_replaced_move_on():
    model = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)).eval()
    calls: list[nn.Module] = []
    model[0].register_forward_hook(lambda module, *_: calls.append(module))
    handle = model[1].register_forward_hook(lambda module, *_: calls.append(module))
    model[0].tag = "mine"
    replace_pooling(replace_activations(model, RELU))
    model(torch.zeros(1, 1, 4, 4))
    assert [type(m).__name__ for m in calls] == ["PolynomialActivation", "AvgPool2d"]
    assert model[0].tag == "mine"
    handle.remove()
    model(torch.zeros(1, 1, 4, 4))
    assert len(calls) == 3


def test_a_method_through_which_forward_goes_is_changed_with_it():
    model = replace_activations(Features().eval(), RELU)
    x = inputs()
    torch.testing.assert_close(model(x), model.b(P(model.a(x))))
    torch.testing.assert_close(model.features(x), P(model.a(x)))
    assert len(activations(model)) == 2  # act, and the call

    class Twice(Features):
        def forward(self, x: Tensor) -> Tensor:
            return self.features(self.features(x))

    model = replace_activations(Twice().eval(), RELU)
    torch.testing.assert_close(model(x), P(model.a(P(model.a(x)))))
    with pytest.raises(ConversionError, match=r"Twice\.features.*exactly once"):
        model.features(x)


def test_modes_are_kept_module_by_module():
    model = nn.Sequential(nn.BatchNorm1d(4), Base()).train()
    model[0].eval()
    model[1].a.eval()
    before = {name: module.training for name, module in model.named_modules()}
    replace_activations(model, RELU)
    after = {name: module.training for name, module in model.named_modules()}
    assert {name: after[name] for name in before} == before


def test_modules_held_beside_the_children_are_replaced_too():
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.act = nn.ReLU(inplace=True)
            self.acts = [self.act, nn.ReLU()]
            self.named = {"one": self.act}

        def forward(self, x: Tensor) -> Tensor:
            return self.acts[1](self.b(self.acts[0](self.a(x))))

    model = replace_activations(Plain().eval(), RELU)
    x = inputs()
    torch.testing.assert_close(model(x), P(model.b(P(model.a(x)))))
    assert model.named["one"] is model.acts[0] is model.act

    model = Base()
    model.acts = (nn.ReLU(),)
    with pytest.raises(ConversionError, match=r"acts\.0 \(ReLU\).*tuple"):
        replace_activations(model, RELU)


class SetsState(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.h = functional.relu(self.a(x))
        return self.b(self.h)


class Counts(Base):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.log: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.log.append(1)
        return functional.relu(self.a(x))


class WithoutGradient(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.a(x)
        return self.b(functional.relu(h))


class Noise(Base):
    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.a(x)) + torch.randn(4)


class Optional(Base):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = functional.relu(self.a(x))
        return h if mask is None else h * mask


class Dropped(Base):
    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(functional.relu(self.a(x)), training=self.training)


class WritesOut(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        torch.sigmoid(h, out=h)
        return h


class PoolKept(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.h = functional.max_pool2d(x, 2)
        return self.h


@pytest.mark.parametrize(
    ("module", "lost"),
    [
        (SetsState(), "sets self.h"),
        (Counts(), "sets self.calls.*|sets self.log.*"),
        (WithoutGradient(), "under torch.no_grad"),
        (Noise(), "random numbers"),
        (Optional(), "without mask"),
        (Dropped(), "in training and in evaluation"),
        (WritesOut(), "writes to out="),
        (PoolKept(), "sets self.h"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_would_be_lost_is_listed_and_nothing_is_changed(module, lost):
    model = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), module)
    before = copy.deepcopy(vars(module))
    with pytest.raises(ConversionError, match=lost):
        if isinstance(module, PoolKept):
            replace_pooling(model)
        else:
            replace_activations(model, {**RELU, nn.Sigmoid: P})
    assert [type(m) for m in model][:2] == [nn.ReLU, nn.MaxPool2d]
    assert vars(module).keys() == before.keys() and not changes(model)
    if isinstance(module, Counts):
        assert module.calls == 0 and module.log == []


def test_an_optional_argument_that_only_passes_through_is_fine():
    class Through(Base):
        def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
            return functional.relu(functional.linear(x, self.a.weight, bias))

    model = replace_activations(Through().eval(), RELU)
    x, bias = inputs(), torch.ones(4)
    torch.testing.assert_close(model(x), P(x @ model.a.weight.T))
    torch.testing.assert_close(model(x, bias=bias), P(x @ model.a.weight.T + bias))


def test_an_attribute_that_went_into_the_graph_may_not_change_unseen():
    model = replace_activations(Base().eval(), RELU)
    model.scale = 3.0
    with pytest.raises(ConversionError, match=r"Base\.scale was 2\.0 .* is 3\.0"):
        model(inputs())
    model.scale = 2.0
    model.epoch = 7
    assert model(inputs()).shape == (3, 4)


def test_a_forward_set_on_the_instance_is_the_one_that_is_changed():
    def other(self: Any, x: Tensor) -> Tensor:
        return functional.relu(self.b(x))

    x = inputs()
    model = Base().eval()
    model.forward = types.MethodType(other, model)
    replace_activations(model, RELU)
    torch.testing.assert_close(model(x), P(model.b(x)))
    model = Base().eval()
    model.forward = functools.partial(Base.forward, model)
    with pytest.raises(ConversionError, match="instance by a partial"):
        replace_activations(model, RELU)


def test_calls_come_back_as_the_functions_they_were():
    class Calls(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = functional.leaky_relu(x * 1, 0.3, inplace=True)
            return torch.sigmoid(y).tanh_() + functional.softsign(y)

    model, x = Calls().eval(), inputs()
    expected = model(x)
    mapping: dict[Any, Any] = {kind: P for kind in (nn.LeakyReLU, nn.Sigmoid, nn.Tanh)}
    mapping[functional.softsign] = P
    replace_activations(model, mapping)
    torch.testing.assert_close(model(x), P(P(P(x))) + P(P(x)))
    torch.testing.assert_close(restore_activations(model)(x), expected)
    replace_activations(model, {nn.LeakyReLU: P})
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x))


def test_a_call_whose_result_nobody_uses_is_left_alone():
    class Idle(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            functional.relu(x)
            functional.max_pool2d(x, 2)
            return functional.relu(x + 1)

    model = replace_pooling(replace_activations(Idle().eval(), RELU))
    assert [change.before for change in changes(model)] == ["relu()"]
    x = torch.randn(1, 1, 4, 4)
    torch.testing.assert_close(model(x), P(x + 1))


class CallsSilu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.silu(x)


@pytest.mark.parametrize("silu", [nn.SiLU(), CallsSilu()])
def test_a_mapping_that_matches_nothing_names_what_is_there(silu):
    model = nn.Sequential(nn.Linear(4, 4), silu)
    with pytest.raises(ConversionError, match=r"SiLU at 1.*\{torch\.nn\.SiLU: poly"):
        replace_activations(model, {nn.Sigmoid: P})
    with pytest.raises(ConversionError, match="no activation that is known"):
        replace_activations(nn.Linear(4, 4), RELU)
    with pytest.raises(ConversionError, match="select is false"):
        replace_activations(model, {nn.SiLU: P, nn.ReLU: P}, select=lambda name: False)
    # Done already is not nothing found.
    done = replace_activations(nn.Sequential(nn.ReLU()), RELU)
    assert len(changes(replace_activations(done, RELU))) == 1


def test_a_scripted_network_is_refused_by_name():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.Sequential(nn.ReLU()))
    with pytest.raises(ConversionError, match="TorchScript"):
        replace_activations(scripted, RELU)


def test_an_export_refuses_a_change_in_place_that_it_would_lose():
    model = replace_activations(Statement("part").eval(), RELU)
    with pytest.raises(ConversionError, match="part of a tensor in place"):
        export(model, inputs())
    model = replace_activations(Statement("function").eval(), RELU)
    assert b"PolynomialActivation" in export(model, inputs())
