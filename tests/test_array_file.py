"""What a file of inputs may be, and how everything else is named."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from crypten_espn.array_file import load_array, one_input
from crypten_espn.errors import DataError, RangeError, ShapeError
from crypten_espn.inputs import check_batch


@pytest.mark.parametrize("kind", ["f2", "f4", ">f4", "f8", "i1", "i8", "?"])
def test_every_real_type_is_loaded_as_float32(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    array = np.array([[1, 0, 1], [0, 1, 1]]).astype(kind)
    for stored in (array, np.asfortranarray(array)):
        np.save(path, stored)
        loaded = load_array(path)
        assert loaded.dtype == torch.float32
        assert loaded.tolist() == [[1, 0, 1], [0, 1, 1]]


def npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, images=np.ones((2, 3)))


def cut(path: Path) -> None:
    np.save(path, np.ones((4, 5)))
    path.write_bytes(path.read_bytes()[:-8])


def huge(path: Path) -> None:
    """A header that promises more than the file holds."""
    with path.open("wb") as file:
        fields = {"shape": (2**40, 2**20), "fortran_order": False, "descr": "<f4"}
        np.lib.format.write_array_header_1_0(file, fields)


def objects(path: Path) -> None:
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)


@pytest.mark.parametrize(
    ("write", "named"),
    [
        (npz, r"\.npz archive of images; .*numpy.load\(file\)\['images'\]"),
        (lambda p: torch.save(torch.ones(2), p), "a torch file"),
        (
            lambda p: torch.save(
                torch.ones(2), p, _use_new_zipfile_serialization=False
            ),
            "old torch file",
        ),
        (lambda p: p.write_bytes(pickle.dumps([1])), "a pickle"),
        (lambda p: Image.new("RGB", (4, 4)).save(p, "PNG"), "PNG image"),
        (lambda p: Image.new("RGB", (4, 4)).save(p, "JPEG"), "JPEG image; .*normalise"),
        (lambda p: p.write_text("1,2,3"), "first bytes"),
        (lambda p: p.write_bytes(b""), "it is empty"),
        (lambda p: p.mkdir(), "cannot be read"),
        (lambda p: None, "No such file"),
        (objects, "holds Python objects"),
        (lambda p: np.save(p, np.array(["a"])), "no real numbers"),
        (lambda p: np.save(p, np.array([1j])), "complex"),
        (lambda p: np.save(p, np.ones((0, 3))), "is empty"),
        (lambda p: np.save(p, np.float32(3)), "a single number"),
        (cut, "is damaged"),
        (huge, "is damaged"),
        (
            lambda p: np.save(p, np.full((2, 3), 255, np.uint8)),
            r"uint8 from 255 to 255.*\(array / 255 - mean\) / std",
        ),
        (lambda p: np.save(p, np.arange(200)), "as images are stored"),
    ],
)
def test_what_is_no_batch_of_numbers_is_named(
    write: Any, named: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.npy"
    write(path)
    with pytest.raises(DataError, match=named) as raised:
        load_array(path)
    assert str(path) in str(raised.value)
    assert "allow_pickle" not in str(raised.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_values_that_are_not_finite_are_placed(value: float, tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.array([[0.0, value]]))
    with pytest.raises(RangeError, match=r"x\.npy holds 1 values .*\(0, 1\)"):
        load_array(path)


def test_small_whole_numbers_are_inputs(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.array([[0, 1]], dtype=np.uint8))
    assert load_array(path).tolist() == [[0, 1]]
    np.save(path, np.array([[-3, 16]]))
    assert load_array(path).tolist() == [[-3, 16]]


@pytest.mark.parametrize(
    ("shape", "cure"),
    [
        ((5, 1, 32, 32), "resize"),
        ((1, 28, 28), r"array\[None\]"),
        ((5, 28, 28, 1), "transpose"),
        ((5, 28, 28), "channel is missing"),
    ],
)
def test_another_size_is_named_with_both_sizes(
    shape: tuple[int, ...], cure: str
) -> None:
    check_batch(torch.zeros(2, 1, 28, 28), (1, 28, 28), "x.npy", "the network")
    with pytest.raises(ShapeError, match=rf"batch, 1, 28, 28.*{cure}") as raised:
        check_batch(torch.zeros(shape), (1, 28, 28), "x.npy", "the network")
    assert str(shape) in str(raised.value)


def test_calibration_that_is_one_input_is_told() -> None:
    assert "one input" in str(one_input(torch.ones(1, 3)))
    assert "4 copies of one input" in str(one_input(torch.ones(4, 3)))
    assert one_input(torch.arange(6.0).view(2, 3)) is None
