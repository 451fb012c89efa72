"""What is a batch of real numbers, and what is refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from crypten_espn.errors import DataError, RangeError
from crypten_espn.inputs import number_tensor, real_tensor

VALUES = [1, 0, 3]


@pytest.mark.parametrize(
    ("dtype", "real", "number"),
    [
        (torch.float16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float32, torch.float32),
        (torch.float64, torch.float64, torch.float64),
        (torch.uint8, torch.float32, torch.int64),
        (torch.int16, torch.float32, torch.int64),
        (torch.int32, torch.float64, torch.int64),
        (torch.int64, torch.float64, torch.int64),
        (torch.uint32, torch.float64, torch.int64),
        (torch.uint64, torch.float64, torch.int64),
    ],
)
def test_every_real_type_of_torch_keeps_its_values(dtype, real, number):
    x = torch.tensor(VALUES).to(dtype)
    assert real_tensor(x).dtype == real
    assert number_tensor(x).dtype == number
    assert real_tensor(x).tolist() == number_tensor(x).tolist() == VALUES


@pytest.mark.parametrize(
    "kind", ["f2", "f4", ">f4", "f8", "i1", "u1", ">i2", "i4", "i8", "u8", "?"]
)
def test_every_real_type_of_numpy_keeps_its_values(kind):
    x = np.array([1, 0, 1]).astype(kind)
    assert real_tensor(x).tolist() == [1, 0, 1]
    assert real_tensor(x[::-1]).tolist() == [1, 0, 1]
    assert real_tensor(np.broadcast_to(x[0], (2, 2))).tolist() == [[1, 1], [1, 1]]


def test_integers_keep_every_digit():
    largest = 2**63 - 1
    assert number_tensor(torch.tensor([largest])).tolist() == [largest]
    assert number_tensor(np.array([2**40 + 1])).tolist() == [2**40 + 1]
    assert real_tensor(torch.tensor([2**40 + 1])).tolist() == [2**40 + 1]
    assert number_tensor(np.array([2**63], dtype=np.uint64)).tolist() == [2.0**63]
    assert number_tensor(2**70).tolist() == 2.0**70
    with pytest.raises(RangeError, match="1329 bits"):
        number_tensor(10**400)


def test_numbers_and_lists_are_inputs():
    assert real_tensor(3.5).shape == ()
    assert real_tensor(True).tolist() == 1
    assert real_tensor([1, 2.5, True]).tolist() == [1, 2.5, 1]
    assert real_tensor([[1, 2], (3, 4)]).tolist() == [[1, 2], [3, 4]]
    batch = real_tensor([np.ones((2, 2), np.float32), torch.zeros(2, 2)])
    assert batch.shape == (2, 2, 2)


def test_a_tensor_with_a_gradient_or_a_lazy_sign_becomes_plain_numbers():
    x = torch.ones(2, requires_grad=True)
    assert not real_tensor(x).requires_grad
    lazy = torch.tensor([1 + 2j]).conj().imag
    assert real_tensor(lazy).numpy().tolist() == [-2]
    read_only = np.ones(2)
    read_only.flags.writeable = False
    assert real_tensor(read_only).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("x", "named"),
    [
        (torch.tensor([1j]), "complex"),
        (np.array([1j]), "complex"),
        (torch.ones(2).to_sparse(), "sparse"),
        (torch.ones(2, device="meta"), "meta device"),
        (torch.ones(2).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (np.array(["a"]), "text"),
        (np.array([b"a"]), "bytes"),
        (np.array([None]), "Python objects"),
        (np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f4")]), "records"),
        (np.array(["2020"], dtype="datetime64[D]"), "datetime64"),
        (np.ma.array([1, 2], mask=[False, True]), "masked array with 1"),
        (np.ones((0, 3)), r"empty, of shape \(0, 3\)"),
        ([], "empty"),
        ([[1], [2, 3]], r"shapes \(1,\), \(2,\)"),
        ([1, "a"], "an element of the picture is a str"),
        ("x.npy", "is a str"),
        (None, "NoneType"),
        ({"a": 1}, "is a dict"),
        (Image.new("RGB", (4, 4)), "PIL image.*normalised as in training"),
        ([Image.new("L", (4, 4))], "PIL image"),
    ],
)
def test_what_is_no_batch_of_real_numbers_is_named(x: Any, named: str):
    with pytest.raises(DataError, match=named):
        real_tensor(x, "the picture")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_placed_where_asked(value: float):
    x = torch.zeros(2, 3)
    x[1, 2] = value
    assert real_tensor(x) is not None
    with pytest.raises(RangeError, match=r"1 values .* index \(1, 2\)"):
        real_tensor(x, finite=True)
