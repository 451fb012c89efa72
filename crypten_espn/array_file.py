"""Inputs from a file: an .npy of real numbers; anything else is named with its cure.

What a file is, its first bytes say; its header is checked against its size before
anything is allocated.
"""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from .errors import DataError
from .inputs import real_tensor, refuse_not_finite

_SAVE = "numpy.save(path, array) writes one"
# First bytes and what such a file is.
_IMAGES = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"BM": "a BMP image",
    b"II*\0": "a TIFF image",
    b"MM\0*": "a TIFF image",
    b"RIFF": "a WebP image",
}
_OTHERS = {
    b"\x89HDF": "an HDF5 file",
    b"\x80\x02": "a pickle or an old torch file",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"\x1f\x8b": "compressed by gzip",
}


def load_array(path: Path) -> Tensor:
    """The batch of real numbers in an .npy file.

    Returns:
        float32, finite, of the file's shape.

    Raises:
        DataError: no such file, another kind of file, damaged, of objects, text or
            complex numbers, empty, or bytes of an image that are not scaled.
        RangeError: NaN or infinity.
    """
    try:
        with path.open("rb") as file:
            start = file.read(8)
            if not start.startswith(npy.MAGIC_PREFIX):
                raise DataError(f"{path} is no .npy file: {_other(path, start)}")
            file.seek(0)
            shape, fortran, dtype = _header(file, path)
            count = math.prod(shape)
            left = path.stat().st_size - file.tell()
            if not dtype.hasobject and left != count * dtype.itemsize:
                raise DataError(
                    f"{path} is damaged: its header says {count * dtype.itemsize} "
                    f"bytes for {dtype} of shape {shape}, and {left} follow; save it "
                    "again"
                )
            if dtype.kind not in "fiubc":
                kind = "Python objects" if dtype.hasobject else f"numpy type {dtype}"
                raise DataError(
                    f"{path} holds {kind}, no real numbers; save an array of numbers, "
                    "such as array.astype(numpy.float32)"
                )
            array = np.fromfile(file, dtype=dtype, count=count)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or error}); give an .npy file, as "
            "numpy.save writes it"
        ) from error
    array = array.reshape(shape, order="F" if fortran else "C")
    if not shape:
        raise DataError(
            f"{path} holds a single number; save a batch of inputs, (batch, ...)"
        )
    numbers = real_tensor(array, str(path)).float()
    refuse_not_finite(numbers, str(path))
    _refuse_pixels(array, path)
    return numbers


def _header(file: BinaryIO, path: Path) -> tuple[tuple[int, ...], bool, np.dtype]:
    try:
        version = npy.read_magic(file)
        reader = {
            (1, 0): npy.read_array_header_1_0,
            (2, 0): npy.read_array_header_2_0,
        }.get(version)
        if reader is None:
            raise ValueError(f"format {version[0]}.{version[1]}")
        shape, fortran, dtype = reader(file)
    except Exception as error:  # a header is parsed as Python, and may be anything
        raise DataError(
            f"{path} is damaged: its .npy header cannot be read; save it again"
        ) from error
    if any(size < 0 for size in shape):
        raise DataError(f"{path} is damaged: its shape is {shape}; save it again")
    return shape, bool(fortran), dtype


def _other(path: Path, start: bytes) -> str:
    """What a file is that is no .npy, and what to do."""
    if not start:
        return f"it is empty; {_SAVE}"
    if start.startswith(b"PK"):
        return _archive(path)
    for magic, kind in _IMAGES.items():
        if start.startswith(magic):
            return (
                f"it is {kind}; decode, resize and normalise it as in training, and "
                "save the (batch, channels, height, width) array with numpy.save"
            )
    for magic, kind in _OTHERS.items():
        if start.startswith(magic):
            return f"it is {kind}; save the array in it with numpy.save"
    return f"its first bytes are {start!r}; {_SAVE}"


def _archive(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        return f"it is a damaged zip archive; {_SAVE}"
    if any(name.endswith("data.pkl") for name in names):
        return (
            "it is a torch file; save its tensor with "
            "numpy.save(path, torch.load(file).numpy())"
        )
    arrays = [name.removesuffix(".npy") for name in names if name.endswith(".npy")]
    if not arrays:
        return f"it is a zip archive; {_SAVE}"
    return (
        f"it is an .npz archive of {', '.join(arrays[:5])}; save one array with "
        f"numpy.save(path, numpy.load(file)[{arrays[0]!r}])"
    )


def _refuse_pixels(array: np.ndarray, path: Path) -> None:
    """Refuse integers that are an image's bytes: no network here is fed them raw."""
    if array.dtype.kind not in "iu":
        return
    low, high = int(array.min()), int(array.max())
    byte = array.dtype == np.uint8 and high > 1
    if byte or (low >= 0 and 127 < high < 256):
        raise DataError(
            f"{path} holds {array.dtype} from {low} to {high}, as images are stored; "
            "the network takes what it was trained on: (array / 255 - mean) / std as "
            "float32, with the mean and std of its training. If it was trained on the "
            "bytes themselves, save array.astype(numpy.float32)"
        )


def one_input(numbers: Tensor) -> str | None:
    """What to say of calibration that is a single input; None if there are several."""
    first = numbers[:1]
    if len(numbers) > 1 and not bool(torch.equal(numbers, first.expand_as(numbers))):
        return None
    several = f"{len(numbers)} copies of one input" if len(numbers) > 1 else "one input"
    return (
        f"calibration is {several}, which bounds every layer alone; another input may "
        "exceed what it reaches. Give some hundred inputs"
    )
