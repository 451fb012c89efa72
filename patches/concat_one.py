"""A concatenation of a single value fails (CrypTen issue 427)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .patch import Patch, replace


def _probe() -> bool:
    from crypten.nn.module import Concat

    try:
        Concat(0)(torch.ones(1))
    except AssertionError:
        return True
    return False


def _install() -> Callable[[], None]:
    from crypten.nn.module import Concat

    stock = Concat.forward

    def forward(self: Any, input: Any) -> Any:
        # A graph hands a module with one input the value itself.
        return stock(self, input) if isinstance(input, (list, tuple)) else input

    return replace(Concat, "forward", forward)


PATCH = Patch(
    name="concat_one",
    broke="a converted network with torch.cat([x], 1): input needs to be a list or "
    "tuple",
    seen_on="crypten 0.4.1, any torch",
    delete_when="crypten.nn.module.Concat takes the value that a graph hands over",
    probe=_probe,
    install=_install,
)
