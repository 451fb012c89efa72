"""The encoder takes every real type as what it holds, and refuses the rest by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from crypten.encoder import FixedPointEncoder
from torch import nn

import crypten_espn as espn
from crypten_espn import patches
from crypten_espn.errors import DataError, RangeError
from crypten_espn.polynomial import Polynomial

VALUES = [4.5, -3.25, 100.0]
ENCODER = FixedPointEncoder(precision_bits=16)


@contextmanager
def without_patch() -> Iterator[None]:
    patch = patches.get("encoder_range")
    if not patch.applied:
        pytest.skip("encoder_range is not needed here")
    patch.revert()
    try:
        yield
    finally:
        patch.apply()


@pytest.mark.parametrize(
    "x",
    [
        torch.tensor(VALUES, dtype=torch.float16),
        torch.tensor(VALUES, dtype=torch.bfloat16),
        torch.tensor(VALUES, dtype=torch.float32),
        torch.tensor(VALUES, dtype=torch.float64),
        np.array(VALUES),
        np.array(VALUES, dtype=np.float16),
        np.array(VALUES, dtype=">f4"),
        VALUES,
        tuple(VALUES),
    ],
    ids=lambda x: f"{type(x).__name__} {getattr(x, 'dtype', '')}",
)
def test_every_real_type_is_encoded_as_its_values(x: Any) -> None:
    assert ENCODER.encode(x).tolist() == [int(v * 2**16) for v in VALUES]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.uint16])
def test_whole_numbers_are_encoded_as_their_values(dtype: torch.dtype) -> None:
    x = torch.tensor([1, 0]).to(dtype)
    assert ENCODER.encode(x).tolist() == [2**16, 0]


def test_half_precision_and_arrays_were_encoded_as_something_else() -> None:
    with without_patch():
        half = ENCODER.encode(torch.tensor(VALUES, dtype=torch.float16))
        assert half.tolist() != [int(v * 2**16) for v in VALUES]
        array = ENCODER.encode(np.array(VALUES))
        assert array.tolist() == [int(v) * 2**16 for v in VALUES]
        with pytest.raises(TypeError):
            ENCODER.encode(torch.tensor([True]))


@pytest.mark.parametrize(
    "x", [torch.tensor([1j]), np.array(["a"]), np.array([None]), "text", {1: 2}]
)
def test_what_holds_no_real_numbers_is_named(x: Any) -> None:
    with pytest.raises(DataError, match="what is to be shared"):
        ENCODER.encode(x)


@pytest.mark.parametrize("x", [2**47, -(2**47) - 1, np.array([2**47]), float("nan")])
def test_range_is_checked_in_every_type(x: Any) -> None:
    with pytest.raises(RangeError, match=r"below 2\*\*47"):
        ENCODER.encode(x)


@pytest.mark.parametrize("protocol", ["espn", "beaver"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_private_network_answers_any_precision_alike(
    protocol: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    polynomial = Polynomial((322, 512, 160, 0, -3), 10, (-5.0, 5.0))
    network = nn.Sequential(
        nn.Linear(4, 6), espn.PolynomialActivation(polynomial), nn.Linear(6, 3)
    ).eval()
    x = torch.randn(2, 4).to(dtype)
    private = espn.convert(network, x.float(), protocol=protocol)
    with torch.no_grad():
        expected = network(x.float())
    torch.testing.assert_close(
        espn.simulate(private, x)[0], expected, atol=0.02, rtol=0
    )
