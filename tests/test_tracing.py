"""What a trace cannot hold is refused with its line; the network stays as it was."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import crypten_espn as espn
from crypten_espn.errors import ConversionError
from crypten_espn.graph import export
from tests.conversion_cases import (
    Function,
    assert_right,
    image,
    refusal,
    vector,
)


def test_a_branch_on_the_data_is_refused_with_its_line():
    def branching(x, a, b):
        return a(x) if x.sum() > 0 else b(x)

    model = Function(branching, nn.Linear(6, 3), nn.Linear(6, 3))
    line = branching.__code__.co_firstlineno + 1
    with pytest.raises(ConversionError, match=rf"test_tracing\.py, line {line}"):
        espn.check(model, vector())
    for leak in (lambda x: x * x.max().item(), lambda x: x + float(x[0, 0])):
        with pytest.raises(ConversionError, match="depends on the input"):
            espn.check(Function(leak), vector())


def test_branches_on_shapes_and_weights_are_harmless():
    def branching(x, a):
        if x.shape[1] > 3 and x.size(0) > 0 and a.weight.abs().sum() > 0:
            return a(x).view(int(x.size(0)), -1)
        return x

    assert_right(Function(branching, nn.Linear(6, 3)), vector())


def test_what_hangs_on_the_batch_size_is_refused():
    fc = nn.Linear(6, 3)
    branch = Function(lambda x, a: a(x) if x.size(0) > 7 else 2 * a(x), fc)
    with pytest.raises(ConversionError, match="branch on the batch size"):
        espn.check(branch, vector())
    found = refusal(Function(lambda x, a: a(x) / x.size(0), fc), vector())
    assert "off by" in found


def test_values_outside_the_trace_are_not_frozen():
    model = Function(lambda x, a: a(x.data) + a(x.detach()), nn.Linear(6, 3))
    assert_right(model, vector())


def test_tracing_leaves_the_network_as_it_was(capfd):
    calls = []

    class Counting(nn.Module):
        seen: torch.Tensor

        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
            self.register_buffer("seen", torch.zeros(()))
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            self.seen.add_(1)
            self.last = x
            return self.body(x.mul_(1.0))

    model = Counting().train()
    model.body[1].eval()
    model.register_forward_hook(lambda *given: calls.append(1))
    state, x = copy.deepcopy(model.state_dict()), image()
    kept, seed = x.clone(), torch.random.get_rng_state()
    espn.check(model, x)
    assert [m.training for m in model.modules()] == [True, True, True, False]
    assert model.calls == 0 and not hasattr(model, "last") and calls
    assert torch.equal(x, kept) and torch.equal(torch.random.get_rng_state(), seed)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    assert len(model._forward_hooks) == 1
    with pytest.raises(ConversionError):
        export(Function(lambda x: torch.ones(2) @ torch.ones(3)), x)
    espn.check(Function(torch.special.i0), x)
    assert capfd.readouterr() == ("", "")


class _Returns(nn.Module):
    """A network whose result stands in a container."""

    def __init__(self, contain: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.contain = contain

    def forward(self, x: torch.Tensor) -> Any:
        return self.contain(self.head(x))


@pytest.mark.parametrize("contain", [lambda y: (y,), lambda y: {"logits": [y]}])
def test_one_tensor_in_a_container_is_compared_and_converted(contain):
    network, x = _Returns(contain).eval(), torch.randn(2, 4)
    found = espn.check(network, x)
    assert found.ok and found.masked is None
    logits, _ = espn.simulate(espn.convert(network, x), x)
    torch.testing.assert_close(logits, network.head(x).detach(), atol=1e-2, rtol=0)


def test_several_results_are_refused_by_name():
    with pytest.raises(ConversionError, match="one tensor"):
        espn.check(_Returns(lambda y: {"a": y, "b": y}).eval(), torch.randn(2, 4))


@pytest.mark.parametrize("script", [torch.jit.script, None])
def test_torchscript_modules_are_converted_and_left_alone(script):
    plain, x = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).eval(), torch.randn(2, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = script(plain) if script else torch.jit.trace(plain, x)
    before = {name: p.clone() for name, p in network.named_parameters()}
    assert espn.check(network, x).ok
    logits, _ = espn.simulate(espn.convert(network, x), x)
    torch.testing.assert_close(logits, plain(x).detach(), atol=1e-2, rtol=0)
    assert all(torch.equal(p, before[n]) for n, p in network.named_parameters())
