"""Compiled loops against the torch operations that stand in for them elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from crypten_espn.pillar import elementwise

COEFFS = (0.31, 0.5, 0.16, 0.0, -0.003)
INTERVAL = (-5.0, 4.0)
SPECIAL = (math.nan, math.inf, -math.inf, 0.0, -0.0, 4.0, -5.0, 3.4e38)
SCALE = torch.tensor(0.37)


def values(dtype: torch.dtype, count: int) -> Tensor:
    x = 3 * torch.randn(count, generator=torch.Generator().manual_seed(count))
    return x.to(dtype)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "polynomial": lambda x: elementwise.polynomial(x, COEFFS, None),
    "clipped": lambda x: elementwise.polynomial(x, COEFFS, INTERVAL),
    "constant": lambda x: elementwise.polynomial(x, (0.25,), None),
    "slope": lambda x: elementwise.slope(x, x.flip(0), COEFFS[:-1], None),
    "clipped slope": lambda x: elementwise.slope(x, x.flip(0), COEFFS, INTERVAL),
    "power sum": lambda x: elementwise.power_sum(x, 4.8, 10),
    "square sum": lambda x: elementwise.power_sum(x, 1.0, 2),
    "bent sum": lambda x: elementwise.power_sum(x, 2.0, 6, 1.5),
    "bent slope": lambda x: elementwise.power_slope(x, 2.0, 6, SCALE, 1.5),
    "power slope": lambda x: elementwise.power_slope(x, 4.8, 10, SCALE),
    "square slope": lambda x: elementwise.power_slope(x, 1.0, 2, SCALE),
    "excess sum": lambda x: elementwise.excess_sum(x, -0.5, 4.5, 0.9),
    "excess slope": lambda x: elementwise.excess_slope(x, -0.5, 4.5, 0.9, SCALE),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 1023, 5000])
def test_compiled_and_plain_agree(
    name: str, dtype: torch.dtype, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = values(dtype, count)
    assert elementwise._readable(x)
    got = FUNCTIONS[name](x)
    monkeypatch.setattr(elementwise, "_readable", lambda *_: False)
    expected = FUNCTIONS[name](x)
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    # float32 inside: a unit of bfloat16 apart where the two round differently.
    loose = 2**-7 if got.dtype == torch.bfloat16 else 2e-5
    torch.testing.assert_close(got, expected, rtol=loose, atol=1e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_not_finite_values_are_not_hidden(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for special in SPECIAL:
        x = torch.tensor([special, 1.5, 2.5], dtype=dtype)
        got = FUNCTIONS[name](x)
        with monkeypatch.context() as patch:
            patch.setattr(elementwise, "_readable", lambda *_: False)
            expected = FUNCTIONS[name](x)
        assert torch.equal(got.isfinite(), expected.isfinite()), special


def test_rounding_to_bfloat16_is_to_nearest_even() -> None:
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[x.isfinite()]
    got = elementwise.polynomial(x, (0.0, 1.01), None)
    plain = torch.zeros_like(x, dtype=torch.float32) * x.float() + 1.01
    plain = plain * x.float() + 0.0
    assert torch.equal(got, plain.bfloat16())


def test_layouts_that_cannot_be_read_flat_take_the_other_way() -> None:
    x = values(torch.float32, 240).view(2, 3, 8, 5)
    assert elementwise._readable(x.to(memory_format=torch.channels_last))
    assert not elementwise._readable(x[:, :, ::2])
    assert not elementwise._readable(x.transpose(0, 1))
    assert not elementwise._readable(x.double())
    assert not elementwise._readable(x.to("meta"))
    assert not elementwise._readable(x, x.to(memory_format=torch.channels_last))
    out = elementwise.polynomial(x[:, :, ::2], COEFFS, None)
    whole = elementwise.polynomial(x, COEFFS, None)
    torch.testing.assert_close(out, whole[:, :, ::2])
