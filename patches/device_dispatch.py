"""torch's functions of integers on a GPU: a warning, and lists that never return."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .patch import Patch, replace


def wrapped(value: Tensor) -> Any:
    """CrypTen's integers of a GPU, wherever these are: its constructor moves them."""
    from crypten.cuda import CUDALongTensor

    result = CUDALongTensor()
    result._tensor = value
    return result


def _plain(value: Any) -> Any:
    """What torch computes with: values without wrappers, in lists too."""
    from crypten.cuda import CUDALongTensor

    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.tensor() if isinstance(value, CUDALongTensor) else value


def _again(value: Any) -> Any:
    """The inverse, of integers and truth values alike."""
    if isinstance(value, (list, tuple)):
        return [_again(item) for item in value]
    return wrapped(value.long()) if torch.is_tensor(value) else value


def _dispatch(
    cls: type,
    func: Callable[..., Any],
    types: Any,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
) -> Any:
    """A torch function: CrypTen's own where there is one, else torch's."""
    from crypten.cuda.cuda_tensor import HANDLED_FUNCTIONS

    options = kwargs or {}
    if func in HANDLED_FUNCTIONS:
        return HANDLED_FUNCTIONS[func](*args, **options)
    options = {name: _plain(value) for name, value in options.items()}
    return _again(func(*_plain(args), **options))


def _probe() -> bool:
    from crypten.cuda import CUDALongTensor

    function = inspect.getattr_static(CUDALongTensor, "__torch_function__")
    return not isinstance(function, classmethod)


def _install() -> Callable[[], None]:
    from crypten.cuda import CUDALongTensor

    return replace(CUDALongTensor, "__torch_function__", classmethod(_dispatch))


PATCH = Patch(
    name="device_dispatch",
    broke="on a GPU: torch warns that CUDALongTensor's __torch_function__ is a plain "
    "method, an error in future; torch.stack and torch.cat end in a RecursionError",
    seen_on="torch 2.11.0 with crypten 0.4.1",
    delete_when="CUDALongTensor.__torch_function__ is a classmethod that takes lists",
    probe=_probe,
    install=_install,
)
