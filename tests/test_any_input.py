"""Every entry point takes real numbers of any kind, or refuses them by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import crypten_espn as espn
from crypten_espn.errors import DataError, EspnError, PlanError, RangeError, ShapeError
from crypten_espn.masked.planning import masked_model

SQUARE = espn.Polynomial((322, 512, 160, 0, -3), 10, (-5.0, 5.0))


def small_network() -> nn.Module:
    torch.manual_seed(3)
    layers = (nn.Conv2d(2, 3, 3), espn.PolynomialActivation(SQUARE), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(3 * 2 * 2, 4)).eval()


NETWORK = small_network()
# Halves, so that every type but the integers holds them exactly.
X = torch.tensor([[-1.0, 0.5, 1.5, 2.0]]).repeat(2, 8).reshape(2, 2, 4, 4)
KINDS: dict[str, Any] = {
    "float64": X.double(),
    "float16": X.half(),
    "bfloat16": X.bfloat16(),
    "int64": X.long(),
    "uint8": X.abs().byte(),
    "bool": X > 0,
    "with a gradient": X.clone().requires_grad_(),
    "numpy float32": X.numpy(),
    "numpy float64": X.double().numpy(),
    "numpy float16": X.half().numpy(),
    "numpy uint8": X.abs().byte().numpy(),
    "numpy reversed": X.numpy()[..., ::-1],
    "numpy read-only": np.broadcast_to(X.numpy()[:1], X.shape),
    "nested lists": X.tolist(),
}
NO_INPUTS: dict[str, tuple[Any, type[EspnError], str]] = {
    "complex": (X + 0j, DataError, "complex"),
    "numpy complex": (X.numpy() + 0j, DataError, "complex"),
    "sparse": (X.to_sparse(), DataError, "sparse"),
    "PIL image": (Image.new("RGB", (4, 4)), DataError, "PIL image"),
    "text": ("cat.npy", DataError, "is a str"),
    "nothing": (None, DataError, "NoneType"),
    "objects": (np.array([None]), DataError, "objects"),
    "NaN": (X * float("nan"), RangeError, "NaN"),
    "numpy NaN": (X.numpy() * np.nan, RangeError, "NaN"),
}


@functools.cache
def converted(protocol: str | None = None) -> espn.PrivateNetwork:
    return espn.convert(NETWORK, X, protocol=protocol)


ENTRIES: dict[str, Callable[[Any], Any]] = {
    "simulate": lambda x: espn.simulate(converted(), x)[0],
    "explain the masked engine": lambda x: espn.explain(converted(), x, runs=1).logits,
    "explain CrypTen": lambda x: espn.explain(converted("espn"), x, runs=1).logits,
    "Plan.encode": lambda x: masked_model(converted()).plan.encode(x),
}


def clear(x: Any) -> torch.Tensor:
    if isinstance(x, np.ndarray):
        x = x.copy()
    with torch.no_grad():
        return NETWORK(torch.as_tensor(x).float())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("entry", [name for name in ENTRIES if name != "Plan.encode"])
def test_real_numbers_of_any_kind_give_the_networks_logits(entry: str, kind: str):
    logits = ENTRIES[entry](KINDS[kind])
    torch.testing.assert_close(logits.float(), clear(KINDS[kind]), atol=0.02, rtol=0)


@pytest.mark.parametrize("kind", NO_INPUTS)
@pytest.mark.parametrize("entry", ENTRIES)
def test_what_is_no_input_is_named_before_anything_runs(entry: str, kind: str):
    x, error, words = NO_INPUTS[kind]
    with pytest.raises(error, match=words):
        ENTRIES[entry](x)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("x", [X[:0], X[:0].numpy(), X[:, :1], 3.0, X[0]])
def test_another_shape_is_named(entry: str, x: Any):
    with pytest.raises(ShapeError):
        ENTRIES[entry](x)


@pytest.mark.parametrize("kind", KINDS)
def test_an_example_of_any_kind_is_checked_converted_and_calibrates(kind: str):
    example = KINDS[kind]
    found = espn.check(NETWORK, example)
    assert found.ok and found.masked is None
    logits, _ = espn.simulate(espn.convert(NETWORK, example), example)
    torch.testing.assert_close(logits, clear(example), atol=0.02, rtol=0)
    logits, _ = espn.simulate(converted(), X, example=example)
    torch.testing.assert_close(logits, clear(X), atol=0.05, rtol=0)


@pytest.mark.parametrize("kind", NO_INPUTS)
def test_an_example_that_is_none_is_named(kind: str):
    example, error, words = NO_INPUTS[kind]
    with pytest.raises(error, match=words):
        espn.check(NETWORK, example)
    with pytest.raises(error, match=words):
        espn.convert(NETWORK, example)
    if example is not None:  # None takes the conversion's own
        with pytest.raises(PlanError, match=words):
            espn.simulate(converted(), X, example=example)


@pytest.mark.parametrize("held", [torch.float16, torch.bfloat16, torch.float64])
def test_a_network_of_another_precision_takes_an_example_of_any(held: torch.dtype):
    network = small_network().to(held)
    for example in (X, X.double(), X.numpy()):
        found = espn.check(network, example)
        assert found.ok and found.masked is None
    logits, _ = espn.simulate(espn.convert(network, X), X)
    torch.testing.assert_close(logits, network.float()(X).detach(), atol=0.02, rtol=0)
    network.to(held)
    assert all(p.dtype == held for p in network.parameters())


class Scaled(nn.Module):
    """A network that takes bytes and makes them numbers itself."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_floating_point():
            raise TypeError("bytes are expected")
        return self.head(x.to(torch.float32) / 255)


def test_integers_stay_integers_where_the_network_computes_with_them():
    x = torch.arange(8, dtype=torch.uint8).reshape(2, 4)
    network = Scaled().eval()
    found = espn.check(network, x)
    if found.ok:
        logits, _ = espn.simulate(espn.convert(network, x), x)
        torch.testing.assert_close(logits, network(x).detach(), atol=0.01, rtol=0)
    else:
        assert "Cast" in str(found)
