"""Inputs of any kind: what is a batch of real numbers, and what is refused by name.

Every entry point that takes data passes it through `real_tensor`, so that half
precision, integers and numpy arrays are right everywhere, and an image, an archive or
a complex array is named wherever it comes in. `number_tensor` is the same for code that
keeps integers exact.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .errors import DataError, RangeError, ShapeError

# What holds every value of a type exactly.
_EXACT = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.bool: torch.int64,
    torch.uint8: torch.int64,
    torch.int8: torch.int64,
    torch.int16: torch.int64,
    torch.int32: torch.int64,
    torch.int64: torch.int64,
    torch.uint16: torch.int64,
    torch.uint32: torch.int64,
}
_SMALL = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16)
_ALLOWED = "give real numbers as a torch tensor or numpy array"


def real_tensor(x: object, what: str = "the input", *, finite: bool = False) -> Tensor:
    """A torch tensor of the real numbers in x, as precise as x itself.

    Args:
        x: torch tensor of any real type, numpy array or scalar, number, or nested list
            of these.
        what: how x is called in messages.
        finite: whether NaN and infinity are refused.

    Returns:
        Tensor of x's shape, on its device, without gradient: float32; float64 if x is
        that, or of integers of 32 bits and more. Memory may be shared with x.

    Raises:
        DataError: complex, objects, text, dates, sparse, an image, empty, or lists of
            uneven length; with the cure.
        RangeError: NaN or infinity, with `finite`.
    """
    given = getattr(x, "dtype", None)
    numbers = number_tensor(x, what)
    if not numbers.numel():
        raise DataError(
            f"{what} is empty, of shape {tuple(numbers.shape)}; give at least one input"
        )
    if not numbers.is_floating_point():
        small = given in _SMALL or (isinstance(given, np.dtype) and given.itemsize <= 2)
        numbers = numbers.to(torch.float32 if small else torch.float64)
    if finite:
        refuse_not_finite(numbers, what)
    return numbers


def input_batch(x: object, shape: tuple[int, ...]) -> Tensor:
    """The real numbers of a batch of a network's inputs, checked.

    Args:
        x: (batch, *shape), as `real_tensor` takes it.
        shape: of one input.

    Raises:
        DataError: as `real_tensor`.
        ShapeError: another shape, or no rows; with the cure.
        RangeError: NaN or infinity.
    """
    numbers = number_tensor(x)
    check_batch(numbers, shape, "the input", "the network")
    if not len(numbers):
        raise ShapeError("the input has no rows; give at least one")
    return real_tensor(numbers, finite=True)


def check_batch(numbers: Tensor, shape: tuple[int, ...], what: str, whose: str) -> None:
    """Raise ShapeError unless numbers are (batch, *shape); the message has the cure.

    Args:
        numbers: what was given.
        shape: of one input.
        what, whose: names of the two for the message.
    """
    given = tuple(numbers.shape)
    if given[1:] == shape:
        return
    sizes = ", ".join(map(str, shape))
    cure = "resize the inputs as in training"
    if given == shape:
        cure = "a single input needs its batch too: array[None]"
    elif len(given) == 4 and (given[3], given[1], given[2]) == shape:
        cure = "channels come first: array.transpose(0, 3, 1, 2)"
    elif (
        len(given) == 3 and len(shape) == 3 and shape[0] == 1 and given[1:] == shape[1:]
    ):
        cure = "the channel is missing: array[:, None]"
    raise ShapeError(
        f"{what} has shape {given}, {whose} takes (batch, {sizes}); {cure}"
    )


def refuse_not_finite(numbers: Tensor, what: str) -> None:
    """Raise RangeError if any value is NaN or infinite, saying how many and where."""
    bad = ~torch.isfinite(numbers)
    count = int(bad.sum())
    if count:
        place = tuple(int(i) for i in bad.nonzero()[0])
        raise RangeError(
            f"{what} holds {count} values that are NaN or infinite, the first at index "
            f"{place}; clean it first"
        )


def number_tensor(x: object, what: str = "the input") -> Tensor:
    """A torch tensor of the numbers in x: int64, float32 or float64, exactly x's.

    Args:
        x: as `real_tensor`, and may be empty.
        what: how x is called in messages.

    Returns:
        Tensor of x's shape, on its device, without gradient; int64 if x is of integers
        or booleans, float32 if of float16 or bfloat16. Integers of 2**63 and more
        become float64. Memory may be shared with x.

    Raises:
        DataError: as `real_tensor`.
    """
    if isinstance(x, Tensor):
        return _from_torch(x, what)
    if isinstance(x, np.ndarray | np.generic):
        return _from_numpy(x, what)
    if isinstance(x, bool | int | float):
        return _from_number(x, what)
    if isinstance(x, list | tuple):
        return _from_list(x, what)
    kind = f"{type(x).__module__}.{type(x).__qualname__}"
    if kind.startswith("PIL."):
        raise DataError(
            f"{what} is a PIL image ({kind}), which says neither its size nor its "
            "scaling; give the network what it was trained on, such as "
            "torchvision.transforms.functional.to_tensor(image)[None], resized and "
            "normalised as in training"
        )
    raise DataError(f"{what} is a {kind.removeprefix('builtins.')}; {_ALLOWED}")


def _from_torch(x: Tensor, what: str) -> Tensor:
    if x.layout != torch.strided or x.is_nested:
        kind = "nested" if x.is_nested else f"sparse ({x.layout})"
        raise DataError(f"{what} is {kind}; give a dense tensor, as x.to_dense() makes")
    if x.is_meta:
        raise DataError(f"{what} is on the meta device and holds no values; {_ALLOWED}")
    x = x.detach()
    if x.is_quantized:
        return x.dequantize()
    if x.is_complex():
        raise DataError(_complex(what, x.dtype))
    if x.dtype == torch.uint64:
        return _from_numpy(x.cpu().numpy(), what).to(x.device)
    if x.dtype not in _EXACT:
        raise DataError(
            f"{what} is of type {x.dtype}; convert it first, as x.to(torch.float32)"
        )
    # A view such as z.conj().imag negates lazily, which numpy() refuses.
    return x.to(_EXACT[x.dtype]).resolve_neg()


def _from_numpy(x: np.ndarray | np.generic, what: str) -> Tensor:
    if isinstance(x, np.ma.MaskedArray):
        if np.ma.is_masked(x):
            raise DataError(
                f"{what} is a masked array with {int(np.ma.count_masked(x))} values "
                "missing; fill them first, as x.filled(0) does"
            )
        x = x.data
    array = np.asarray(x)
    kind = array.dtype.kind
    if kind == "c":
        raise DataError(_complex(what, array.dtype))
    if kind not in "fiub":
        named = {"O": "Python objects", "U": "text", "S": "bytes", "V": "records"}
        raise DataError(
            f"{what} holds {named.get(kind, 'no numbers')} (numpy type "
            f"{array.dtype}); {_ALLOWED}, such as x.astype(numpy.float32)"
        )
    target: type[np.generic]
    if kind == "f":
        target = np.float32 if array.itemsize <= 4 else np.float64
    elif array.dtype.itemsize == 8 and kind == "u" and array.size:
        target = np.int64 if int(array.max()) < 2**63 else np.float64
    else:
        target = np.int64
    array = np.ascontiguousarray(array, dtype=target).reshape(array.shape)
    # torch shares memory, and warns of what it may not write to.
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _from_number(x: float, what: str) -> Tensor:
    if isinstance(x, int) and -(2**63) <= x < 2**63:
        return torch.tensor(int(x), dtype=torch.int64)
    try:
        return torch.tensor(float(x), dtype=torch.float64)
    except OverflowError as error:
        raise RangeError(
            f"{what} is an integer of {int(x).bit_length()} bits, beyond every number "
            "format; scale it first"
        ) from error


def _from_list(x: list[object] | tuple[object, ...], what: str) -> Tensor:
    if not x:
        return torch.empty(0)
    if all(isinstance(part, bool | int | float) for part in x):
        array = np.asarray(x)
        if array.dtype.kind in "fib":
            return _from_numpy(array, what)
    parts = [number_tensor(part, f"an element of {what}") for part in x]
    shapes = sorted({tuple(part.shape) for part in parts})
    if len(shapes) > 1:
        named = ", ".join(map(str, shapes[:4]))
        raise DataError(
            f"{what} is a list of elements of shapes {named}; all must have one shape"
        )
    return torch.stack([part.cpu() for part in parts])


def _complex(what: str, dtype: object) -> str:
    return (
        f"{what} is complex ({dtype}); networks take real numbers, such as x.real or "
        "torch.view_as_real(x)"
    )
