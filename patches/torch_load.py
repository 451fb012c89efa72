"""torch.load refuses classes it does not know, and it knows none of CrypTen's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from .patch import Patch


def _share_classes() -> list[Any]:
    """The classes in a saved CrypTensor: data holders without code of their own."""
    from crypten import gradients
    from crypten.cuda import CUDALongTensor
    from crypten.encoder import FixedPointEncoder
    from crypten.mpc import MPCTensor, ptype
    from crypten.mpc.primitives import ArithmeticSharedTensor, BinarySharedTensor

    functions = [
        value
        for value in vars(gradients).values()
        if isinstance(value, type) and issubclass(value, gradients.AutogradFunction)
    ]
    return [
        MPCTensor,
        ptype,
        ArithmeticSharedTensor,
        BinarySharedTensor,
        FixedPointEncoder,
        CUDALongTensor,
        gradients.AutogradContext,
        *functions,
    ]


def _missing() -> list[Any]:
    known = set(torch.serialization.get_safe_globals())
    return [cls for cls in _share_classes() if cls not in known]


def _probe() -> bool:
    default = inspect.signature(torch.load).parameters["weights_only"].default
    return default is not False and bool(_missing())


def _install() -> Callable[[], None]:
    added = _missing()
    torch.serialization.add_safe_globals(added)

    def undo() -> None:
        kept = [c for c in torch.serialization.get_safe_globals() if c not in added]
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(kept)

    return undo


PATCH = Patch(
    name="torch_load",
    broke="crypten.load and the tuple cache on disk: torch.load with weights_only, its "
    "default, rejects crypten.mpc.mpc.MPCTensor",
    seen_on="torch 2.13.0 with crypten 0.4.1",
    delete_when="CrypTen registers its share classes with torch.serialization",
    probe=_probe,
    install=_install,
)
